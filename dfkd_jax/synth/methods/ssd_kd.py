"""SSD-KD: FastDFKD with a small buffer that is kept balanced, and drawn from by priority.

Three additions to FastDFKD. Inversion: the one_hot term of an image counts by how
rare its class is in the buffer (diversity) and how unsure the teacher is of it
(difficulty). Buffer: a ring of a tenth of the usual images. Distillation: images
are drawn in proportion to their loss when last seen, and importance weights take
back a part of that bias.

References:
  Liu et al., Small Scale Data-Free Knowledge Distillation, CVPR 2024,
  https://arxiv.org/abs/2406.07876. Neither its full text nor code was at hand when this was written: the two
  factors of the modulation and the recursion of priorities follow a recollection of its equations that agrees with
  its abstract, its figure and a public summary. What is known from nowhere is a keyword here, named in `ssd_kd`, but
  for three things: batch_norm is FastDFKD's norm, which its factors were found with, where the paper is recalled to
  square it; the oldest images are the first to go; and priorities are taken to the power of 1.
  Schaul et al., Prioritized Experience Replay, 2016, https://arxiv.org/abs/1511.05952.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dfkd_jax import parallel, tasks
from dfkd_jax.losses import curriculum
from dfkd_jax.models.network import Network
from dfkd_jax.synth import inversion as inversions
from dfkd_jax.synth import replay
from dfkd_jax.synth.synthesizer import Synthesizer, passes_on
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey

State = inversions.State
ASK = ('random', 'argmax')
COUNTED = ('seen', 'asked')
DRAWS = ('priority', 'uniform')
NEW_PRIORITY = ('max', 'modulation', 'one')
NORMALISE = ('none', 'max')


@passes_on(inversions.loop, without=('ask', 'modulate', 'companion_terms'))
def ssd_kd(
    *,
    image_shape: tuple[int, int, int],
    task: tasks.Task,
    diversity: bool = True,
    difficulty: bool = True,
    gamma: float = 2.0,
    normalised_diversity: bool = False,
    stop_modulation: bool = False,
    counted: str = 'seen',
    label_source: str | None = None,
    draw: str = 'priority',
    beta: float = 0.5,
    epsilon: float = 1e-6,
    clip_weights: float | None = 10.0,
    normalise_weights: str = 'none',
    new_priority: str = 'max',
    adversarial_after: int = 19,
    capacity: int = 5_000,
    num_tasks: int = 1,
    axis: str | None = None,
    **numbers: Any,
) -> Synthesizer:
  """Makes the SSD-KD synthesizer; where the paper's numbers are unknown, defaults are FastDFKD's.

  Args:
    image_shape: [H, W, C].
    task: What the teacher was trained for. Where it is dense, both factors are per pixel.
    diversity: Whether one_hot counts by 1 - h[c] / |B|, with c an image's class and h the buffer's histogram of it.
    difficulty: Whether it counts by (1 - p)^gamma, with p the probability of the target.
    gamma: Exponent of the difficulty, unknown from the paper; 2 is the focal loss's.
    normalised_diversity: Whether to take `losses.curriculum.diversity`'s variant, which is ours.
    stop_modulation: Whether the modulation is a constant; unknown from the paper; by default the gradient flows
      through the difficulty, as in the focal loss.
    counted: The class c that the diversity counts: 'seen' by the teacher, or 'asked' for; unknown from the paper.
    label_source: Targets are classes at 'random', as FastDFKD's, or the teacher's 'argmax'; unknown from the paper.
      None: 'random' where the task has classes to ask for.
    draw: By 'priority' or 'uniform' (then every sample's loss counts 1).
    beta: Exponent of the importance weights, unknown from the paper; below 1, else the priorities never settle.
    epsilon: Added to every priority, so that no image is out of reach.
    clip_weights: Largest importance weight, ours; None: no bound.
    normalise_weights: 'none', or 'max' to divide a batch's weights by their largest, as in the second reference.
    new_priority: Of an image until it is drawn: the stripe's 'max', that times its 'modulation', or 'one' on the
      scale of the student's loss; unknown from the paper.
    adversarial_after: Calls before the adversarial term sets in, see `fast_dfkd`. Its mask is FastDFKD's as well.
    capacity: Images that the buffer holds on this device; 5,000 for CIFAR.
    num_tasks: M, inversions on this device in one call. Each has a stripe of the buffer, within which priorities count.
    axis: The mapped axis of devices, if any.
    **numbers: Of `meta.loop`.
  """
  if label_source is None:
    label_source = 'random' if task.asks else 'argmax'
  for name, value, known in (('label_source', label_source, ASK), ('counted', counted, COUNTED), ('draw', draw, DRAWS),
                             ('new_priority', new_priority, NEW_PRIORITY),
                             ('normalise_weights', normalise_weights, NORMALISE)):
    if value not in known:
      raise ValueError(f'{name} is {value!r}, must be one of {known}.')
  if label_source == 'random' and not task.asks:
    raise ValueError("label_source is 'random', must be 'argmax' or None: the task has no classes to ask for.")
  if counted == 'asked' and label_source != 'random':
    raise ValueError("counted is 'asked', must be 'seen' where no class is asked for.")
  if not gamma >= 0:
    raise ValueError(f'gamma is {gamma}, must be at least 0.')
  if not 0 <= beta < 1:
    raise ValueError(f'beta is {beta}, must be in [0, 1): at 1 and above the priorities never settle.')
  if epsilon <= 0:
    raise ValueError(f'epsilon is {epsilon}, must be above 0.')
  if clip_weights is not None and clip_weights <= 0:
    raise ValueError(f'clip_weights is {clip_weights}, must be above 0, or None for no bound.')
  if new_priority == 'modulation' and not (diversity or difficulty):
    raise ValueError("new_priority is 'modulation', must be 'max' or 'one' where there is no modulation.")

  def modulate(buffer: replay.ReplayBuffer, logits: Array, targets: Array) -> Array:
    """Phi [...]: diversity of the class that is counted, times difficulty of the target."""
    found = jnp.ones_like(logits[..., 0])
    if diversity:
      classes = targets if counted == 'asked' else jnp.argmax(logits, -1)
      found *= curriculum.diversity(classes, buffer.histogram, normalised=normalised_diversity)
    if difficulty:
      found *= curriculum.difficulty(logits, targets, gamma)
    return jax.lax.stop_gradient(found) if stop_modulation else found

  loop = inversions.loop(
      image_shape=image_shape, task=task, adversarial_after=adversarial_after, num_tasks=num_tasks, axis=axis,
      ask=label_source == 'random', modulate=modulate if diversity or difficulty else None, companion_terms=(),
      **numbers)
  share = parallel.even_share(capacity, num_tasks, 'capacity')
  prioritised = draw == 'priority'

  def init(key: PRNGKey, teacher: Network) -> State:
    return loop.init(key, teacher, replay.create(
        share, image_shape, task.num_classes, num_tasks, prioritised=prioritised))

  def synthesize(
      state: State, key: PRNGKey, teacher: Network, student: Network | None
  ) -> tuple[State, Metrics]:
    state, found = loop.invert(state, key, teacher, student)
    labels, priorities = found.kept['asked' if counted == 'asked' and diversity else 'labels'], None
    if new_priority != 'max':
      priorities = -found.kept['modulation'] if new_priority == 'modulation' else jnp.ones(labels.shape)
    buffer = replay.add(state.buffer, found.kept['images'], labels, axis, priorities)
    return state.replace(buffer=buffer), found.metrics

  def sample(state: State, key: PRNGKey) -> Batch:
    if not prioritised:
      return loop.sample(state, key, lambda k, number: replay.sample(k, state.buffer, number, axis))
    return loop.sample(
        state, key, lambda k, number: replay.sample_by_priority(k, state.buffer, number, epsilon, axis))

  def weigh(state: State, batch: Batch, losses: Array) -> tuple[State, Array]:
    """Of the images just seen the priority becomes w KL, and then w is renewed, (N P)^-beta."""
    if not prioritised:
      return state, jnp.ones_like(losses)
    weights = replay.weights_at(state.buffer, batch.slots)
    buffer = replay.set_priorities(state.buffer, batch.slots, weights * losses)
    renewed = replay.importance_weights(buffer, batch.slots, beta, epsilon)
    if clip_weights is not None:
      renewed = jnp.minimum(renewed, clip_weights)
    buffer = replay.set_weights(buffer, batch.slots, renewed)
    if normalise_weights == 'max':
      weights /= parallel.pmax(weights.max(), axis)
    return state.replace(buffer=buffer), weights

  return Synthesizer(init, synthesize, sample, weigh)
