"""The student's half of a round: steps on samples of the synthesizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dfkd_jax import parallel
from dfkd_jax.distill import mosaic
from dfkd_jax.distill.student import Student, train_step
from dfkd_jax.distill.student import divergence as student_divergence
from dfkd_jax.losses.divergence import agreement, attention_transfer
from dfkd_jax.models.network import Network
from dfkd_jax.synth import replay
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Array, Metrics, PRNGKey, PyTree


def distill(
    student: Student, state: PyTree, key: PRNGKey, teacher: Network, *, synthesizer: Synthesizer,
    tx: optax.GradientTransformation, num_steps: int, temperature: float = 20.0,
    divergence: str = 'kl', attention_factor: float = 0.0,
    augment: Callable[[PRNGKey, Array], Array], mosaic_side: int = 1, num_tasks: int = 1,
    axis: str | None = None,
    part: replay.HostBatches | None = None) -> tuple[Student, PyTree, Metrics]:
  """Trains the student for one round, in one `lax.scan`.

  The loss is the mean of weights times T^2 KL(teacher || student) at temperature T
  (arXiv:2112.06253, equation 6; Hinton et al. 2015). Both networks see the same augmented images.
  The teacher evaluates, the student trains.

  Args:
    student: Before the round; `tx` is its optimizer.
    state: State of the synthesizer, which gives samples and weights; its `weigh` may change it.
    key: Key of this round of `num_steps` steps.
    divergence: 'kl', or 'l1' or 'l2' between logits.
    attention_factor: Factor of `losses.divergence.attention_transfer`, which is added (ZSKT).
    augment: (key, images) -> images.
    mosaic_side: Images on a side of the mosaics that both networks see; above 1 for networks of
      pixels only.
    num_tasks: Tasks on this device. Keys do not depend on the number of devices.
    axis: The mapped axis of devices, if any.
    part: The steps to take and their images, if the buffer is on the host. None takes all.

  Returns:
    Student, state and metrics. The metrics are [] means over the steps: 'loss', 'agreement' on
    these images, mean 'weight' of an image, and 'weighed_loss', the weighted sum of losses over
    the sum of weights. Only 'losses' has an entry per step, [num_steps].
  """
  augment = parallel.by_task(augment, num_tasks, axis)

  def by_image(outputs):
    if mosaic_side == 1:
      return outputs
    split = lambda maps: mosaic.split(maps, mosaic_side)
    return outputs._replace(logits=split(outputs.logits), maps=tuple(map(split, outputs.maps)))

  def step(carry, inputs):
    (student, state), (step_key, drawn) = carry, inputs
    key_sample, key_augment = jax.random.split(step_key)
    batch = synthesizer.sample(replay.with_batch(state, drawn), key_sample)
    images = augment(key_augment, batch.images)
    if mosaic_side > 1:
      images = mosaic.join(images, mosaic_side)
    targets = by_image(teacher(images))

    def loss_fn(outputs):
      outputs = by_image(outputs)
      losses = student_divergence(divergence, outputs.logits, targets.logits, temperature)
      if attention_factor:
        losses += attention_factor * attention_transfer(outputs.maps, targets.maps)
      new_state, weights = synthesizer.weigh(state, batch, lax.stop_gradient(losses))
      same_class = agreement(outputs.logits, targets.logits).mean()
      metrics = {'agreement': same_class, 'weight': weights.mean()}
      return (lax.stop_gradient(weights) * losses).mean(), (new_state, metrics)

    student, loss, (state, metrics) = train_step(student, images, loss_fn, tx, axis)
    return (student, state), {'loss': loss, **parallel.pmean(metrics, axis)}

  keys, images = jax.random.split(key, num_steps), None
  if part is not None:
    images = part.images
    keys = lax.dynamic_slice_in_dim(keys, part.first, images.shape[0])
  (student, state), metrics = lax.scan(step, (student, state), (keys, images))
  weight = metrics['weight']
  metrics['weighed_loss'] = metrics['loss'] / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)
  return student, state, jax.tree.map(jnp.mean, metrics) | {'losses': metrics['loss']}


def sampled_indices(
    state: PyTree, key: PRNGKey, *, synthesizer: Synthesizer, num_steps: int) -> Array:
  """Returns the buffer indices [num_steps, B] that `distill` will sample with this key.

  Valid only if the student's losses do not change how the buffer is sampled. The index is -1 for
  images of a generator's moving average, which are in no slot.
  """
  return lax.map(lambda step_key: synthesizer.sample(state, jax.random.split(step_key)[0]).slots,
                 jax.random.split(key, num_steps))
