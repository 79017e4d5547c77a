"""DeepInversion: images found pixel by pixel, from noise, under the teacher's batch-norm moments.

Each call starts a batch at noise and follows the gradient in pixels for many
steps: the classes asked for (one_hot), the moments of training (batch_norm), smooth
images (total_variation, l2), under a jitter that is one for the whole batch. With
an adversary it is Adaptive DeepInversion: images on which student and teacher
differ. Pixels are those after the teacher's normalisation, as published, so that a
step means the same for every channel.

References:
  Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion,
  CVPR 2020, https://arxiv.org/abs/1912.08795, equations 2 to 8, and the published CIFAR scripts
  for numbers. One of those code bases repels the student's moments too
  (student_batch_norm, factor 0.01), and all of them keep the last iterate where they say best.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import augment, parallel, tasks
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generators, inner_loop, objective, replay
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey

KEEP = ('best', 'last')


class State(struct.PyTreeNode):
  """Nothing is learnt from call to call."""

  step: Array  # [] int32, calls so far
  buffer: replay.ReplayBuffer


def deep_inversion(
    *,
    image_shape: tuple[int, int, int],
    task: tasks.Task,
    factors: objective.Factors = objective.Factors(
        batch_norm=10.0, one_hot=1.0, adversarial=1.0, total_variation=1e-3),
    adversary: objective.Adversary = objective.Adversary('js', 3.0, False),
    adversarial_after: int = 0,
    num_steps: int = 1000,
    learning_rate: float = 0.1,
    adam_b1: float = 0.5,
    adam_b2: float = 0.99,
    keep: str = 'best',
    batch_size: int = 256,
    sample_batch_size: int = 256,
    capacity: int = 51_200,
    num_tasks: int = 1,
    task_map: str = 'auto',
    axis: str | None = None,
    augment: Callable[[PRNGKey, Array], Array] = augment.roll_and_flip,
    sample_pixels: Callable[[PRNGKey, tuple[int, ...]], Array] = jax.random.normal,
) -> Synthesizer:
  """Makes the DeepInversion synthesizer; defaults are those of the published CIFAR script.

  Args:
    image_shape: [H, W, C].
    task: What the teacher was trained for.
    factors: Of batch_norm, one_hot, adversarial, student_batch_norm, and of total_variation and l2, which are those of
      the normalised pixels before `augment`.
    adversary: Jensen-Shannon at temperature 3, of all images.
    adversarial_after: Calls before the adversarial term sets in.
    num_steps: Steps of a call, 1,000 in the script, 2,000 in the papers' tables.
    learning_rate: Adam's, in units of the teacher's normalisation; its state is fresh in every call.
    adam_b1: Decay of Adam's first moment.
    adam_b2: Decay of Adam's second moment.
    keep: Images of the 'best' step, or the 'last' iterate, which no loss has seen (what the published code keeps);
      its labels are then those of the step before.
    batch_size: B, images of one task in one call.
    sample_batch_size: Images for one step of the student, on this device.
    capacity: Images that the buffer holds on this device.
    num_tasks: M, batches on this device in one call.
    task_map: How tasks are mapped, see `optimize.task_mapper`.
    axis: The mapped axis of devices, if any.
    augment: (key, images) -> images, fresh in every step.
    sample_pixels: (key, shape) -> the noise to start from.
  """
  if keep not in KEEP:
    raise ValueError(f'keep is {keep!r}, must be one of {KEEP}.')
  factors = factors.checked()
  map_tasks = inner_loop.task_mapper(task_map)
  share = parallel.even_share(capacity, num_tasks, 'capacity')
  tx = optax.adam(learning_rate, b1=adam_b1, b2=adam_b2)
  shape = (batch_size, *image_shape)

  def init(key: PRNGKey, teacher: Network) -> State:
    del key
    outputs = generators.check_classes(teacher, jax.ShapeDtypeStruct(shape, jnp.float32), task.num_classes)
    generators.check_batch_norm(factors, teacher, outputs)
    return State(step=jnp.int32(0), buffer=replay.create(share, image_shape, task.num_classes, num_tasks))

  def invert(state: State, inputs, teacher: Network, student: Network | None):
    """One task: (pixels [B, H, W, C], labels [B], key) -> images, the teacher's labels, metrics."""
    pixels, labels, key = inputs
    mean, std = (jnp.asarray(of, pixels.dtype) for of in (teacher.mean, teacher.std))
    images_of = lambda pixels: pixels * std + mean
    now = factors
    if factors.active('adversarial'):
      now = factors._replace(adversarial=factors.adversarial * (state.step >= adversarial_after))

    def loss_fn(pixels, step_key):
      seen = augment(step_key, images_of(pixels))
      outputs = teacher(seen)
      found = objective.terms(
          now, outputs, seen, task.labels_from(outputs.logits, labels), teacher=teacher, student=student,
          adversary=adversary, pixels=pixels, reduce=task.reduce)
      loss, metrics = objective.total(found, now)
      return loss, inner_loop.StepOutput((pixels, task.predicted(outputs.logits)), (), metrics)

    found = inner_loop.minimize(
        key, loss_fn, pixels, tx.init(pixels), tx=tx, num_steps=num_steps, keep=keep,
        project=lambda pixels: jnp.clip(pixels, -mean / std, (1 - mean) / std))
    kept, labels = found.kept
    images = images_of(kept if keep == 'best' else found.variables)
    return jnp.clip(images, 0, 1), labels, found.metrics  # Noise is kept as it is if no step was better.

  def synthesize(
      state: State, key: PRNGKey, teacher: Network, student: Network | None
  ) -> tuple[State, Metrics]:
    key_pixels, key_labels, key_steps = (
        parallel.task_keys(each, num_tasks, axis) for each in jax.random.split(key, 3))
    pixels = jax.vmap(lambda k: sample_pixels(k, shape))(key_pixels)
    labels = jax.vmap(lambda k: task.sample_labels(k, batch_size, state.buffer.histogram))(key_labels)
    images, labels, metrics = inner_loop.map_tasks(
        map_tasks, lambda inputs: invert(state, inputs, teacher, student), (pixels, labels, key_steps))
    metrics = parallel.pmean(jax.tree.map(inner_loop.mean_over_tasks, metrics), axis)
    return State(state.step + 1, replay.add(state.buffer, images, labels, axis)), metrics

  def sample(state: State, key: PRNGKey) -> Batch:
    return replay.sample(key, state.buffer, sample_batch_size, axis)

  return Synthesizer(init, synthesize, sample)
