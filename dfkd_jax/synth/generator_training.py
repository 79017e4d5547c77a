"""A generator that lasts, from which the student learns directly: DAFL, ZSKT, DFQ, DFAD and CuDFKD share it.

A call takes `num_steps` of Adam on the generator, each on fresh latents, and no
image is kept: the student's batches are rendered from fresh latents too, by the
generator or, in part, by its moving average.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from dfkd_jax import parallel, tasks
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generators, inner_loop, moving_average, objective
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey, PyTree

SAMPLE_BY = ('running', 'batch')


class State(struct.PyTreeNode):
  """The generator in training."""

  step: Array  # [] int32, calls so far
  params: PyTree
  batch_stats: PyTree  # running moments, by which it is sampled
  opt_state: PyTree
  ema: PyTree | None = None  # its moving average, {'params', 'batch_stats'}, if there is one

  @property
  def variables(self) -> PyTree:
    """Of the generator."""
    return {'params': self.params, 'batch_stats': self.batch_stats}


def synthesizer(
    *,
    generator: nn.Module,
    image_shape: tuple[int, int, int],
    task: tasks.Task,
    factors: objective.Factors,
    adversary: objective.Adversary = objective.Adversary(masked=False),
    adversarial: optax.Schedule | None = None,
    balance_temperature: float = 1.0,
    num_steps: int = 1,
    latent_dim: int | tuple[int, ...] = 256,
    generator_lr: optax.ScalarOrSchedule = 1e-3,
    adam_b1: float = 0.5,
    adam_b2: float = 0.999,
    sample_by: str = 'running',
    batch_size: int = 256,
    sample_batch_size: int = 256,
    num_tasks: int = 1,
    task_map: str = 'auto',
    axis: str | None = None,
    sample_latents: Callable[[PRNGKey, tuple[int, ...]], Array] = jax.random.normal,
    ema_decay: float | None = None,
    ema_share: float = 0.5,
) -> Synthesizer:
  """Makes a synthesizer with such a generator.

  Args:
    generator: Maps latents [B, Z] (or [B, h, w, Z]) to images [B, H, W, C] in (0, 1), with running moments in
      `batch_stats`.
    image_shape: [H, W, C] of its images.
    task: What the teacher was trained for; targets are the classes that it sees.
    factors: Of the terms.
    adversary: The measure of the adversarial term.
    adversarial: Calls so far -> factor of the adversarial term; None: that of `factors`, throughout.
    balance_temperature: T of the balance term, above 0.
    num_steps: Steps of the generator in a call.
    latent_dim: Z, or the shape of one latent.
    generator_lr: Adam's, whose state lasts; a number, or a schedule by its steps.
    adam_b1: Decay of Adam's first moment.
    adam_b2: Decay of Adam's second moment.
    sample_by: The student's images are normalised by 'running' moments, or by those of their 'batch'.
    batch_size: B, latents of one task in one step.
    sample_batch_size: Images for one step of the student, on this device.
    num_tasks: M, batches on this device whose gradients are averaged in each step.
    task_map: How tasks are mapped, see `optimize.task_mapper`.
    axis: The mapped axis of devices, if any.
    sample_latents: (key, shape) -> latents.
    ema_decay: Of a moving average of the generator (after each of its steps), from which the student learns too, see
      `generative.num_averaged`; None: there is none.
    ema_share: Of the student's images, those that the moving average makes.
  """
  if sample_by not in SAMPLE_BY:
    raise ValueError(f'sample_by is {sample_by!r}, must be one of {SAMPLE_BY}.')
  if num_steps < 1:
    raise ValueError(f'num_steps is {num_steps}, must be at least 1.')
  if balance_temperature <= 0:
    raise ValueError(f'balance_temperature is {balance_temperature}, must be above 0.')
  factors = factors.checked()
  latent_shape = (latent_dim,) if isinstance(latent_dim, int) else tuple(latent_dim)
  map_tasks = inner_loop.task_mapper(task_map)
  share = parallel.even_share(sample_batch_size, num_tasks, 'sample_batch_size')
  num_averaged = moving_average.num_averaged(ema_decay, ema_share, share)
  # The gradients that Adam sees are those of all devices.
  tx = optax.chain(
      optax.stateless(lambda grads, _: parallel.pmean(grads, axis)), optax.adam(generator_lr, b1=adam_b1, b2=adam_b2))

  def init(key: PRNGKey, teacher: Network) -> State:
    variables = generators.variables(generator, key, (batch_size, *latent_shape))
    params = variables['params']
    outputs = generators.check_shapes(
        generator, params, (batch_size, *latent_shape), image_shape, teacher, task.num_classes)
    generators.check_batch_norm(factors, teacher, outputs)
    if factors.active('activation') and outputs.features is None:
      raise ValueError('The teacher sows no features: the factor activation must be 0.')
    state = State(
        step=jnp.int32(0), params=params, batch_stats=variables.get('batch_stats', {}), opt_state=tx.init(params))
    # A copy, since states are donated.
    return state.replace(ema=jax.tree.map(jnp.copy, state.variables)) if num_averaged else state

  def draw_latents(key: PRNGKey, number: int) -> Array:
    keys = parallel.task_keys(key, num_tasks, axis)
    return jax.vmap(lambda k: sample_latents(k, (number, *latent_shape)))(keys)

  def synthesize(
      state: State, key: PRNGKey, teacher: Network, student: Network | None
  ) -> tuple[State, Metrics]:
    now = factors if adversarial is None else factors._replace(adversarial=adversarial(state.step))

    def of_task(params, batch_stats, latents):
      images, moved = generator.apply(
          {'params': params, 'batch_stats': batch_stats}, latents, train=True, mutable=['batch_stats'])
      outputs = teacher(images)
      found = objective.terms(
          now, outputs, images, task.labels_from(outputs.logits), teacher=teacher, student=student,
          adversary=adversary, balance_temperature=balance_temperature, reduce=task.reduce)
      return *objective.total(found, now), moved.get('batch_stats', {})

    def step(state: State, step_key: PRNGKey):

      def loss_fn(params, latents_key):
        latents = draw_latents(latents_key, batch_size)
        found = inner_loop.map_tasks(map_tasks, lambda of_one: of_task(params, state.batch_stats, of_one), latents)
        loss, metrics, moved = jax.tree.map(inner_loop.mean_over_tasks, found)
        return loss, inner_loop.StepOutput((), moved, metrics)

      found = inner_loop.minimize(step_key, loss_fn, state.params, state.opt_state, tx=tx, num_steps=1)
      moved, metrics = parallel.pmean((found.aux, found.metrics), axis)
      state = state.replace(params=found.variables, opt_state=found.opt_state, batch_stats=moved)
      if num_averaged:
        state = state.replace(ema=optax.incremental_update(state.variables, state.ema, 1 - ema_decay))
      return state, {name: values[0] for name, values in metrics.items()}

    state, metrics = jax.lax.scan(step, state, jax.random.split(key, num_steps))
    return state.replace(step=state.step + 1), metrics

  def rendered(variables: PyTree, key: PRNGKey, number: int) -> Array:
    """Images [M, number, H, W, C] from fresh latents."""

    def images_of(latents):
      if sample_by == 'running':
        return generator.apply(variables, latents, train=False)
      return generator.apply(variables, latents, train=True, mutable=['batch_stats'])[0]

    return inner_loop.map_tasks(map_tasks, images_of, draw_latents(key, number))

  def sample(state: State, key: PRNGKey) -> Batch:
    if num_averaged:
      key, key_averaged = jax.random.split(key)
    images = rendered(state.variables, key, share - num_averaged)
    nowhere = jnp.full(images.shape[:2], -1, jnp.int32).reshape(-1)
    batch = Batch(images.reshape(-1, *image_shape), nowhere, nowhere)
    return moving_average.append_images(batch, rendered(state.ema, key_averaged, num_averaged)) if num_averaged else batch

  return Synthesizer(init, synthesize, sample)
