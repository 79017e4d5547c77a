"""Makes the method and its generator from resolved settings."""

from collections.abc import Callable
from typing import Any

import optax
from flax import linen as nn

from dfkd_jax import augment, models, parallel, synth
from dfkd_jax.config.build import set_compute
from dfkd_jax.config.problems import wrong_value
from dfkd_jax.config.records import MethodSettings, NetworkSettings
from dfkd_jax.messages import FieldError, nearest
from dfkd_jax.synth import latents, objective, schedules
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.weights import read_embeddings

_SCHEDULE = ('generator_schedule', 'generator_milestones', 'generator_gamma')
SHARED = {'capacity', 'bank_size'}  # numbers that all tasks share
_MAKERS = {  # of an argument from the section or file of its name
    'adversary': lambda section: objective.Adversary(**section),
    'adversarial': lambda section: schedules.ramp(**section), 'embeddings': read_embeddings}


def synthesizer(
    method: MethodSettings, num_devices: int, factors: objective.Factors | None = None
) -> Callable[[str | None], Synthesizer]:
  """Returns a function from the mapped axis to the method; both raise FieldErrors.

  Settings count tasks, batches and buffers over all devices. Each device gets its share here, so a
  run is the same on any number of devices that divides its tasks. `factors` replace the settings'.
  """
  taken, numbers = parameters(method), method.numbers
  for name in numbers:
    if name not in taken and name not in _SCHEDULE:
      raise FieldError(f'method.{name}', f'{name!r} is no argument of {method.name}.'
                       f'{nearest(name, taken)} It takes {", ".join(taken)}.')
  local_tasks = parallel.even_share(method.num_tasks, num_devices, 'method.num_tasks')
  arguments = _arguments(method)
  arguments |= {name: task_share(method, name) * local_tasks for name in SHARED & numbers.keys()}
  offered = {
      'image_shape': method.generator.image_shape, 'task': method.task,
      'factors': factors or method.factors, 'augment': augment.create(**method.augment),
      'num_tasks': local_tasks, 'sample_batch_size': batch_share(method) * local_tasks}
  if 'generator' in taken:
    offered['generator'] = generator(method.generator)
  arguments |= {name: value for name, value in offered.items() if name in taken}

  def make(axis):
    try:
      return synth.create(method.name, **arguments, **({'axis': axis} if 'axis' in taken else {}))
    except FieldError as error:
      prefix = 'method.' if error.field.partition('.')[0] in numbers else ''
      raise FieldError(prefix + error.field, str(error)) from None

  return make


def parameters(method: MethodSettings) -> tuple[str, ...]:
  """Returns the arguments that the method takes; raises a FieldError if there is no such method."""
  if method.name not in synth.names():
    raise wrong_value('method.name', method.name, f'one of {", ".join(synth.names())}.'
                      f'{nearest(str(method.name), synth.names())}')
  return synth.parameters(method.name)


def _arguments(method: MethodSettings) -> dict[str, Any]:
  """Returns the numbers as the constructor takes them."""
  numbers = {name: value for name, value in method.numbers.items() if name not in _SCHEDULE}
  if 'generator_lr' in numbers:
    numbers['generator_lr'] = generator_rate(method)
  if 'latent_dim' in numbers:
    numbers['latent_dim'] = latent_dim(method)
  for name in _MAKERS.keys() & numbers.keys():
    try:
      numbers[name] = _MAKERS[name](numbers[name])
    except (TypeError, ValueError) as error:
      raise FieldError(f'method.{name}', f'method.{name}: {error}') from error
  return numbers


def generator_rate(method: MethodSettings) -> float | optax.Schedule:
  """Returns the generator's learning rate, constant or by step; raises a FieldError."""
  numbers, rate = method.numbers, method.numbers['generator_lr']
  schedule, milestones, gamma = map(numbers.get, _SCHEDULE)
  is_stepped = milestones is not None and gamma is not None
  if (schedule == 'steps') != is_stepped or (milestones is None) != (gamma is None):
    raise wrong_value('method.generator_schedule', schedule, "'steps' exactly if "
                      'generator_milestones and generator_gamma are set.')
  if schedule == 'cosine':
    return optax.cosine_decay_schedule(rate, method.distill.total_calls * numbers['num_steps'])
  if schedule == 'steps':
    steps_per_round = method.distill.calls_per_round * numbers['num_steps']
    return optax.piecewise_constant_schedule(
        rate, {index * steps_per_round: gamma for index in milestones})
  return rate


def task_share(method: MethodSettings, name: str) -> int:
  """Returns a task's share of a number in SHARED."""
  number, least = method.numbers[name], method.images_per_call
  if name == 'capacity' and number < least:
    raise wrong_value('method.capacity', number, f'at least {least}, the images of one call.')
  return parallel.even_share(number, method.num_tasks, f'method.{name}')


def batch_share(method: MethodSettings) -> int:
  """Returns a task's share of the student's batch."""
  return parallel.even_share(method.distill.batch_size, method.num_tasks, 'distill.batch_size')


def generator(settings: NetworkSettings) -> nn.Module:
  """Makes the generator; raises a FieldError if its options do not suit it or the images."""
  shape, options = settings.image_shape, settings.options
  try:
    is_spatial = settings.name == 'spatial_generator'
    size = dict(channels=shape[-1], size=shape[:2]) if is_spatial else dict(image_shape=shape)
    return set_compute(models.GENERATORS[settings.name](**size, **options), settings)
  except (TypeError, ValueError) as error:
    raise FieldError('generator.options', f'generator.options is {options}: {error}') from error


def latent_dim(method: MethodSettings) -> int | tuple[int, ...]:
  """Returns Z, or the shape of a latent: (h, w, Z) of a map, or (K, 16) of K shapes."""
  made, size = generator(method.generator), method.numbers.get('latent_dim', 2)
  if not hasattr(made, 'latent_shape'):
    return size
  try:
    return made.latent_shape(method.generator.image_shape, size)
  except ValueError as error:
    raise FieldError('generator.image_shape', str(error)) from None


def latent_shape(method: MethodSettings, batch_size: int) -> tuple[int, ...]:
  """Returns the shape of a batch of latents, [B, Z] or [B, h, w, Z]."""
  return latents.Latents(latent_dim(method)).batch_shape(batch_size)
