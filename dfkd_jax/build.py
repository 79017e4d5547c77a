"""From a config to the parts of a run; each error names the value and what is allowed."""

import pathlib
from collections.abc import Callable

import jax
import ml_collections
import optax

from dfkd_jax import augment, distill, models, parallel, synth, tasks
from dfkd_jax.models import pretrained
from dfkd_jax.models.network import Network
from dfkd_jax.synth import objective
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import PRNGKey

TEACHERS = pathlib.Path(__file__).resolve().parent / 'assets' / 'teachers'
LABELS = ('uniform', 'stratified', 'balanced')
_SCHEDULES = ('cosine_by_round', 'cosine_by_step', 'steps', 'constant')

Config = ml_collections.ConfigDict


def task(config: Config) -> tasks.Task:
  """What the teacher was trained for."""
  labels = synth.known(config.labels, LABELS, 'labels')
  return tasks.classification(
      config.dataset.num_classes, balanced=labels == 'balanced', stratified=labels == 'stratified')


def network(config: Config, which: str, key: PRNGKey) -> Network:
  """The 'teacher' or the 'student' with fresh variables."""
  section = config[which]
  return models.create_network(
      _module(section, config, which), key, tuple(config.dataset.image_shape), mean=section.mean, std=section.std)


def teacher(config: Config) -> Network:
  """The teacher with its weights."""
  section, shape = config.teacher, tuple(config.dataset.image_shape)
  if section.source is None:
    raise ValueError(
        'teacher.source is None, must be a file of weights (.safetensors, .pth, .th) or embedded:NAME; '
        'configs/teacher_*.py train one.')
  module = _module(section, config, 'teacher')
  variables = pretrained.load(weights_path(section.source), module, shape)
  return models.bind(module, variables, mean=section.mean, std=section.std)


def weights_path(source: str) -> pathlib.Path:
  """The file that `teacher.source` names."""
  if source.startswith('embedded:'):
    names = tuple(sorted(path.stem for path in TEACHERS.glob('*.safetensors')))
    return TEACHERS / f"{synth.known(source.removeprefix('embedded:'), names, 'embedded teacher')}.safetensors"
  path = pathlib.Path(source).expanduser()
  if not path.is_file():
    raise ValueError(f'teacher.source is {source!r}: there is no such file.')
  return path


def _module(section: Config, config: Config, which: str):
  if section.name is None:
    raise ValueError(f'{which}.name is None, must be one of {", ".join(models.names())}.')
  options = _plain(section.options)
  try:
    return models.create(section.name, config.dataset.num_classes, **options)
  except TypeError as error:
    raise ValueError(f'{which}.options is {options}, which model {section.name!r} does not take: {error}.') from error


def augmentation(section: Config) -> Callable:
  """An augmentation by its name and numbers."""
  options = _plain(section)
  return augment.create(options.pop('name'), **options)


def synthesizer(config: Config, num_devices: int) -> Callable[[str | None], Synthesizer]:
  """The method, waiting for the name of the mapped axis."""
  numbers = _plain(config.method)
  name = numbers.pop('name')
  if name is None:
    raise ValueError(f'method.name is None, must be one of {", ".join(synth.names())}.')
  image_shape = tuple(config.dataset.image_shape)
  num_tasks = numbers.get('num_tasks', 1)
  share = parallel.even_share(config.distill.batch_size, num_devices * num_tasks, 'distill.batch_size') * num_tasks
  if 'capacity' in numbers:
    numbers['capacity'] = parallel.even_share(numbers['capacity'], num_devices, 'method.capacity')
  at_hand = dict(
      generator=generator(config), image_shape=image_shape, task=task(config),
      factors=objective.Factors(**config.factors.to_dict()), augment=augmentation(config.augment.synthesis),
      sample_batch_size=share)
  taken = synth.parameters(name)
  at_hand = {key: value for key, value in at_hand.items() if key in taken}
  return lambda axis: synth.create(name, **at_hand, **numbers, axis=axis)


def generator(config: Config):
  """The generator, by the name of its class in lower case."""
  kinds = {'generator': models.Generator}
  kind = kinds[synth.known(config.generator.name, tuple(kinds), 'generator')]
  options = _plain(config.generator.options)
  try:
    return kind(image_shape=tuple(config.dataset.image_shape), **options)
  except TypeError as error:
    raise ValueError(f'generator.options is {options}: {error}.') from error


def optimizer(config: Config, rounds: int, steps_per_round: int) -> optax.GradientTransformation:
  """The student's optimizer; weight decay is coupled, on all parameters, as published.

  Args:
    config: Its section `optimizer` is read.
    rounds: Over which the learning rate falls: epochs, or rounds that distil.
    steps_per_round: Steps in each.
  """
  section = config.optimizer
  rate = schedule(section, rounds, steps_per_round)
  name = synth.known(section.name, ('sgd', 'adam'), 'optimizer')
  decay = optax.add_decayed_weights(section.weight_decay) if section.weight_decay else optax.identity()
  if name == 'adam':
    return optax.chain(decay, optax.adam(rate))
  return optax.chain(decay, optax.sgd(rate, momentum=section.momentum or None, nesterov=section.nesterov))


def schedule(section: Config, rounds: int, steps_per_round: int) -> optax.Schedule:
  """Learning rate by step."""
  name = synth.known(section.schedule, _SCHEDULES, 'schedule')
  rate, warmup, total = section.learning_rate, section.warmup_steps, rounds * steps_per_round
  if name == 'constant':
    return optax.constant_schedule(rate)
  if name == 'steps':
    return optax.piecewise_constant_schedule(
        rate, {epoch * steps_per_round: section.gamma for epoch in section.milestones})
  if name == 'cosine_by_round':
    return distill.cosine_by_round(rate, rounds, steps_per_round, section.end_value)
  return optax.warmup_cosine_decay_schedule(
      rate if not warmup else 0.0, rate, warmup, max(total, warmup + 1), section.end_value)


def _plain(section: Config) -> dict:
  """A section as a dict, without the placeholders that were left open."""
  return {key: value for key, value in section.to_dict().items() if value is not None}


def mesh(config: Config) -> jax.sharding.Mesh:
  """The devices of the run."""
  return parallel.make_mesh(config.num_devices)
