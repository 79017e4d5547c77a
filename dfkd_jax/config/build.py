"""From a config to the parts of a run; each error names the value and what is allowed."""

import inspect
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dfkd_jax import augment, models, parallel, paths, report, synth, tasks, weights
from dfkd_jax.config.build_optimizer import optimizer as optimizer
from dfkd_jax.config.build_optimizer import schedule as schedule
from dfkd_jax.messages import check_choice
from dfkd_jax.models.network import Network
from dfkd_jax.synth import objective, schedules
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import PRNGKey
from dfkd_jax.weights import embeddings

TEACHERS = pathlib.Path(__file__).resolve().parents[1] / 'assets' / 'teachers'
LABELS = ('uniform', 'stratified', 'balanced')
GENERATOR_SCHEDULES = ('constant', 'cosine')  # Of one that lasts, over the run.
DTYPES = ('float32', 'bfloat16')
_GENERATORS = {'generator': models.Generator, 'spatial_generator': models.SpatialGenerator}
# What a config says in a section of its own, and a method takes as one argument.
_SECTIONS = {'adversary': objective.Adversary, 'adversarial': schedules.ramp}
Config = ml_collections.ConfigDict


def task(config: Config) -> tasks.Task:
  """What the teacher was trained for."""
  labels = check_choice(config.labels, LABELS, 'labels')
  return tasks.classification(
      config.dataset.num_classes, balanced=labels == 'balanced', stratified=labels == 'stratified')


def network(config: Config, which: str, key: PRNGKey) -> Network:
  """The 'teacher' or the 'student' with fresh variables."""
  return models.create_network(
      module(config, which), key, tuple(config.dataset.image_shape), **_preprocessing(config[which]))


def teacher(config: Config) -> Network:
  """The teacher with its weights."""
  source(config, 'teacher')
  return pretrained_network(config, 'teacher')


def judge(config: Config) -> Network | None:
  """The network that looks at the images without having a part in them, with its weights; None if none is named."""
  return pretrained_network(config, 'judge') if source(config, 'judge') else None


def source(config: Config, which: str) -> str | None:
  """What the weights of the 'teacher' or the 'judge' are called; None where there is no judge."""
  found, name = config[which].source, config[which].name
  if which == 'teacher' and found is None:
    raise ValueError(
        'teacher.source is None, must be a file of weights (.safetensors, .pth, .h5, ...), a folder, hf:OWNER/REPO or '
        'embedded:NAME; configs/teacher_*.py train one.')
  if which == 'judge' and found is not None and name is None:
    raise ValueError(f'judge.name is None, must name the model of judge.source, {found!r}.')
  if which == 'judge' and found is None and name is not None:
    raise ValueError(f'judge.source is None, must name the weights of judge.name, {name!r}.')
  return found


def pretrained_network(config: Config, which: str) -> Network:
  """The network of a section with the weights that its `source` names."""
  section = config[which]
  path, found = weights_path(section.source, f'{which}.source'), module(config, which)
  try:
    variables = weights.load(path, found, _input_shape(config, section))
  except OSError as error:
    raise ValueError(f'{which}.source is {section.source!r}, which cannot be read: {error.strerror}.') from error
  except ValueError as error:
    raise ValueError(f'{which}.source is {section.source!r}: {error}') from error
  bound = models.bind(found, variables, **_preprocessing(section))
  try:
    weights.check_network(
        bound, tuple(config.dataset.image_shape), weights.read_probe(path),
        moments=which != 'teacher' or not config.preflight.fallback)
  except ValueError as error:
    raise ValueError(f'{which}.source is {section.source!r}: {error}') from None
  return bound


def card(network: Network, source: str | None, which: str = 'teacher') -> weights.Card:
  """What a network is, and the SHA-256 of its weights; a source of None: they are from no file."""
  return weights.describe(network, source, weights_path(source, f'{which}.source') if source else None)


