"""Small frozen records, resolved once from a config; jobs pass these on."""

import json
from collections import namedtuple
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

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
  """Returns a namedtuple with the fields of a section, which config/fields.py documents."""
  names = [row.name.partition('.')[2] for row in RUN_FIELDS if row.name.startswith(f'{section}.')]
  return namedtuple(section.title(), names)


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
  def total_calls(self) -> int:
    """Calls of the method in the whole run; 0 where a number is missing, before it is checked."""
    return (self.rounds or 0) * (self.calls_per_round or 0)

  @property
  def steps_per_call(self) -> int:
    """Student steps after each call of the method."""
    return self.steps_per_round // self.calls_per_round


class NetworkSettings(NamedTuple):
  """How to make the teacher, the student, the judge or the generator."""

  role: str  # section of the config
  name: str | None
  options: dict[str, Any]  # arguments of the model
  source: str | None  # weights
  preprocessing: dict[str, Any]  # arguments of `models.bind`: mean, std, bgr, resize
  image_shape: tuple[int, int, int]  # of the data set
  num_classes: int
  dtype: str | None
  remat: bool
  needs_moments: bool  # whether its batch-norm moments must come from training

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """[H, W, C] of the images that reach the module."""
    return (*(self.preprocessing['resize'] or self.image_shape[:2]), self.image_shape[-1])


class MethodSettings(NamedTuple):
  """How to make the method."""

  name: str | None
  numbers: dict[str, Any]  # arguments of its constructor that are not None, over all devices
  factors: Factors
  task: tasks.Task
  generator: NetworkSettings
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


def resolve(config: ConfigDict) -> Settings:
  """Returns the records of a config, which must have all fields; does not check their values."""
  values = FrozenConfigDict(config).to_dict()  # with tuples in place of lists
  distill, labels = Distill(**values['distill']), values['labels']
  task = tasks.classification(values['dataset']['num_classes'], balanced=labels == 'balanced',
                              stratified=labels == 'stratified')
  numbers = _without_none(values['method'])
  method = MethodSettings(
      numbers.pop('name', None), numbers, Factors(**values['factors']), task,
      _network(values, 'generator'), _without_none(values['augment']['synthesis']),
      distill.batch_size, distill.total_calls)
  sections = {record.__name__.lower(): record(**values[record.__name__.lower()])
              for record in (Dataset, Train, Optimizer, Preflight, Grid, Distributed)}
  names = ('job', 'control', 'buffer', 'device_memory_gb', 'num_devices', 'precision',
           'compilation_cache')
  return Settings(
      run=_run_settings(config), task=task, method=method, distill=distill,
      **{role: _network(values, role) for role in ('teacher', 'student', 'judge')},
      augment=_without_none(values['augment']['student']),
      init_from=InitFrom(**values['init_from']), **sections,
      **{name: values[name] for name in names})


def _run_settings(config: ConfigDict) -> RunSettings:
  return RunSettings(
      config=json.loads(config.to_json_best_effort()), seed=config.seed,
      evaluate_every=config.evaluate.every, evaluate_batch_size=config.evaluate.batch_size,
      save_every=config.checkpoint.every, max_to_keep=config.checkpoint.max_to_keep,
      keep_best=config.checkpoint.keep_best, minutes=config.budget.minutes,
      images=config.budget.images, reseed=config.faults.reseed)


def _network(values: dict[str, Any], role: str) -> NetworkSettings:
  section, dataset = values[role], values['dataset']
  return NetworkSettings(
      role, section['name'], _without_none(section['options']), section.get('source'),
      {name: section.get(name) for name in ('mean', 'std', 'bgr', 'resize')},
      dataset['image_shape'], dataset['num_classes'], values['compute_dtype'], values['remat'],
      needs_moments=role != 'teacher' or not values['preflight']['fallback'])


def _without_none(section: dict[str, Any]) -> dict[str, Any]:
  """Leaves the arguments of None to their defaults."""
  return {name: value for name, value in section.items() if value is not None}
