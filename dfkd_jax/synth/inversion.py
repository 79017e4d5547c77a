"""Inversion of a teacher: from copies of a meta-generator, a few steps give batches of images.

`MetaGenerator` has the parts that FastDFKD, SSD-KD, CMI and NAYER share. Each method puts them
together in its own file.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import lax

from dfkd_jax import parallel
from dfkd_jax.messages import FieldError
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generators, inner_loop, moving_average, replay
from dfkd_jax.synth.inner_loop import InnerLoop, Minimum, StepOutput
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Factors, History
from dfkd_jax.synth.outer_loop import OuterLoop
from dfkd_jax.synth.replay import ReplayBuffer
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, Batch, Metrics, Moments, PRNGKey, PyTree


class State(struct.PyTreeNode):
  """A generator that goes on from call to call, and the images so far."""

  latents: PyTree | None = parallel.sharded()  # [M, B, Z], only if they are carried
  step: Array  # [] int32, calls so far
  meta_params: PyTree  # of the generator
  meta_opt_state: PyTree
  past: dict[str, Moments]  # of the teacher's inputs, averaged over the calls so far
  buffer: ReplayBuffer
  ema: PyTree | None = None  # moving average of the generator after its inner steps


class CallInputs(NamedTuple):
  """Inputs of the inversions of one call."""

  params: PyTree  # of the generator
  latents: PyTree  # [M, B, Z]
  labels: Array  # [M, B], the requested classes
  keys: PRNGKey  # [M]
  history: History


class Inversions(NamedTuple):
  """Results of the inversions of one call."""

  initial_params: PyTree  # of the generator, before the inner steps
  # Averaged over tasks and devices:
  meta_grads: PyTree
  moments: dict[str, Moments]  # of the last inner step
  metrics: Metrics  # each [num_steps]
  params: PyTree  # of the generators after their inner steps
  # By task:
  kept: dict[str, Array]  # [M, B, ...], from each task's best (or last) step
  latents: PyTree  # [M, B, Z], after the inner steps


@dataclasses.dataclass(frozen=True)
class MetaGenerator:
  """A generator that goes on from call to call; `fast_dfkd` documents the attributes."""

  generator: nn.Module
  image_shape: tuple[int, int, int]
  task: Task
  latents: Latents
  inner: InnerLoop
  outer: OuterLoop
  layout: Layout
  average: MovingAverage
  capacity: int
  moments_momentum: float

  def __post_init__(self):  # A wrong number is refused when the method is made.
    self.layout.share(self.capacity, 'capacity')
    self.average.num_images(self.layout, self.outer.is_new_every_call)
    if not 0 <= self.moments_momentum < 1:
      raise FieldError('moments_momentum', f'moments_momentum is {self.moments_momentum}, must be '
                       'in [0, 1).')

  @property
  def optimizer(self) -> optax.GradientTransformation:
    """The optimizer of the outer loop."""
    return self.outer.optimizer(self.inner)

  @property
  def latent_shape(self) -> tuple[int, ...]:
    """Shape of the latents of one task, [B, ...]."""
    return self.latents.batch_shape(self.layout.batch_size)

  def init(
      self, key: PRNGKey, teacher: Network, factors: Factors, *, prioritised: bool = False
  ) -> State:
    """Draws a generator and makes an empty buffer; checks that they suit teacher and factors."""
    key_params, key_latents = jax.random.split(key)
    params = generators.init(self.generator, key_params, self.latent_shape)['params']
    outputs = generators.check(self.generator, params, self.latent_shape, self.image_shape,
                               teacher, self.task.num_classes, factors)
    buffer = replay.create(
        self.layout.share(self.capacity, 'capacity'), self.image_shape, self.task.num_classes,
        self.layout.num_tasks, prioritised=prioritised)
    return State(
        latents=self.latents.start(key_latents, self.layout), step=jnp.int32(0),
        meta_params=params, meta_opt_state=self.optimizer.init(params),
        past=jax.tree.map(jnp.zeros_like, outputs.moments), buffer=buffer,
        ema=self.average.init(params))

  def draw_inputs(self, state: State, key: PRNGKey) -> CallInputs:
    """Draws latents and labels for a call; renews the generator where it is due."""
    key_latents, key_labels, key_steps, key_renew = jax.random.split(key, 4)
    params = self.outer.renew(
        key_renew, state.meta_params, state.step, self.generator, self.latent_shape)
    momentum = jnp.where(state.step == 0, 0, self.moments_momentum)  # The first call has no past.
    return CallInputs(
        params, self.latents.of_call(key_latents, state.latents, state.step, self.layout),
        self.draw_labels(key_labels, self.layout.batch_size, state),
        self.layout.keys(key_steps), History(state.past, momentum))

  def draw_labels(self, key: PRNGKey, number: int, state: State) -> Array:
    """Draws the classes that are requested, [M, number] int32."""
    return self.layout.draw(
        key, lambda k: self.task.sample_labels(k, number, state.buffer.histogram))

  def render(self, params: PyTree, latents: PyTree, labels: Array) -> Array:
    """Renders the images [B, H, W, C] of one task."""
    return generators.render(self.generator, params, self.latents.decode(latents, labels))

  def invert(
      self, inputs: CallInputs,
      loss_fn: Callable[[PyTree, PRNGKey, Array], tuple[Array, StepOutput]]) -> Inversions:
    """Runs the inner loops of all tasks, each from a copy of the generator.

    Args:
      inputs: From `draw_inputs`.
      loss_fn: (variables {'params', 'latents'}, key, labels [B]) -> (loss [], StepOutput); its
        `aux` are moments.
    """

    def invert_task(task_inputs):
      latents, labels, key = task_inputs
      tx, variables = self.inner.optimizer(), {'params': inputs.params, 'latents': latents}
      minimum = inner_loop.minimize(
          key, lambda variables, k: loss_fn(variables, k, labels), variables, tx.init(variables),
          tx=tx, num_steps=self.inner.num_steps, keep=self.inner.keep)
      return self.results(inputs, minimum), minimum.kept, minimum.variables['latents']

    averaged, kept, latents = self.layout.map(
        invert_task, (inputs.latents, inputs.labels, inputs.keys))
    return Inversions(inputs.params, *self.layout.mean(averaged), kept, latents)

  def results(self, inputs: CallInputs, minimum: Minimum) -> tuple[Any, ...]:
    """Returns the results of one inner loop that are averaged over tasks; see `Inversions`."""
    return (self.outer.gradient(inputs.params, minimum), minimum.aux, minimum.metrics,
            minimum.variables['params'])

  def update(self, state: State, inversions: Inversions) -> State:
    """Takes one step of the outer loop."""
    step, tx, opt_state = state.step, self.optimizer, state.meta_opt_state
    params = inversions.initial_params
    if self.latents.restart_every is not None:
      opt_state = lax.cond(self.latents.is_restart(step), lambda: tx.init(params),
                           lambda: state.meta_opt_state)
    params, opt_state = self.outer.update(tx, inversions.meta_grads, opt_state, params)
    past = optax.incremental_update(
        inversions.moments, state.past, jnp.where(step == 0, 1, 1 - self.moments_momentum))
    return state.replace(
        step=step + 1, meta_params=params, meta_opt_state=opt_state, past=past,
        latents=inversions.latents if self.latents.carry_latents else None,
        ema=self.average.update(state.ema, inversions.params, self.outer.is_new(step)))

  def sample(self, state: State, key: PRNGKey, draw: Callable[..., Batch] = replay.sample) -> Batch:
    """Draws a batch for the student from the buffer, a share of it from the moving average.

    Args:
      state: Its buffer is not empty.
      key: PRNG key.
      draw: (key, buffer, number, axis) -> Batch.
    """
    layout, number = self.layout, self.average.num_images(self.layout)
    if not number:
      return draw(key, state.buffer, layout.sample_batch_size, layout.axis)
    key, key_latents, key_labels = jax.random.split(key, 3)
    inputs = (self.latents.draw(key_latents, number, layout),
              self.draw_labels(key_labels, number, state))
    images = layout.map(lambda latents: self.render(state.ema, *latents), inputs)
    batch = draw(key, state.buffer, layout.sample_batch_size - layout.num_tasks * number,
                 layout.axis)
    return moving_average.append_images(batch, images)

  def with_fresh_latents(self, state: State, key: PRNGKey) -> tuple[State, PRNGKey]:
    """Replaces carried latents by new ones, for images that no student has seen."""
    key_latents, key = jax.random.split(key)
    return state.replace(latents=self.latents.start(key_latents, self.layout)), key


def generator(state: State) -> PyTree:
  """Returns the variables of the meta-generator."""
  return {'params': state.meta_params}


def with_generator(state: State, variables: PyTree) -> State:
  """Returns the state with these variables in its meta-generator."""
  return state.replace(meta_params=variables['params'])