def weights_path(source: str, field: str = 'teacher.source') -> pathlib.Path:
  """The file or folder that a field of the config names."""
  if source.startswith('embedded:'):
    names = tuple(sorted(path.stem for path in TEACHERS.glob('*.safetensors')))
    name = check_choice(source.removeprefix('embedded:'), names, f'embedded teacher of {field},')
    return TEACHERS / f'{name}.safetensors'
  if not source.startswith('hf:'):
    paths.expand_path(source.partition('#')[0], field)
  try:
    return weights.resolve(source)
  except ValueError as error:
    raise ValueError(f'{field} is {error}') from None


def check_hub(source: str, field: str) -> None:
  """Raises ValueError if a source of the hub is not spelt as one; without asking the hub."""
  try:
    weights.check_hub_source(source)
  except ValueError as error:
    raise ValueError(f'{field} is {error}') from None


def _preprocessing(section: Config) -> dict:
  """What turns images in [0, 1] into what a network was trained on."""
  return dict(mean=section.mean, std=section.std, bgr=section.bgr, resize=section.resize)


def _input_shape(config: Config, section: Config) -> tuple[int, int, int]:
  """[H, W, C] of what the module itself is given."""
  height, width, channels = config.dataset.image_shape
  return (*(section.resize or (height, width)), channels)


def model(config: Config, which: str):
  """The module that a name stands for, without options."""
  if config[which].name is None:
    raise ValueError(f'{which}.name is None, must be one of {", ".join(models.names())}.')
  return models.create(config[which].name, config.dataset.num_classes)


def module(config: Config, which: str):
  """The 'teacher', 'student' or 'judge' without variables, made sure to take the images of the data set."""
  section, options = config[which], plain(config[which].options)
  bare = model(config, which)  # An unknown name is no matter of options.
  images = jax.ShapeDtypeStruct((1, *_input_shape(config, section)), jnp.float32)
  try:
    found = models.create(section.name, config.dataset.num_classes, **options, **_computed(config, bare))
    jax.eval_shape(found.init, jax.random.key(0), images)
  except Exception as error:  # Whatever a value of another type, or a width of 0, leads to.
    raise ValueError(
        f'{which}.options is {options}, with which model {section.name!r} takes no images '
        f'{images.shape[1:]}: {error}') from error
  return found


def _computed(config: Config, bare) -> dict:
  """How a module computes, as far as the config speaks of all: its type, and what it keeps for the backward pass."""
  found = {}
  if config.compute_dtype is not None:
    found['dtype'] = jnp.dtype(check_choice(config.compute_dtype, DTYPES, 'compute_dtype'))
  if config.remat and hasattr(bare, 'remat'):  # Small networks have no such switch, nor need it.
    found['remat'] = True
  return found


def augmentation(section: Config) -> Callable:
  """An augmentation by its name and numbers."""
  options = plain(section)
  return augment.create(options.pop('name'), **options)


def synthesizer(
    config: Config, num_devices: int, factors: objective.Factors | None = None
) -> Callable[[str | None], Synthesizer]:
  """The method, waiting for the name of the mapped axis.

  A config speaks of all devices together: tasks, batches and capacity are shared out here, so that
  a run is the same on any number of devices that divides its tasks.

  Args:
    config: Its sections `method` and `generator` and what they stand on.
    num_devices: Over which tasks are spread.
    factors: Of the terms; None: those of the config.
  """
  numbers = plain(config.method)
  name = numbers.pop('name', None)
  taken = method_takes(name)
  local_tasks = local_tasks_of(config, num_devices)
  if 'num_tasks' in numbers:
    numbers['num_tasks'] = local_tasks
  share = share_of_batch(config) * local_tasks
  for of_all in ('capacity', 'bank_size'):
    if of_all in numbers:
      numbers[of_all] = share_of(config, of_all) * local_tasks
  if check_choice(numbers.pop('generator_schedule', 'constant'), GENERATOR_SCHEDULES, 'generator schedule') == 'cosine':
    section = config.distill
    steps = section.rounds * section.calls_per_round * config.method.num_steps
    numbers['generator_lr'] = optax.cosine_decay_schedule(numbers['generator_lr'], steps)
  if 'latent_dim' in numbers:
    numbers['latent_dim'] = latent_dim(config)
  if 'embeddings' in numbers:
    numbers['embeddings'] = embeddings.load(numbers['embeddings'])
  for section, make in _SECTIONS.items():
    if section in numbers:
      numbers[section] = _made(section, make, numbers[section])
  at_hand = dict(
      generator=generator(config), image_shape=tuple(config.dataset.image_shape), task=task(config),
      factors=factors or objective.Factors(**config.factors.to_dict()), augment=augmentation(config.augment.synthesis),
      sample_batch_size=share)
  at_hand = {key: value for key, value in at_hand.items() if key in taken}
  return lambda axis: synth.create(name, **at_hand, **numbers, axis=axis)


