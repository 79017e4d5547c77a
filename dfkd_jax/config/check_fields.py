"""What a config must be, as far as that can be judged without building anything."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections
import numpy as np

from dfkd_jax.config import fields as config_fields
from dfkd_jax.messages import check_choice, nearest, short_repr
from dfkd_jax.paths import expand_path
from dfkd_jax.synth import buffer_memory

JOBS = ('distill', 'train', 'check')


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
  _paths(config, problems)
  problems.ask(lambda: check_choice(config.job, JOBS, 'job'), 'job')
  problems.ask(lambda: check_choice(config.buffer, buffer_memory.PLACES, 'buffer'), 'buffer')
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
  every = config_fields.every()
  there = dict(_leaves(config))
  for section in sorted({*config_fields.FIELDS, 'augment', *config_fields.OPEN} - {''}):
    if section in there and not isinstance(there[section], ml_collections.ConfigDict):
      problems.add(f'{section} is {there[section]!r}, must be a section of the config.', 'fields')
  if problems.lines:
    return
  if lacking := [name for name in every if name not in there]:
    problems.add(f'The config has no {", ".join(lacking[:5])}{" ..." * (len(lacking) > 5)}: it must have all fields of '
                 'configs/common.py.', 'fields')
  sections = {*config_fields.FIELDS, 'augment', *config_fields.OPEN}
  for name in there:
    if name not in every and name not in sections and not name.startswith(
        tuple(f'{each}.' for each in config_fields.OPEN)):
      problems.add(f'Unknown config field {name!r}.{nearest(name, every)} configs/common.py lists them all.', 'fields')


def _leaves(section: ml_collections.ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Fields and sections by dotted name."""
  for name, value in section.items():
    yield prefix + name, value
    if isinstance(value, ml_collections.ConfigDict):
      yield from _leaves(value, f'{prefix}{name}.')


def _types(config: ml_collections.ConfigDict, problems: Problems) -> None:
  """Of what is no number; and numbers that are not there."""
  for names, kind, what in ((config_fields.TEXTS, str, 'text'), (config_fields.FLAGS, bool, 'True or False')):
    for name in names:
      value = _get(config, name)
      if not isinstance(value, kind) and (value is not None or name not in config_fields.NONE):
        problems.add(f'{name} is {value!r}, must be {what}.', name)
  of_method = [name for name in config_fields.NEEDED if name.removeprefix('method.') in config.method]
  fields = {*config_fields.every(), *of_method}
  for interval, names in config_fields.RANGES.items():
    for name in names:
      if name in fields and name not in config_fields.NONE and _get(config, name) is None:
        problems.add(f'{name} is None, must be in {interval}.', name)
  for name, value in _leaves(config):
    if not _is_plain(value):
      problems.add(f'{name} is {short_repr(value)} of type {type(value).__name__}, must be a number, text, True, False, '
                   'None or a tuple of these.', name)


def _is_plain(value: Any) -> bool:
  """Whether JSON has a word for a value."""
  if isinstance(value, (tuple, list)):
    return all(map(_is_plain, value))
  return value is None or isinstance(value, config_fields.VALUES)


def _paths(config: ml_collections.ConfigDict, problems: Problems) -> None:
  """Texts that are to be paths, where a file could be; what they lead to is looked at later."""
  for name in config_fields.PATHS:
    value = _get(config, name)
    if isinstance(value, str) and not value.startswith(config_fields.NO_PATHS):
      problems.ask(lambda name=name, value=value: expand_path(value.partition('#')[0] or value, name), name)


def _numbers(config: ml_collections.ConfigDict, problems: Problems) -> None:
  """All that are out of range in one line, and so those that are not whole."""
  wrong = {
      name: f'{name} is {short_repr(value)}, must be in {interval}{_in_float32(value, interval)}'
      for interval, names in config_fields.RANGES.items() for name in names
      if (value := _get(config, name)) is not None and not _within(value, interval)}
  if wrong:
    problems.add(f'{"; ".join(wrong.values())}.', *wrong)
  halves = {
      name: f'{name} is {value!r}, must be {"whole numbers" if isinstance(value, (tuple, list)) else "a whole number"}'
      for name in config_fields.WHOLE
      if name not in wrong and (value := _get(config, name)) is not None
      and any(not isinstance(each, int) for each in _many(value))}
  if halves:
    problems.add(f'{"; ".join(halves.values())}.', *halves)
  large = {
      name: f'{name} is {short_repr(value)}, must be at most {config_fields.MOST}'
      for name in config_fields.WHOLE
      if name not in wrong and name != 'seed' and (value := _get(config, name)) is not None
      and any(each > config_fields.MOST for each in _many(value))}
  if large:
    problems.add(f'{"; ".join(large.values())}.', *large)


def _dataset(config: ml_collections.ConfigDict, problems: Problems) -> None:
  if config.budget.images is not None and config.job == 'train':
    problems.add(f"budget.images is {config.budget.images!r}, must be None where job is 'train': no image is made.",
                 'budget.images')
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
  for name in ('augment.synthesis.pad', 'augment.student.pad'):
    value = _get(config, name)
    if not problems.concern(name, 'dataset.image_shape') and value is not None and value >= max(shape[:2]):
      problems.add(f'{name} is {value!r}, must be below {max(shape[:2])}, the size of the images.', name)
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
  above = operator.ge if interval[0] == '[' else operator.gt
  below = operator.le if interval[-1] == ']' else operator.lt
  return all(above(each, low) and below(each, high) for each in values) and not _in_float32(value, interval)


def _in_float32(value: Any, interval: str) -> str:
  """' in float32' of a number that would be out of the interval there alone: 0, or infinite."""
  smallest, largest = (float(getattr(np.finfo(np.float32), name)) for name in ('smallest_normal', 'max'))
  for each in _many(value):
    if isinstance(each, float) and math.isfinite(each) and (
        abs(each) > largest or (interval.startswith('(0') and 0 < abs(each) < smallest)):
      return ' in float32'
  return ''
