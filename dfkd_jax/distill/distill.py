"""The student's half of a round: steps on samples of the synthesizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dfkd_jax import parallel
from dfkd_jax.distill.student import Student, train_step
from dfkd_jax.losses import attention
from dfkd_jax.losses import divergence as divergences
from dfkd_jax.models.network import Network
from dfkd_jax.synth import replay
from dfkd_jax.synth.replay import HostBatches
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Array, Metrics, PRNGKey, PyTree


def distill(
    student: Student,
    state: PyTree,
    key: PRNGKey,
    teacher: Network,
    *,
    synthesizer: Synthesizer,
    tx: optax.GradientTransformation,
    num_steps: int,
    temperature: float = 20.0,
    divergence: str = 'kl',
    attention_factor: float = 0.0,
    augment: Callable[[PRNGKey, Array], Array],
    num_tasks: int = 1,
    axis: str | None = None,
    part: HostBatches | None = None,
) -> tuple[Student, PyTree, Metrics]:
  """The student's steps of one round, one `lax.scan`.

  The loss is the mean of weights times T^2 KL(teacher || student) at temperature T
  (arXiv:2112.06253, equation 6; Hinton et al. 2015), on images that both networks
  see under the same augmentation. The teacher evaluates, the student trains.

  Args:
    student: Before the round.
    state: The synthesizer's; its `weigh` may change it.
    key: Of this round.
    teacher: Never changes.
    synthesizer: Gives samples and weights.
    tx: The student's optimizer.
    num_steps: Steps in a round.
    temperature: T of the divergence, if it is 'kl'.
    divergence: 'kl', or 'l1' or 'l2' between logits.
    attention_factor: Of `losses.attention.attention_transfer`, which is added to the divergence (ZSKT).
    augment: (key, images) -> images.
    num_tasks: Tasks on this device, for keys that do not depend on the number of devices.
    axis: The mapped axis of devices, if any.
    part: Steps to take, and their images, where those of the buffer are elsewhere; None: all `num_steps`.

  Returns:
    Student, state, and metrics, each [] and a mean over the steps: the 'loss', 'agreement' on these images, the mean
    'weight' of an image, and the 'weighed_loss', the sum of weights times losses over that of weights; but 'losses' are
    those of each step [num_steps].
  """
  augment = parallel.by_task(augment, num_tasks, axis)

  def step(carry, inputs):
    (student, state), (step_key, drawn) = carry, inputs
    key_sample, key_augment = jax.random.split(step_key)
    batch = synthesizer.sample(replay.with_batch(state, drawn), key_sample)
    images = augment(key_augment, batch.images)
    wanted = teacher(images)

    def loss_fn(outputs):
      per_sample = per_sample_divergence(divergence, outputs.logits, wanted.logits, temperature)
      if attention_factor:
        per_sample += attention_factor * attention.attention_transfer(outputs.maps, wanted.maps)
      new_state, weights = synthesizer.weigh(state, batch, lax.stop_gradient(per_sample))
      same = divergences.agreement(outputs.logits, wanted.logits).mean()
      further = {'agreement': same, 'weight': weights.mean()}
      return (lax.stop_gradient(weights) * per_sample).mean(), (new_state, further)

    student, loss, (state, further) = train_step(student, images, loss_fn, tx, axis)
    return (student, state), {'loss': loss, **parallel.pmean(further, axis)}

  keys, images = jax.random.split(key, num_steps), None
  if part is not None:
    images = part.images
    keys = lax.dynamic_slice_in_dim(keys, part.first, images.shape[0])
  (student, state), metrics = lax.scan(step, (student, state), (keys, images))
  metrics['weighed_loss'] = metrics['loss'] / jnp.maximum(metrics['weight'], jnp.finfo(metrics['weight'].dtype).tiny)
  return student, state, jax.tree.map(jnp.mean, metrics) | {'losses': metrics['loss']}


def sampled_indices(state: PyTree, key: PRNGKey, *, synthesizer: Synthesizer, num_steps: int) -> Array:
  """Slots [num_steps, B] that `distill` will draw with this key from a buffer whose draws no loss of a student moves.

  Images that no slot has, those of a generator's moving average, are -1.
  """
  def of_step(step_key):
    key_sample, _ = jax.random.split(step_key)
    return synthesizer.sample(state, key_sample).slots

  return lax.map(of_step, jax.random.split(key, num_steps))


def per_sample_divergence(kind: str, logits: Array, wanted: Array, temperature: float) -> Array:
  """Divergence of the student's logits [B, ..., K] from the teacher's, per sample [B]."""
  kinds = {
      'kl': lambda: divergences.kl(logits, wanted, temperature),
      'l1': lambda: divergences.l1(logits, wanted),
      'l2': lambda: divergences.l2(logits, wanted)}
  if kind not in kinds:
    raise ValueError(f'divergence is {kind!r}, must be one of {tuple(kinds)}.')
  per_element = kinds[kind]()
  return per_element.reshape(per_element.shape[0], -1).mean(1)
divergence = per_sample_divergence
