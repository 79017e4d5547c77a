"""Makes networks, data sets, optimizers and the mesh of devices from resolved settings."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dfkd_jax import data, distill, models, parallel, report, weights
from dfkd_jax.config.problems import wrong_value
from dfkd_jax.config.records import Dataset, NetworkSettings, Optimizer, Settings
from dfkd_jax.messages import FieldError, check_choice
from dfkd_jax.models.network import Network
from dfkd_jax.paths import expand_path
from dfkd_jax.tasks import Task
from dfkd_jax.types import PRNGKey

TEACHERS = pathlib.Path(__file__).resolve().parents[1] / 'assets' / 'teachers'


def module(network: NetworkSettings) -> nn.Module:
  """Makes the module of a network; raises a FieldError if it does not take options or images."""
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
    outputs, _ = jax.eval_shape(made.init_with_output, jax.random.key(0), images)
  except Exception as error:  # options of another type or size may raise anything
    raise FieldError(f'{role}.options', f'{role}.options is {options}: model {name!r} cannot take '
                     f'images {images.shape[1:]}: {error}') from error
  check_kind(outputs.ndim, network.task, f'{role}.name', name)
  return made


def check_kind(logits_ndim: int, task: str, field: str, value: Any) -> None:
  """Raises a FieldError if logits with so many axes are of the other kind of task."""
  kinds = {2: ('classification', 'each image'), 4: ('segmentation', 'each pixel')}
  kind, each = kinds.get(logits_ndim, ('', 'neither image nor pixel'))
  if kind != task:
    raise FieldError(field, f'{field} is {value!r}, which predicts a class for {each}, but task is '
                     f'{task!r}.' + f' --config.task={kind} would fit.' * bool(kind))


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
  """Makes a network with weights; raises a FieldError if they do not fit, or fail their check."""
  field = f'{network.role}.source'
  path, made = weights_path(network.source, field), module(network)
  try:
    variables = weights.load(path, made, network.input_shape)
    loaded = models.bind(made, variables, **network.preprocessing)
    weights.check_network(loaded, network.image_shape, weights.read_probe(path),
                          moments=network.needs_moments)
    return loaded
  except (OSError, ValueError) as error:
    reason = f'which cannot be read: {error.strerror}.' if isinstance(error, OSError) else error
    raise FieldError(field, f'{field} is {network.source!r}: {reason}') from error


def check_source(network: NetworkSettings) -> None:
  """Checks that a network's weights are named and, if they are local, there; reads none."""
  field = f'{network.role}.source'
  if network.source is None:
    raise wrong_value(field, None, 'weights: a file (.safetensors, .pth, .h5, ...), a folder, '
                      'hf:OWNER/REPO or embedded:NAME. configs/teacher_*.py train a teacher.')
  weights_path(network.source, field, download=False)


def weights_path(
    source: str, field: str = 'teacher.source', download: bool = True) -> pathlib.Path | None:
  """Returns the file or folder of weights; of the hub, downloads it or only checks its name."""
  if source.startswith('embedded:'):
    names = sorted(path.stem for path in TEACHERS.glob('*.safetensors'))
    name = check_choice(source.removeprefix('embedded:'), names, f'embedded teacher of {field},')
    return TEACHERS / f'{name}.safetensors'
  if not source.startswith('hf:'):
    expand_path(source.partition('#')[0], field)
  try:
    if source.startswith('hf:') and not download:
      return weights.check_hub_source(source)
    return weights.resolve(source)
  except ValueError as error:
    raise FieldError(field, f'{field} is {error}') from None


def make_card(network: Network, source: str | None, role: str = 'teacher') -> weights.Card:
  """Describes a network and its weights; a source of None: the weights are from no file."""
  path = weights_path(source, f'{role}.source') if source else None
  return weights.describe(network, source, path)


