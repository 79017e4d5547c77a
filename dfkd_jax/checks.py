"""What a config must be, as far as that can be judged without building anything."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections
import numpy as np

from dfkd_jax import host_buffer
from dfkd_jax.names import known, nearest
from dfkd_jax.synth import objective

JOBS = ('distill', 'train', 'check')

# All fields by section, but for those of a method, of options and of an augmentation, which these know themselves.
_NETWORK = ('name', 'options', 'mean', 'std', 'bgr', 'resize')
FIELDS = {
    '': ('job', 'seed', 'num_devices', 'precision', 'compute_dtype', 'remat', 'buffer', 'device_memory_gb', 'labels',
         'control', 'compilation_cache'),
    'dataset': ('name', 'data_dir', 'image_shape', 'num_classes', 'train_split', 'test_split', 'crop'),
    'teacher': (*_NETWORK, 'source'), 'student': _NETWORK, 'judge': (*_NETWORK, 'source'),
    'generator': ('name', 'options'), 'method': ('name',), 'factors': objective.Factors._fields,
    'preflight': ('enabled', 'batch_size', 'fallback'), 'augment.synthesis': ('name',), 'augment.student': ('name',),
    'distill': ('rounds', 'calls_per_round', 'steps_per_round', 'distill_after', 'batch_size', 'temperature',
                'divergence', 'attention_factor'),
    'train': ('network', 'epochs', 'batch_size', 'label_factor', 'teacher_factor', 'temperature', 'label_smoothing'),
    'optimizer': ('name', 'learning_rate', 'momentum', 'nesterov', 'weight_decay', 'schedule', 'end_value',
                  'warmup_steps', 'milestones', 'gamma'),
    'evaluate': ('every', 'batch_size'), 'checkpoint': ('every', 'max_to_keep', 'keep_best'),
    'budget': ('minutes', 'images'), 'faults': ('reseed',), 'init_from': ('student', 'generator'),
    'grid': ('columns', 'rows'),
    'distributed': ('coordinator', 'num_processes', 'process_id', 'timeout'),
}
_OPEN = ('method', 'augment.synthesis', 'augment.student', 'generator.options',
         *(f'{which}.options' for which in ('teacher', 'student', 'judge')))
_TEXTS = (
    'job', 'buffer', 'labels', 'precision', 'compute_dtype', 'compilation_cache', 'dataset.name', 'dataset.data_dir',
    'dataset.train_split', 'dataset.test_split', 'teacher.name', 'teacher.source', 'student.name', 'judge.name',
    'judge.source', 'generator.name', 'method.name', 'augment.synthesis.name', 'augment.student.name',
    'distill.divergence', 'train.network', 'optimizer.name', 'optimizer.schedule', 'distributed.coordinator',
    'init_from.student', 'init_from.generator')
_FLAGS = (
    'remat', 'control', 'teacher.bgr', 'student.bgr', 'judge.bgr', 'preflight.enabled', 'preflight.fallback',
    'optimizer.nesterov', 'checkpoint.keep_best')
_NONE = (  # May be left open.
    'precision', 'compute_dtype', 'compilation_cache', 'dataset.name', 'dataset.data_dir', 'teacher.name',
    'teacher.source', 'student.name', 'judge.name', 'judge.source', 'method.name', 'distributed.coordinator',
    'num_devices', 'device_memory_gb', 'dataset.crop', 'teacher.resize', 'student.resize', 'judge.resize',
    'distributed.num_processes', 'distributed.process_id', 'init_from.student', 'init_from.generator',
    'budget.minutes', 'budget.images')

# Where a number must lie; what a method or an augmentation does not have, or leaves open, is passed over.
RANGES = {
    '[0, 4294967296)': ('seed',),
    '[2, inf)': ('dataset.num_classes',),
    '[1, inf)': (
        'num_devices', 'distributed.num_processes', 'distributed.timeout',
        'dataset.image_shape', 'distill.rounds', 'distill.calls_per_round', 'distill.steps_per_round',
        'distill.batch_size',
        'train.epochs', 'train.batch_size', 'evaluate.every', 'evaluate.batch_size', 'checkpoint.every',
        'checkpoint.max_to_keep', 'budget.images', 'grid.columns', 'grid.rows', 'method.num_steps', 'method.batch_size',
        'method.capacity', 'method.num_tasks', 'method.latent_dim', 'method.bank_size', 'method.num_negatives',
        'method.projection_size', 'method.redraw_every', 'method.restart_every', 'preflight.batch_size',
        'method.adversarial.every', 'teacher.resize', 'student.resize', 'judge.resize'),
    '[0, inf)': (
        'distributed.process_id', 'faults.reseed',
        'distill.distill_after', 'train.label_factor', 'train.teacher_factor', 'optimizer.weight_decay',
        'optimizer.end_value', 'optimizer.warmup_steps', 'optimizer.milestones', 'method.adversarial_after',
        'augment.synthesis.pad', 'augment.student.pad', 'method.adversarial.init_value', 'method.adversarial.slope',
        'method.adversarial.begin', 'method.adversarial.end', 'method.reset_after', 'method.gamma',
        'method.beta', 'method.threshold_growth', 'distill.attention_factor',
        *(f'factors.{name}' for name in objective.Factors._fields)),
    '(0, inf)': (
        'device_memory_gb', 'budget.minutes', 'teacher.std', 'student.std', 'judge.std', 'distill.temperature',
        'train.temperature', 'optimizer.learning_rate',
        'method.generator_lr', 'method.latent_lr', 'method.meta_lr', 'method.learning_rate', 'method.head_lr',
        'method.contrast_temperature', 'method.threshold_start', 'method.balance_temperature', 'method.epsilon',
        'method.adversary.temperature', 'method.init_std', 'method.redraw_std', 'method.clip_weights'),
    '[0, 1)': (
        'train.label_smoothing', 'optimizer.momentum', 'method.adam_b1', 'method.adam_b2', 'method.moments_momentum',
        'method.ema_decay'),
    '(0, 1]': ('optimizer.gamma', 'dataset.crop', 'augment.synthesis.scale', 'augment.student.scale'),
    '(0, 1)': ('method.ema_share',),
    '(-inf, inf)': ('teacher.mean', 'student.mean', 'judge.mean'),
}
# Those that count something.
_WHOLE = (
    'seed', 'dataset.num_classes', *RANGES['[1, inf)'], 'distributed.process_id', 'distill.distill_after',
    'optimizer.warmup_steps', 'optimizer.milestones', 'method.adversarial_after', 'method.reset_after')


class InvalidError(ValueError):
  """What a user gave does not fit; `problems` has a line for each thing that is wrong."""

  def __init__(self, problems: Iterable[str]):
    self.problems = tuple(problems)
    super().__init__(' '.join(self.problems))


class Problems:
  """Collects what is wrong, each once, and without what only follows from it."""

  def __init__(self):
    self.lines: list[str] = []
    self._fields: set[str] = set()

  def add(self, line: str, *fields: str) -> None:
    """Notes a problem of some fields or sections."""
    line = ' '.join(str(line).split())
    self._fields.update(fields)
    if line not in self.lines:
      self.lines.append(line)

  def concern(self, *fields: str) -> bool:
    """Whether one of these fields, a part of it or what it is a part of is known to be wrong."""
    return any(f'{one}.'.startswith(f'{other}.') or f'{other}.'.startswith(f'{one}.')
               for one in fields for other in self._fields)

  def ask(self, question: Callable[[], Any], *fields: str, on: Iterable[str] = ()) -> Any:
    """What a question returns; its ValueError is a problem of `fields`.

    Args:
      question: Without arguments.
      *fields: That are wrong if it raises.
      on: What else the answer stands on.

    Returns:
      The answer, or None where it raises, or is not asked since what it stands on is wrong.
    """
    if self.concern(*fields, *on):
      return None
    try:
      return question()
    except ValueError as error:
      for line in getattr(error, 'problems', (error,)):
        self.add(line, *fields)
    return None

  def tell(self) -> None:
    """Raises an InvalidError if there is any."""
    if self.lines:
      raise InvalidError(self.lines)


def check(config: ml_collections.ConfigDict) -> None:
  """Looks at names and numbers that can be judged without building anything.

  Raises:
    InvalidError: Has a line for all numbers that are out of range, and one for each other thing that does not fit.
  """
  problems = Problems()
  look(config, problems)
  problems.tell()


def look(config: ml_collections.ConfigDict, problems: Problems) -> None:
  """As `check`, of which problems are collected; a field that is missing or unknown is one of all."""
  _fields(config, problems)
  if problems.lines:
    return
  _types(config, problems)
  _numbers(config, problems)
  problems.ask(lambda: known(config.job, JOBS, 'job'), 'job')
  problems.ask(lambda: known(config.buffer, host_buffer.PLACES, 'buffer'), 'buffer')
  _dataset(config, problems)
  _shapes(config, problems)
  distil = config.distill
  if (config.job == 'distill' and not problems.concern('distill.distill_after', 'distill.rounds')
      and distil.distill_after >= distil.rounds):
    problems.add(
        f'distill.distill_after is {distil.distill_after}, must be below distill.rounds, {distil.rounds}: '
        'else the student takes no step.', 'distill.distill_after')


def _fields(config: ml_collections.ConfigDict, problems: Problems) -> None:
  """The fields that must be there, and no others."""
  every = [f'{section}.{field}'.lstrip('.') for section, fields in FIELDS.items() for field in fields]
  there = dict(_leaves(config))
  for section in sorted({*FIELDS, 'augment', *_OPEN} - {''}):
    if section in there and not isinstance(there[section], ml_collections.ConfigDict):
      problems.add(f'{section} is {there[section]!r}, must be a section of the config.', 'fields')
  if problems.lines:
    return
  if lacking := [name for name in every if name not in there]:
    problems.add(f'The config has no {", ".join(lacking[:5])}{" ..." * (len(lacking) > 5)}: it must have all fields of '
                 'configs/common.py.', 'fields')
  sections = {*FIELDS, 'augment', *_OPEN}
  for name in there:
    if name not in every and name not in sections and not name.startswith(tuple(f'{each}.' for each in _OPEN)):
      problems.add(f'Unknown config field {name!r}.{nearest(name, every)} configs/common.py lists them all.', 'fields')


def _leaves(section: ml_collections.ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Fields and sections by dotted name."""
  for name, value in section.items():
    yield prefix + name, value
    if isinstance(value, ml_collections.ConfigDict):
      yield from _leaves(value, f'{prefix}{name}.')