def method_takes(name: str | None) -> tuple[str, ...]:
  """Names of what a method may be given."""
  if name is None:
    raise ValueError(f'method.name is None, must be one of {", ".join(synth.names())}.')
  return synth.parameters(name)


def share_of_batch(config: Config) -> int:
  """A task's share of the student's batch."""
  return parallel.even_share(config.distill.batch_size, tasks_of(config), 'distill.batch_size')


def share_of(config: Config, name: str) -> int:
  """A task's share of a number of the method, 'capacity' or 'bank_size', that is of all."""
  number, least = config.method[name], (config.method.get('batch_size') or 1) * tasks_of(config)
  if name == 'capacity' and number < least:
    raise ValueError(f'method.capacity is {number}, must be at least {least}, the images of one call.')
  return parallel.even_share(number, tasks_of(config), f'method.{name}')


def _made(section: str, make: Callable, numbers: dict):
  """What a section of the method's config stands for."""
  if not isinstance(numbers, dict):
    raise ValueError(f'method.{section} is {numbers!r}, must be a section of the config.')
  for name in numbers:
    check_choice(name, tuple(inspect.signature(make).parameters), f'field of method.{section}')
  return make(**numbers)


def tasks_of(config: Config) -> int:
  """Inversions in one round, on all devices together."""
  return config.method.get('num_tasks') or 1


def local_tasks_of(config: Config, num_devices: int) -> int:
  """Inversions in one round on each device."""
  return parallel.even_share(tasks_of(config), num_devices, 'method.num_tasks')


def generator(config: Config):
  """The generator, by the name of its class in lower case with underscores."""
  kind = _GENERATORS[check_choice(config.generator.name, tuple(_GENERATORS), 'generator')]
  height, width, channels = config.dataset.image_shape
  shape = dict(channels=channels) if kind is models.SpatialGenerator else dict(image_shape=(height, width, channels))
  options = plain(config.generator.options)
  try:
    return kind(**shape, **options, **_computed(config, kind()))
  except TypeError as error:
    raise ValueError(f'generator.options is {options}: {error}.') from error


def latent_dim(config: Config) -> int | tuple[int, int, int]:
  """Z, or (h, w, Z) of a generator whose latents have the shape of an image."""
  made, number = generator(config), config.method.latent_dim
  return made.latent_shape(tuple(config.dataset.image_shape), number) if hasattr(made, 'latent_shape') else number


def mesh(config: Config) -> jax.sharding.Mesh:
  """The devices of the run: as many as asked for, else as its tasks (in training: its batches) can be spread over."""
  if config.num_devices is not None:
    return parallel.make_mesh(config.num_devices)
  what, number = _spread(config)
  total, processes = jax.device_count(), jax.process_count()
  if processes > 1 and number % total:
    raise ValueError(f'{what} is {number}, must be a multiple of {total}, the devices of all {processes} processes.')
  return parallel.make_mesh(max(count for count in range(1, total + 1) if number % count == 0))


def tell_unused_devices(config: Config, used: int) -> None:
  """Says so where devices are idle that nobody asked to leave idle."""
  if config.num_devices is None and used < jax.device_count():
    (what, number), at_hand = _spread(config), jax.device_count()
    report.note(
        f'{used} of {at_hand} devices are used, since {what} is {number}: a multiple of {at_hand} uses all.')


def _spread(config: Config) -> tuple[str, int]:
  """What is shared out to devices, and how many of it there are."""
  if config.job == 'distill':
    return 'method.num_tasks', tasks_of(config)
  return 'train.batch_size', config.train.batch_size


def plain(section: Config) -> dict:
  """A section as a dict, without the placeholders that were left open."""
  return {key: value for key, value in section.to_dict().items() if value is not None}
