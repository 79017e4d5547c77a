"""Small frozen records, resolved once from a config; jobs pass these on."""

import json
from collections import namedtuple
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from dfkd_jax import tasks
from dfkd_jax.config.fields import RUN_FIELDS
from dfkd_jax.synth.objective import Factors


def _record(section: str) -> type:
  """Returns a namedtuple with the fields of a section, which config/fields.py documents."""
  names = [row.name.partition('.')[2] for row in RUN_FIELDS if row.name.startswith(f'{section}.')]
  return namedtuple(section.title().replace('_', ''), names)


Dataset, Train, Optimizer = _record('dataset'), _record('train'), _record('optimizer')
Preflight, Grid, Distributed = _record('preflight'), _record('grid'), _record('distributed')
InitFrom = _record('init_from')


class RunSettings(NamedTuple):
  """Settings of a run of any job."""

  config: dict[str, Any]  # the whole config as JSON; kept in checkpoints and in the summary
  seed: int
  evaluate_every: int  # rounds
  evaluate_batch_size: int
  save_every: int  # rounds between checkpoints
  max_to_keep: int
  keep_best: bool
  minutes: float | None  # budget of each start
  images: int | None  # budget of synthesised images, for the whole run
  reseed: int  # how often a round with non-finite numbers may be repeated with other keys


class Distill(_record('distill')):
  """The section `distill`."""

  __slots__ = ()

  @property
  def learning_rounds(self) -> int:
    """Rounds with student steps."""
    return self.rounds - self.distill_after

  @property
  def total_calls(self) -> int:
    """Calls of the method in the whole run."""
    return self.rounds * self.calls_per_round

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
  image_shape: tuple[int, int, int]  # of the data set, or of synthesised images
  num_classes: int
  task: str
  dtype: str | None
  remat: bool
  needs_moments: bool  # whether its batch-norm moments must come from training

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """[H, W, C] of the images that reach the module."""
    return (*(self.preprocessing['resize'] or self.image_shape[:2]), self.image_shape[-1])


class Head(NamedTuple):
  """How the student's head begins."""

  init: str  # 'random', or a kind of `spline.head_init`
  width: int | None  # of its hidden layer
  round: int | None  # see `config.head.fit_round`
  images: int  # to fit it on


class MethodSettings(NamedTuple):
  """How to make the method."""

  name: str | None
  numbers: dict[str, Any]  # arguments of its constructor that are not None, over all devices
  factors: Factors
  task: tasks.Task
  generator: NetworkSettings
  augment: dict[str, Any]  # name and arguments of the augmentation
  distill: Distill

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

  run: RunSettings
  task: tasks.Task
  method: MethodSettings
  teacher: NetworkSettings
  student: NetworkSettings
  judge: NetworkSettings
  augment: dict[str, Any]  # of the student's images: name and arguments
  head: Head
  job: str
  control: bool
  buffer: str
  device_memory_gb: float | None
  num_devices: int | None
  precision: str | None
  compilation_cache: str | None
  dataset: Dataset
  distill: Distill
  train: Train
  optimizer: Optimizer
  preflight: Preflight
  grid: Grid
  distributed: Distributed
  init_from: InitFrom


def resolve(config: ConfigDict) -> Settings:
  """Returns the records of a config, which must have all fields; does not check their values."""
  values = FrozenConfigDict(config).to_dict()  # with tuples in place of lists
  task, numbers = _task(values), _without_none(values['method'])
  method = MethodSettings(
      numbers.pop('name', None), numbers, Factors(**values['factors']), task,
      _network(values, 'generator'), _without_none(values['augment']['synthesis']),
      Distill(**values['distill']))
  run = RunSettings(
      config=json.loads(config.to_json_best_effort()), seed=config.seed,
      evaluate_every=config.evaluate.every, evaluate_batch_size=config.evaluate.batch_size,
      save_every=config.checkpoint.every, max_to_keep=config.checkpoint.max_to_keep,
      keep_best=config.checkpoint.keep_best, minutes=config.budget.minutes,
      images=config.budget.images, reseed=config.faults.reseed)
  networks = [_network(values, role) for role in ('teacher', 'student', 'judge')]
  first = (run, task, method, *networks, _without_none(values['augment']['student']),
           Head(*(values['student'][f'head_{name}'] for name in Head._fields)))
  others = {name: kind(**values[name]) if hasattr(kind, '_fields') else values[name]
            for name, kind in list(Settings.__annotations__.items())[len(first):]}
  return Settings(*first, **others)


def _task(values: dict[str, Any]) -> tasks.Task:
  dataset, labels = values['dataset'], values['labels']
  if values['task'] == 'segmentation':
    return tasks.segmentation(
        dataset['num_classes'], dataset['ignore'], count_void=dataset['count_void'])
  return tasks.classification(dataset['num_classes'], balanced=labels == 'balanced',
                              stratified=labels == 'stratified')


def _network(values: dict[str, Any], role: str) -> NetworkSettings:
  section, dataset = values[role], values['dataset']
  width = section.get('head_width')
  options = _without_none(section['options']) | ({} if width is None else {'head_width': width})
  return NetworkSettings(
      role, section['name'], options, section.get('source'),
      {name: section.get(name) for name in ('mean', 'std', 'bgr', 'resize')},
      section.get('image_shape') or dataset['image_shape'], dataset['num_classes'],
      values['task'], values['compute_dtype'], values['remat'],
      needs_moments=role != 'teacher' or not values['preflight']['fallback'])


def _without_none(section: dict[str, Any]) -> dict[str, Any]:
  """Leaves the arguments of None to their defaults."""
  return {name: value for name, value in section.items() if value is not None}
