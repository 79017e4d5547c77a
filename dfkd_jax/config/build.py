"""Makes networks, data sets and the mesh of devices from resolved settings."""

import pathlib

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax import data, models, parallel, report, weights
from dfkd_jax.config.problems import wrong_value
from dfkd_jax.config.records import Dataset, NetworkSettings, Settings
from dfkd_jax.messages import FieldError, check_choice
from dfkd_jax.models.network import Network
from dfkd_jax.paths import expand_path
from dfkd_jax.types import PRNGKey

TEACHERS = pathlib.Path(__file__).resolve().parents[1] / 'assets' / 'teachers'


def module(network: NetworkSettings) -> nn.Module:
  """Makes the module of a network.

  Raises:
    FieldError: There is no such model, or with these options it does not take the images.
  """
  role, name, options = network.role, network.name, network.options
  if name is None:
    raise wrong_value(f'{role}.name', None, f'one of {", ".join(models.names())}.')
  try:
    models.create(name, network.num_classes)
  except ValueError as error:
    raise FieldError(f'{role}.name', str(error)) from None
  images = jax.ShapeDtypeStruct((1, *network.input_shape), jnp.float32)
  try:
    made = set_compute(models.create(name, network.num_classes, **options), network)
    jax.eval_shape(made.init, jax.random.key(0), images)
  except Exception as error:  # options of another type or size may raise anything
    raise FieldError(f'{role}.options', f'{role}.options is {options}: model {name!r} cannot take '
                     f'images {images.shape[1:]}: {error}') from error
  return made


def set_compute(made: nn.Module, settings: NetworkSettings) -> nn.Module:
  """Sets the dtype of a module's computation, and recomputation if the module has the switch."""
  changes = {} if settings.dtype is None else {'dtype': jnp.dtype(settings.dtype)}
  if settings.remat and hasattr(made, 'remat'):
    changes['remat'] = True
  return made.clone(**changes)


def fresh_network(network: NetworkSettings, key: PRNGKey) -> Network:
  """Makes a network with random variables."""
  return models.create_network(module(network), key, network.image_shape, **network.preprocessing)


def trained_network(network: NetworkSettings) -> Network:
  """Makes a network with the weights of its source.

  Raises:
    FieldError: The weights cannot be read, do not fit, or fail their check.
  """
  field, source = f'{network.role}.source', network.source
  path, made = weights_path(source, field), module(network)
  try:
    variables = weights.load(path, made, network.input_shape)
    loaded = models.bind(made, variables, **network.preprocessing)
    weights.check_network(loaded, network.image_shape, weights.read_probe(path),
                  moments=network.needs_moments)
  except OSError as error:
    message = f'{field} is {source!r}, which cannot be read: {error.strerror}.'
    raise FieldError(field, message) from error
  except ValueError as error:
    raise FieldError(field, f'{field} is {source!r}: {error}') from error
  return loaded


def check_source(network: NetworkSettings) -> None:
  """Checks that a network's weights are named and, if they are local, there; reads none."""
  field, source = f'{network.role}.source', network.source
  if source is None and (network.role == 'teacher' or network.name is not None):
    raise wrong_value(field, None, 'weights: a file (.safetensors, .pth, .h5, ...), a folder, '
                      'hf:OWNER/REPO or embedded:NAME. configs/teacher_*.py train a teacher.')
  if source is not None and source.startswith('hf:'):
    try:
      weights.check_hub_source(source)
    except ValueError as error:
      raise FieldError(field, f'{field} is {error}') from None
  elif source is not None:
    weights_path(source, field)


def weights_path(source: str, field: str = 'teacher.source') -> pathlib.Path:
  """Returns the file or folder of weights; downloads from the hub.

  Raises:
    ValueError: There is none.
  """
  if source.startswith('embedded:'):
    names = sorted(path.stem for path in TEACHERS.glob('*.safetensors'))
    name = check_choice(source.removeprefix('embedded:'), names, f'embedded teacher of {field},')
    return TEACHERS / f'{name}.safetensors'
  if not source.startswith('hf:'):
    expand_path(source.partition('#')[0], field)
  try:
    return weights.resolve(source)
  except ValueError as error:
    raise FieldError(field, f'{field} is {error}') from None


def make_card(network: Network, source: str | None, role: str = 'teacher') -> weights.Card:
  """Describes a network and its weights; a source of None: the weights are from no file."""
  path = weights_path(source, f'{role}.source') if source else None
  return weights.describe(network, source, path)


def load_split(dataset: Dataset, split: str, shard: tuple[int, int] = (0, 1)) -> data.Dataset:
  """Loads a split of a data set, or a shard of it.

  Raises:
    ValueError: It is not there, or has other images or classes than the settings say.
  """
  loaded = data.load(dataset.name, split, dataset.data_dir, image_shape=dataset.image_shape,
                     crop=dataset.crop, shard=shard)
  if len(loaded.class_names) != dataset.num_classes:
    raise wrong_value('dataset.num_classes', dataset.num_classes,
                      f'{len(loaded.class_names)}, as {dataset.name!r} has.')
  return loaded


def make_mesh(settings: Settings) -> jax.sharding.Mesh:
  """Makes the mesh: `num_devices`, or as many as the tasks or batches can be spread over.

  Raises:
    FieldError: There are not so many devices, or not all processes would have a share.
  """
  if settings.num_devices is not None:
    return parallel.make_mesh(settings.num_devices)
  field, number = shared_number(settings)
  devices, processes = jax.device_count(), jax.process_count()
  if processes > 1 and number % devices:
    raise wrong_value(
        field, number, f'a multiple of {devices}, the devices of all {processes} processes.')
  return parallel.make_mesh(max(n for n in range(1, devices + 1) if number % n == 0))


def note_idle_devices(settings: Settings, used: int) -> None:
  """Prints how to use all devices, if some are idle without being asked to."""
  devices, (field, number) = jax.device_count(), shared_number(settings)
  if settings.num_devices is None and used < devices:
    report.note(f'{used} of {devices} devices are used, since {field} is {number}: '
                f'a multiple of {devices} uses all.')


def shared_number(settings: Settings) -> tuple[str, int]:
  """Returns the field and the number that devices share."""
  if settings.job == 'distill':
    return 'method.num_tasks', settings.method.num_tasks
  return 'train.batch_size', settings.train.batch_size
