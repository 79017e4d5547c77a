"""A generator that lasts, from which the student learns directly: DAFL, ZSKT, DFQ, DFAD, CuDFKD.

A call takes `num_steps` of Adam on the generator, each on fresh latents, and keeps no image. The
generator, or in part its moving average, also renders the student's batches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from dfkd_jax import parallel
from dfkd_jax.messages import FieldError, check_option
from dfkd_jax.synth import generators, inner_loop, moving_average, objective
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Adversary, Factors
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class GeneratorTraining:
  """How the generator is trained, by Adam whose state lasts, and sampled.

  `adversarial` maps the calls so far to the factor of the adversarial term, such as
  `schedules.ramp(...)`; None: the factor in `factors`, throughout.
  """

  num_steps: int = 1  # of the generator in a call
  generator_lr: optax.ScalarOrSchedule = 1e-3
  adam_b1: float = 0.5
  adam_b2: float = 0.999
  adversarial: optax.Schedule | None = None
  balance_temperature: float = 1.0
  sample_by: str = 'running'  # moments that normalise the student's images: 'running' or 'batch'

  def __post_init__(self):
    check_option('sample_by', self.sample_by, ('running', 'batch'))
    inner_loop.check(self.num_steps)
    if self.balance_temperature <= 0:
      raise FieldError('balance_temperature', f'balance_temperature is '
                       f'{self.balance_temperature}, must be above 0.')


class State(struct.PyTreeNode):
  """The generator in training."""

  step: Array  # [] int32, calls so far
  params: PyTree
  batch_stats: PyTree  # running moments, by which it is sampled
  opt_state: PyTree
  ema: PyTree | None = None  # moving average of {'params', 'batch_stats'}, if there is one

  @property
  def variables(self) -> PyTree:
    """Variables of the generator."""
    return {'params': self.params, 'batch_stats': self.batch_stats}


def synthesizer(
    *, generator: nn.Module, image_shape: tuple[int, int, int], task: Task, factors: Factors,
    adversary: Adversary = Adversary(masked=False), latents: Latents = Latents(),
    training: GeneratorTraining = GeneratorTraining(), layout: Layout = Layout(),
    average: MovingAverage = MovingAverage()) -> Synthesizer:
  """Makes a synthesizer with a generator that lasts.

  Args:
    generator: Maps latents [B, Z] (or [B, h, w, Z]) to images [B, H, W, C] in (0, 1), with
      running moments in `batch_stats`.
    image_shape: [H, W, C] of its images.
    task: Task of the teacher; targets are the classes that it sees.
    layout: Batch sizes, tasks and devices. Gradients are averaged over tasks in each step.
    average: Moving average of the generator after each of its steps, if any.
  """
  if latents.carry_latents:
    raise FieldError('carry_latents', 'carry_latents is True, must be False: each step has fresh '
                     'latents.')
  factors = factors.checked()
  share = layout.share(layout.sample_batch_size, 'sample_batch_size')
  num_averaged = average.num_images(layout)
  latent_shape = latents.batch_shape(layout.batch_size)
  tx = optax.chain(  # on gradients averaged over devices
      optax.stateless(lambda grads, _: parallel.pmean(grads, layout.axis)),
      optax.adam(training.generator_lr, b1=training.adam_b1, b2=training.adam_b2))

  def init(key, teacher):
    variables = generators.init(generator, key, latent_shape)
    params = variables['params']
    outputs = generators.check(
        generator, params, latent_shape, image_shape, teacher, task.num_classes, factors)
    if factors.active('activation') and outputs.features is None:
      raise FieldError('factors.activation', 'The teacher sows no features: the factor activation '
                       'must be 0.')
    state = State(step=jnp.int32(0), params=params, batch_stats=variables.get('batch_stats', {}),
                  opt_state=tx.init(params))
    return state.replace(ema=average.init(state.variables))

  def synthesize(state, key, teacher, student):
    scheduled = factors
    if training.adversarial is not None:
      scheduled = factors._replace(adversarial=training.adversarial(state.step))

    def task_loss(params, batch_stats, latents_of_task):
      images, moved = generator.apply(
          {'params': params, 'batch_stats': batch_stats}, latents_of_task, train=True,
          mutable=['batch_stats'])
      outputs = teacher(images)
      terms = objective.terms(
          scheduled, outputs, images, task.labels_from(outputs.logits), teacher=teacher,
          student=student, adversary=adversary, reduce=task.reduce,
          balance_temperature=training.balance_temperature)
      return *objective.total(terms, scheduled), moved.get('batch_stats', {})

    def step(state, key_step):
      def loss_fn(params, key_latents):
        results = layout.map(
            lambda z: task_loss(params, state.batch_stats, z),
            latents.draw(key_latents, layout.batch_size, layout))
        loss, metrics, moved = layout.mean_of_tasks(results)
        return loss, inner_loop.StepOutput((), moved, metrics)

      minimum = inner_loop.minimize(
          key_step, loss_fn, state.params, state.opt_state, tx=tx, num_steps=1)
      moved, metrics = parallel.pmean((minimum.aux, minimum.metrics), layout.axis)
      state = state.replace(
          params=minimum.variables, opt_state=minimum.opt_state, batch_stats=moved)
      state = state.replace(ema=average.update(state.ema, state.variables, is_new=False))
      return state, {name: values[0] for name, values in metrics.items()}

    state, metrics = jax.lax.scan(step, state, jax.random.split(key, training.num_steps))
    return state.replace(step=state.step + 1), metrics

  def render(variables, key, number):
    """Renders images [M, number, H, W, C] from fresh latents."""

    def render_task(latents_of_task):
      return generator.apply(variables, latents_of_task, train=training.sample_by == 'batch',
                             mutable=['batch_stats'])[0]

    return layout.map(render_task, latents.draw(key, number, layout))

  def sample(state, key):
    if num_averaged:
      key, key_averaged = jax.random.split(key)
    images = render(state.variables, key, share - num_averaged)
    unknown = jnp.full(images.shape[:2], -1, jnp.int32).reshape(-1)
    batch = Batch(images.reshape(-1, *image_shape), unknown, unknown)
    if not num_averaged:
      return batch
    return moving_average.append_images(batch, render(state.ema, key_averaged, num_averaged))

  return Synthesizer(
      init, synthesize, sample, generator=lambda state: state.variables,
      with_generator=lambda state, variables: state.replace(
          params=variables['params'], batch_stats=variables.get('batch_stats', state.batch_stats)))
