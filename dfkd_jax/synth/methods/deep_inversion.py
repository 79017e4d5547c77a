"""DeepInversion: images found pixel by pixel, from noise, under the teacher's moments.

Each call starts a batch at noise and follows the gradient in pixels for many steps: the requested
classes (one_hot), the moments of training (batch_norm), smooth images (total_variation, l2),
under a jitter that is one for the whole batch. With an adversary it is Adaptive DeepInversion:
images on which student and teacher differ. Pixels are those after the teacher's normalisation, as
published, so that a step means the same for every channel.

References:
  Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion, CVPR 2020,
  https://arxiv.org/abs/1912.08795, equations 2 to 8, and the published CIFAR scripts for numbers.
  One code base repels the student's moments too (student_batch_norm, factor 0.01), and
  all of them keep the last iterate where they say best.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import augment as augmentations
from dfkd_jax.synth import generators, inner_loop, objective, replay
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.objective import Adversary, Factors
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, PRNGKey


class State(struct.PyTreeNode):
  """The images so far: nothing is learnt from call to call."""

  step: Array  # [] int32, calls so far
  buffer: replay.ReplayBuffer


def deep_inversion(
    *, image_shape: tuple[int, int, int], task: Task,
    factors: Factors = Factors(batch_norm=10.0, one_hot=1.0, adversarial=1.0, total_variation=1e-3),
    adversary: Adversary = Adversary('js', 3.0, False), adversarial_after: int = 0,
    num_steps: int = 1000, learning_rate: float = 0.1, adam_b1: float = 0.5, adam_b2: float = 0.99,
    keep: str = 'best', capacity: int = 51_200, layout: Layout = Layout(),
    augment: Callable[[PRNGKey, Array], Array] = augmentations.roll_and_flip,
    sample_pixels: Callable[[PRNGKey, tuple[int, ...]], Array] = jax.random.normal,
) -> Synthesizer:
  """Makes the DeepInversion synthesizer, by default like the published CIFAR script.

  Args:
    image_shape: [H, W, C].
    task: Task of the teacher.
    factors: Of batch_norm, one_hot, adversarial, student_batch_norm, and of total_variation and
      l2, which apply to the normalised pixels before `augment`.
    adversary: Jensen-Shannon at temperature 3, of all images.
    adversarial_after: Calls before the adversarial term sets in.
    num_steps: Steps of a call, 1,000 in the script, 2,000 in the papers' tables.
    learning_rate: Adam's, in units of the teacher's normalisation; its state is fresh in every
      call.
    adam_b1: Decay of Adam's first moment.
    adam_b2: Decay of Adam's second moment.
    keep: Images of the 'best' step, or the 'last' iterate. No loss has seen that one (the
      published code keeps it); its labels come from the step before.
    capacity: Images in the buffer of this device.
    layout: Batch sizes, tasks and devices.
    augment: (key, images) -> images, fresh in every step.
    sample_pixels: (key, shape) -> the noise to start from.
  """
  factors = factors.checked()
  inner_loop.check(num_steps, keep)
  stripe = layout.share(capacity, 'capacity')
  tx = optax.adam(learning_rate, b1=adam_b1, b2=adam_b2)
  shape = (layout.batch_size, *image_shape)

  def init(key, teacher):
    del key
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    generators.check_teacher(teacher, images, task.num_classes, factors)
    buffer = replay.create(stripe, image_shape, task.num_classes, layout.num_tasks)
    return State(step=jnp.int32(0), buffer=buffer)

  def invert(state, key, teacher, student, factors):
    """Returns images [M, B, H, W, C], the teacher's labels [M, B], and metrics."""
    key_pixels, key_labels, key_steps = jax.random.split(key, 3)
    pixels = layout.draw(key_pixels, lambda k: sample_pixels(k, shape))
    labels = layout.draw(
        key_labels, lambda k: task.sample_labels(k, layout.batch_size, state.buffer.histogram))
    mean, std = (jnp.asarray(numbers, pixels.dtype) for numbers in (teacher.mean, teacher.std))
    factors = factors.late_adversary(state.step, adversarial_after)

    def invert_task(inputs):
      pixels, labels, key_task = inputs

      def loss_fn(pixels, key_step):
        views = augment(key_step, pixels * std + mean)
        outputs = teacher(views)
        terms = objective.terms(
            factors, outputs, views, task.labels_from(outputs.logits, labels), teacher=teacher,
            student=student, adversary=adversary, pixels=pixels, reduce=task.reduce)
        loss, metrics = objective.total(terms, factors)
        kept = pixels, task.predicted(outputs.logits)
        return loss, inner_loop.StepOutput(kept, (), metrics)

      minimum = inner_loop.minimize(
          key_task, loss_fn, pixels, tx.init(pixels), tx=tx, num_steps=num_steps, keep=keep,
          project=lambda pixels: jnp.clip(pixels, -mean / std, (1 - mean) / std))
      best, labels = minimum.kept
      images = (best if keep == 'best' else minimum.variables) * std + mean
      # The noise itself is kept if no step was better.
      return jnp.clip(images, 0, 1), labels, minimum.metrics

    images, labels, metrics = layout.map(
        invert_task, (pixels, labels, layout.keys(key_steps)))
    return images, labels, layout.mean(metrics)

  def synthesize(state, key, teacher, student):
    images, labels, metrics = invert(state, key, teacher, student, factors)
    return State(state.step + 1, replay.add(state.buffer, images, labels, layout.axis)), metrics

  def sample(state, key):
    return replay.sample(key, state.buffer, layout.sample_batch_size, layout.axis)

  def fresh(state, key, teacher, student=None):
    images, labels, _ = invert(state, key, teacher, student, factors.for_student(student))
    return replay.unsaved(images, labels)

  return Synthesizer(init, synthesize, sample, fresh=fresh)