def _types(config: ml_collections.ConfigDict, problems: Problems) -> None:
  """Of what is no number; and numbers that are not there."""
  for names, kind, what in ((_TEXTS, str, 'text'), (_FLAGS, bool, 'True or False')):
    for name in names:
      value = _get(config, name)
      if not isinstance(value, kind) and (value is not None or name not in _NONE):
        problems.add(f'{name} is {value!r}, must be {what}.', name)
  fields = {f'{section}.{field}'.lstrip('.') for section, fields in FIELDS.items() for field in fields}
  for interval, names in RANGES.items():
    for name in names:
      if name in fields and name not in _NONE and _get(config, name) is None:
        problems.add(f'{name} is None, must be in {interval}.', name)


def _numbers(config: ml_collections.ConfigDict, problems: Problems) -> None:
  """All that are out of range in one line, and so those that are not whole."""
  wrong = {
      name: f'{name} is {value!r}, must be in {interval}'
      for interval, names in RANGES.items() for name in names
      if (value := _get(config, name)) is not None and not _within(value, interval)}
  if wrong:
    problems.add(f'{"; ".join(wrong.values())}.', *wrong)
  halves = {
      name: f'{name} is {value!r}, must be {"whole numbers" if isinstance(value, (tuple, list)) else "a whole number"}'
      for name in _WHOLE
      if name not in wrong and (value := _get(config, name)) is not None
      and any(not isinstance(each, int) for each in _many(value))}
  if halves:
    problems.add(f'{"; ".join(halves.values())}.', *halves)


