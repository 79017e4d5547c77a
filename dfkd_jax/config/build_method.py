"""Makes the method, its generator and augmentations from resolved settings."""

from collections.abc import Callable
from typing import Any

import optax
from flax import linen as nn

from dfkd_jax import augment, models, parallel, synth
from dfkd_jax.config.build import set_compute
from dfkd_jax.config.records import GeneratorSettings, MethodSettings
from dfkd_jax.messages import FieldError, nearest
from dfkd_jax.synth import objective, schedules
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Array, PRNGKey
from dfkd_jax.weights import embeddings

_GENERATORS = {'generator': models.Generator, 'spatial_generator': models.SpatialGenerator}
# A section of the config that a method takes as one argument.
_SECTIONS = {'adversary': objective.Adversary, 'adversarial': schedules.ramp}
SHARED = {'capacity', 'bank_size'}  # numbers that all tasks share


def synthesizer(
    method: MethodSettings, num_devices: int, factors: objective.Factors | None = None,
) -> Callable[[str | None], Synthesizer]:
  """Returns a function from the mapped axis to the method.

  Settings count tasks, batches and buffers over all devices. Each device gets its share here, so a
  run is the same on any number of devices that divides its tasks.

  Args:
    method: Its settings.
    num_devices: Devices that share the tasks.
    factors: Factors of the terms; None: those of the settings.

  Raises:
    FieldError: A number is not allowed; also raised by the returned function.
  """
  taken = parameters(method)
  for name in method.numbers:
    if name not in taken and name != 'generator_schedule':
      raise FieldError(f'method.{name}', f'{name!r} is no argument of {method.name}.'
                       f'{nearest(name, taken)} It takes {", ".join(taken)}.')
  local_tasks = parallel.even_share(method.num_tasks, num_devices, 'method.num_tasks')
  arguments = _arguments(method)
  for name in SHARED & arguments.keys():
    arguments[name] = task_share(method, name) * local_tasks
  if 'num_tasks' in arguments:
    arguments['num_tasks'] = local_tasks
  if 'generator' in taken:
    arguments['generator'] = generator(method.generator)
  offered = {
      'image_shape': method.generator.image_shape, 'task': method.task,
      'factors': factors or method.factors, 'augment': augmentation(method.augment),
      'sample_batch_size': batch_share(method) * local_tasks}
  arguments |= {name: value for name, value in offered.items() if name in taken}

  def make(axis: str | None) -> Synthesizer:
    try:
      return synth.create(method.name, **arguments, **({'axis': axis} if 'axis' in taken else {}))
    except FieldError as error:
      is_number = error.field.partition('.')[0] in method.numbers
      raise FieldError(f'method.{error.field}' if is_number else error.field, str(error)) from None

  return make


def parameters(method: MethodSettings) -> tuple[str, ...]:
  """Returns the arguments that the method takes.

  Raises:
    FieldError: There is no such method.
  """
  if method.name is None:
    raise FieldError(
        'method.name', f'method.name is None, must be one of {", ".join(synth.names())}.')
  try:
    return synth.parameters(method.name)
  except ValueError as error:
    raise FieldError('method.name', str(error)) from None


def _arguments(method: MethodSettings) -> dict[str, Any]:
  """Returns the numbers as the constructor takes them."""
  numbers = dict(method.numbers)
  if numbers.pop('generator_schedule', None) == 'cosine':
    numbers['generator_lr'] = optax.cosine_decay_schedule(
        numbers['generator_lr'], method.total_calls * numbers['num_steps'])
  if 'latent_dim' in numbers:
    numbers['latent_dim'] = latent_dim(method)
  if 'embeddings' in numbers:
    numbers['embeddings'] = load_embeddings(numbers['embeddings'])
  for name in _SECTIONS.keys() & numbers.keys():
    try:
      numbers[name] = _SECTIONS[name](**numbers[name])
    except (TypeError, ValueError) as error:
      raise FieldError(f'method.{name}', f'method.{name} is {numbers[name]}: {error}') from error
  return numbers


def load_embeddings(path: str) -> Array:
  """Reads the embeddings of classes, [K, E]."""
  try:
    return embeddings.load(path)
  except ValueError as error:
    raise FieldError('method.embeddings', str(error)) from None


def task_share(method: MethodSettings, name: str) -> int:
  """Returns a task's share of a number in SHARED."""
  number, least = method.numbers[name], method.images_per_call
  if name == 'capacity' and number < least:
    raise FieldError('method.capacity', f'method.capacity is {number}, must be at least {least}, '
                     'the images of one call.')
  return parallel.even_share(number, method.num_tasks, f'method.{name}')


def batch_share(method: MethodSettings) -> int:
  """Returns a task's share of the student's batch."""
  return parallel.even_share(method.sample_batch_size, method.num_tasks, 'distill.batch_size')


def augmentation(options: dict[str, Any]) -> Callable[[PRNGKey, Array], Array]:
  """Makes an augmentation from its name and arguments."""
  return augment.create(**options)


def generator(settings: GeneratorSettings) -> nn.Module:
  """Makes the generator.

  Raises:
    FieldError: It has no such options, or cannot make such images.
  """
  height, width, channels = settings.image_shape
  kind = _GENERATORS[settings.name]
  shape = {'channels': channels} if kind is models.SpatialGenerator else {
      'image_shape': (height, width, channels)}
  try:
    return set_compute(kind(**shape, **settings.options), settings.dtype, settings.remat)
  except (TypeError, ValueError) as error:
    raise FieldError(
        'generator.options', f'generator.options is {settings.options}: {error}') from error


def latent_dim(method: MethodSettings) -> int | tuple[int, int, int]:
  """Returns Z, or (h, w, Z) if latents have the shape of an image."""
  made, size = generator(method.generator), method.numbers.get('latent_dim', 2)
  if not hasattr(made, 'latent_shape'):
    return size
  try:
    return made.latent_shape(method.generator.image_shape, size)
  except ValueError as error:
    raise FieldError('dataset.image_shape', str(error)) from None


def latent_shape(method: MethodSettings, batch_size: int) -> tuple[int, ...]:
  """Returns the shape of a batch of latents, [B, Z] or [B, h, w, Z]."""
  size = latent_dim(method)
  return (batch_size, *((size,) if isinstance(size, int) else size))