def load_split(dataset: Dataset, task: Task, split: str,
               shard: tuple[int, int] = (0, 1)) -> data.Dataset:
  """Loads a split of a data set, or a shard; raises a ValueError for other images or labels."""
  loaded = data.load(dataset.name, split, dataset.data_dir, image_shape=dataset.image_shape,
                     crop=dataset.crop, resize=dataset.resize, shard=shard,
                     masks=task.label_axes > 0)
  if loaded.labels.ndim != 1 + task.label_axes:
    kind, needed = ('masks', 'classes') if loaded.labels.ndim == 3 else ('classes', 'masks')
    raise wrong_value('dataset.name', dataset.name, f'a data set of {needed}: this one has '
                      f'{kind}, which are of the other --config.task.')
  if loaded.labels.ndim == 3:
    _check_masks(dataset, split, loaded.labels)
  elif len(loaded.class_names) != dataset.num_classes:
    raise wrong_value('dataset.num_classes', dataset.num_classes,
                      f'{len(loaded.class_names)}, as {dataset.name!r} has.')
  return loaded


def _check_masks(dataset: Dataset, split: str, masks: np.ndarray) -> None:
  """Raises a FieldError unless labels are below `num_classes` or `ignore`, and not all ignored."""
  name, ignore, num_classes = dataset.name, dataset.ignore, dataset.num_classes
  pixels = sum(np.bincount(mask.ravel(), minlength=256) for mask in masks)
  pixels[ignore] = 0
  if not pixels.any():
    raise wrong_value('dataset.ignore', ignore, f'another label: masks of split {split!r} of '
                      f'{name!r} have no other.')
  highest = int(np.flatnonzero(pixels)[-1])
  if highest >= num_classes:
    raise wrong_value(
        'dataset.num_classes', num_classes, f'at least {highest + 1}: masks of {name!r} have label '
        f'{highest} (dataset.ignore is {ignore}).')


def optimizer(section: Optimizer, rounds: int, steps_per_round: int,
              replaced: tuple[str, ...] = ()) -> optax.GradientTransformation:
  """Makes the optimizer; weight decay is coupled, on all parameters, as published.

  Layers that are `replaced` within the run have moments and a count of their own in Adam's state.
  """
  rate = schedule(section, rounds, steps_per_round)
  if section.name == 'adam':
    adam = optax.scale_by_adam()
    if replaced:
      adam = optax.partition(
          {distill.REPLACED: adam, 'others': adam},
          lambda params: {name: distill.REPLACED if name in replaced else 'others'
                          for name in params})
    return optax.chain(optax.add_decayed_weights(section.weight_decay),
                       optax.chain(adam, optax.scale_by_learning_rate(rate)))
  return distill.coupled_sgd(rate, section.momentum, section.weight_decay, section.nesterov)


def schedule(section: Optimizer, rounds: int, steps_per_round: int) -> optax.Schedule:
  """Makes the learning rate by step; `rounds` are epochs, or rounds with student steps."""
  rate, warmup = section.learning_rate, section.warmup_steps
  if section.schedule == 'constant':
    return optax.constant_schedule(rate)
  if section.schedule == 'steps':
    return optax.piecewise_constant_schedule(
        rate, {epoch * steps_per_round: section.gamma for epoch in section.milestones})
  if section.schedule == 'cosine_by_round':
    return distill.cosine_by_round(rate, rounds, steps_per_round, section.end_value)
  return optax.warmup_cosine_decay_schedule(
      0.0 if warmup else rate, rate, warmup, max(rounds * steps_per_round, warmup + 1),
      section.end_value)


def make_mesh(settings: Settings) -> jax.sharding.Mesh:
  """Makes the mesh: `num_devices`, or as many as can share the tasks or batches evenly."""
  (field, number), num_devices = shared_number(settings), settings.num_devices
  if num_devices is None and jax.process_count() == 1:
    num_devices = max(n for n in range(1, jax.device_count() + 1) if number % n == 0)
  mesh = parallel.make_mesh(num_devices)  # of several processes: over all devices
  parallel.even_share(number, mesh.size, field)
  return mesh


def note_idle_devices(settings: Settings, used: int) -> None:
  """Prints how to use all devices, if some are idle by default."""
  devices, (field, number) = jax.device_count(), shared_number(settings)
  if settings.num_devices is None and used < devices:
    report.note(f'{used} of {devices} devices are used, since {field} is {number}: '
                f'a multiple of {devices} uses all.')


def shared_number(settings: Settings) -> tuple[str, int]:
  """Returns the field and the number that devices share."""
  if settings.job == 'distill':
    return 'method.num_tasks', settings.method.num_tasks
  return 'train.batch_size', settings.train.batch_size