def _dataset(config: ml_collections.ConfigDict, problems: Problems) -> None:
  if config.dataset.name is None and config.job == 'train':
    problems.add(
        "dataset.name is None, must be the name of a prepared data set where job is 'train'.", 'dataset.name')
  if config.dataset.name is None and config.control:
    problems.add('control is True, must be False where dataset.name is None: it is judged on real images.', 'control')


def _shapes(config: ml_collections.ConfigDict, problems: Problems) -> None:
  """Lengths of tuples."""
  shape = config.dataset.image_shape
  if not problems.concern('dataset.image_shape') and (not isinstance(shape, (tuple, list)) or len(shape) != 3):
    problems.add(f'dataset.image_shape is {shape}, must be (height, width, channels).', 'dataset.image_shape')
  for name in (f'{which}.{what}' for which in ('teacher', 'student', 'judge') for what in ('mean', 'std')):
    if problems.concern(name, 'dataset.image_shape'):
      continue
    value = _get(config, name)
    if not isinstance(value, (tuple, list)) or len(value) not in (1, shape[-1]):
      problems.add(f'{name} is {value}, must have one number for each of the {shape[-1]} channels.', name)
  for name in ('teacher.resize', 'student.resize', 'judge.resize'):
    value = _get(config, name)
    if not problems.concern(name) and value is not None and len(_many(value)) != 2:
      problems.add(f'{name} is {value}, must be (height, width), or None for images as they are.', name)
  for name in ('augment.synthesis.scale', 'augment.student.scale'):
    value = _get(config, name)
    if not problems.concern(name) and value is not None and (len(_many(value)) != 2 or value[0] > value[1]):
      problems.add(f'{name} is {value}, must be (least, most) of an image, the first not above the second.', name)


def _get(config: ml_collections.ConfigDict, name: str):
  """The value of a dotted name, None if there is none."""
  for part in name.split('.'):
    config = config.get(part) if isinstance(config, ml_collections.ConfigDict) else None
    if config is None:
      return None
  return config


def _many(value: Any) -> tuple | list:
  return value if isinstance(value, (tuple, list)) else (value,)


def _within(value, interval: str) -> bool:
  """Whether a number, or each of a tuple, is one and lies in an interval such as '[0, 1)'."""
  values = _many(value)
  if any(isinstance(each, bool) or not isinstance(each, (int, float)) for each in values):
    return False
  low, high = map(float, interval[1:-1].split(','))
  above = np.greater_equal if interval[0] == '[' else np.greater
  below = np.less_equal if interval[-1] == ']' else np.less
  return all(above(each, low) and below(each, high) for each in values)
