"""Small frozen records, resolved once from a config; jobs pass these on."""

from collections import namedtuple
from typing import Any, NamedTuple

import ml_collections

from dfkd_jax import tasks
from dfkd_jax.config.fields import RUN_FIELDS
from dfkd_jax.synth.objective import Factors


class RunSettings(NamedTuple):
  """What every run needs, whatever its job."""

  config: dict[str, Any]  # the whole config as JSON; kept in checkpoints and in the summary
  seed: int
  evaluate_every: int  # rounds
  evaluate_batch_size: int
  save_every: int  # rounds between checkpoints
  max_to_keep: int | None  # checkpoints; None keeps all
  keep_best: bool  # whether checkpoints hold the best student too
  minutes: float | None  # budget of each start
  images: int | None  # budget of synthesised images, for the whole run
  reseed: int  # how often a round with non-finite numbers may be repeated with other keys


class InitFrom(NamedTuple):
  """Where a new run takes its first student and generator from; None: drawn at random."""

  student: str | None  # folder of a run, or file of weights
  generator: str | None  # folder of a run


def _record(section: str) -> type:
  """A namedtuple with the fields of a section; config/fields.py documents them."""
  prefix = f'{section}.'
  names = [row.name.removeprefix(prefix) for row in RUN_FIELDS if row.name.startswith(prefix)]
  return namedtuple(f'_{section.title()}', names)


Dataset, Train, Optimizer = _record('dataset'), _record('train'), _record('optimizer')
Preflight, Grid, Distributed = _record('preflight'), _record('grid'), _record('distributed')


class Distill(_record('distill')):
  """The section `distill`."""

  __slots__ = ()

  @property
  def learning_rounds(self) -> int:
    """Rounds with student steps."""
    return self.rounds - self.distill_after

  @property
  def steps_per_call(self) -> int:
    """Student steps after each call of the method."""
    return self.steps_per_round // self.calls_per_round


class NetworkSettings(NamedTuple):
  """How to make the teacher, the student or the judge."""

  role: str  # section of the config
  name: str | None
  options: dict[str, Any]  # arguments of the model
  source: str | None  # weights
  preprocessing: dict[str, Any]  # arguments of `models.bind`: mean, std, bgr, resize
  image_shape: tuple[int, int, int]  # of the data set
  num_classes: int
  dtype: str | None
  remat: bool
  needs_moments: bool  # whether batch-norm moments must be those of a trained network

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """[H, W, C] of the images that reach the module."""
    return (*(self.preprocessing['resize'] or self.image_shape[:2]), self.image_shape[-1])


class GeneratorSettings(NamedTuple):
  """How to make the generator."""

  name: str
  options: dict[str, Any]
  image_shape: tuple[int, int, int]
  dtype: str | None
  remat: bool


class MethodSettings(NamedTuple):
  """How to make the method."""

  name: str | None
  numbers: dict[str, Any]  # arguments of its constructor, over all devices; without those of None
  factors: Factors
  task: tasks.Task
  generator: GeneratorSettings
  augment: dict[str, Any]  # name and arguments of the augmentation
  sample_batch_size: int  # images of a student step
  total_calls: int  # of the whole run

  @property
  def num_tasks(self) -> int:
    """Inversions in a call, on all devices."""
    return self.numbers.get('num_tasks', 1)

  @property
  def images_per_call(self) -> int:
    """Images that a call synthesises, on all devices; 0 if the method has no batch size."""
    return self.num_tasks * self.numbers.get('batch_size', 0)


class Settings(NamedTuple):
  """A resolved config."""

  job: str
  run: RunSettings
  dataset: Dataset
  task: tasks.Task
  teacher: NetworkSettings
  student: NetworkSettings
  judge: NetworkSettings
  method: MethodSettings
  distill: Distill
  train: Train
  optimizer: Optimizer
  augment: dict[str, Any]  # of the student's images: name and arguments
  preflight: Preflight
  grid: Grid
  init_from: InitFrom
  distributed: Distributed
  control: bool
  buffer: str
  device_memory_gb: float | None
  num_devices: int | None
  precision: str | None
  compilation_cache: str | None


def resolve(config: ml_collections.ConfigDict) -> Settings:
  """Returns the records of a config, which must have all fields; does not check their values."""
  values = _as_tuples(config.to_dict())
  dataset, distill = Dataset(**values['dataset']), Distill(**values['distill'])
  shape = {'image_shape': dataset.image_shape, 'dtype': values['compute_dtype'],
           'remat': values['remat']}
  task = tasks.classification(
      dataset.num_classes, balanced=values['labels'] == 'balanced',
      stratified=values['labels'] == 'stratified')

  def network(role: str) -> NetworkSettings:
    section = values[role]
    return NetworkSettings(
        role, section['name'], _without_none(section['options']), section.get('source'),
        {name: section[name] for name in ('mean', 'std', 'bgr', 'resize')},
        num_classes=dataset.num_classes, **shape,
        needs_moments=role != 'teacher' or not values['preflight']['fallback'])

  numbers = _without_none(values['method'])
  generator = values['generator']
  return Settings(
      run=_run_settings(values), dataset=dataset, task=task,
      teacher=network('teacher'), student=network('student'), judge=network('judge'),
      method=MethodSettings(
          numbers.pop('name', None), numbers, Factors(**values['factors']), task,
          GeneratorSettings(generator['name'], _without_none(generator['options']), **shape),
          _without_none(values['augment']['synthesis']), distill.batch_size,
          distill.rounds * distill.calls_per_round),
      distill=distill, train=Train(**values['train']), optimizer=Optimizer(**values['optimizer']),
      augment=_without_none(values['augment']['student']),
      preflight=Preflight(**values['preflight']), grid=Grid(**values['grid']),
      init_from=InitFrom(**values['init_from']), distributed=Distributed(**values['distributed']),
      **{name: values[name] for name in (
          'job', 'control', 'buffer', 'device_memory_gb', 'num_devices', 'precision',
          'compilation_cache')})


def _run_settings(values: dict[str, Any]) -> RunSettings:
  evaluate, checkpoint = values['evaluate'], values['checkpoint']
  return RunSettings(
      config=_as_lists(values), seed=values['seed'], evaluate_every=evaluate['every'],
      evaluate_batch_size=evaluate['batch_size'], save_every=checkpoint['every'],
      max_to_keep=checkpoint['max_to_keep'], keep_best=checkpoint['keep_best'],
      minutes=values['budget']['minutes'], images=values['budget']['images'],
      reseed=values['faults']['reseed'])


def _without_none(section: dict[str, Any]) -> dict[str, Any]:
  """Leaves the arguments of None to their defaults."""
  return {name: value for name, value in section.items() if value is not None}


def _as_tuples(value: Any) -> Any:
  """Lists as tuples, so that records can be hashed and compared."""
  if isinstance(value, dict):
    return {name: _as_tuples(item) for name, item in value.items()}
  return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _as_lists(value: Any) -> Any:
  """Tuples as lists, as in JSON."""
  if isinstance(value, dict):
    return {name: _as_lists(item) for name, item in value.items()}
  return list(map(_as_lists, value)) if isinstance(value, (list, tuple)) else value
