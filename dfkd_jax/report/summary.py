"""The results of a run: `summary.json`, and the lines that end a run."""

import json
import os
import typing
from numbers import Real
from typing import Any, NotRequired, TypedDict

from dfkd_jax import parallel
from dfkd_jax.messages import short_repr
from dfkd_jax.report.files import replace_file, reporting_disk_errors, to_json

SUMMARY = 'summary.json'
PRIVACY = 'Synthetic images carry no privacy guarantee: they may reveal the training data.'
_FIRST = ('student', 'teacher', 'control', 'parameters', 'seconds', 'wall_seconds', 'seed',
          'command', 'workdir')  # The first keys of the file; the others follow by name.


class Result(TypedDict, total=False):
  """Metrics of a network. Fractions are in [0, 1]; metrics that were not measured are None."""

  top1: float
  top5: float
  cross_entropy: float
  agreement: float  # With the teacher, on real test images.
  held_out_agreement: float  # With the teacher, on fresh synthetic images.
  round: int


class Student(TypedDict):
  """Metrics of the trained network."""

  last: Result
  best: NotRequired[Result]


class Summary(TypedDict):
  """A summary, as JSON values. Optional fields may be None; further fields are allowed."""

  student: Student
  config: dict
  weights: dict  # SHA-256 by network.
  changed: list  # Changes of the config on resuming.
  teacher: NotRequired[Result]
  control: NotRequired[Result]  # A student of noise images.
  network: NotRequired[str]  # 'teacher' if `student` describes the training of a teacher.
  parameters: NotRequired[dict[str, int]]  # Numbers, of student and teacher.
  images: NotRequired[dict[str, float]]  # judge_top1, judge_top5 and count of judged images.
  seconds: NotRequired[dict[str, float]]  # By part, see `Ledger.seconds`.
  wall_seconds: NotRequired[float]
  rates: NotRequired[dict[str, float]]  # synthesis_image_steps and student_images, per second.
  workdir: NotRequired[str]
  files: NotRequired[list]  # Names of files in `workdir`.
  external_prior: NotRequired[str]  # File of knowledge that is not from the teacher.
  synthetic: NotRequired[bool]  # False: no images were synthesised.


def check_summary(summary: Any) -> None:
  """Raises ValueError, which names the field, unless JSON values are a whole `Summary`."""
  _check_type('summary', summary, Summary)


def _check_type(name: str, value: Any, kind: Any) -> None:
  """Checks that a value has a type: a TypedDict, a dict of numbers, or a plain type."""
  is_record = typing.is_typeddict(kind)
  base = dict if is_record else typing.get_origin(kind) or kind
  if value is None:
    raise ValueError(f'{name} is missing')
  if not isinstance(value, Real if base in (int, float) else base):
    raise ValueError(f'{name} must be {base.__name__}, got {short_repr(value)}')
  required = kind.__required_keys__ if is_record else ()
  fields = typing.get_type_hints(kind) if is_record else {}
  if typing.get_args(kind):
    fields = dict.fromkeys(value, typing.get_args(kind)[1])
  for key, field in fields.items():
    if key in required or value.get(key) is not None:
      _check_type(f'{name}.{key}', value.get(key), field)


def write_summary(workdir: str | os.PathLike, summary: Summary) -> None:
  """Replaces `summary.json` atomically. Results come first; NaN and infinity become null.

  Only the first process writes.

  Raises:
    ValueError: JSON has no such value, or the file cannot be written.
  """
  names = [name for name in _FIRST if name in summary] + sorted(summary.keys() - set(_FIRST))
  values = {name: to_json(summary[name], name) for name in names}
  path = os.path.join(workdir, SUMMARY)
  if parallel.is_first():
    with reporting_disk_errors(path):
      os.makedirs(workdir, exist_ok=True)
      with replace_file(path) as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False).encode() + b'\n')


def format_summary(summary: Summary) -> str:
  """Formats the last lines of a run: results, ratios, sizes, time by part, files."""
  student, teacher = summary['student'], summary.get('teacher') or {}
  last, best = student['last'], student.get('best') or {}
  rows = []
  if last.get('held_out_agreement') is not None:
    rows.append(('synthetic images', 'agreement with the teacher '
                 f'{last["held_out_agreement"]:.2%} last, '
                 f'best {best.get("held_out_agreement", 0):.2%} at round {best.get("round", 0)}'))
  if teacher.get('top1'):
    ratios = [f'{result["top1"] / teacher["top1"]:.3f} {name}'
              for name, result in (('last', last), ('best', best)) if result]
    rows.append(('student / teacher', ', '.join(ratios)))
  if images := summary.get('images'):
    rows.append(('images', f'judge and teacher agree on {images["judge_top1"]:.2%} (top-1) and '
                 f'{images["judge_top5"]:.2%} (top-5) of {images["count"]:.0f} samples'))
  sizes = {name: size for name, size in (summary.get('parameters') or {}).items() if size}
  if 'student' in sizes:
    text = f'{summary.get("network", "student")} {sizes["student"]:,}'
    if 'teacher' in sizes:
      text += f', teacher {sizes["teacher"]:,}, ratio {sizes["student"] / sizes["teacher"]:.3f}'
    rows.append(('parameters', text))
  if summary.get('seconds'):
    rows += _time_rows(summary['seconds'], summary.get('wall_seconds'))
  if rates := summary.get('rates'):
    rows.append(('rates, once compiled',
                 f'{rates["synthesis_image_steps"]:,.0f} image-steps/s of synthesis, '
                 f'{rates["student_images"]:,.0f} images/s of the student'))
  if prior := summary.get('external_prior'):
    rows.append(('external prior', f'{prior}: knowledge that is not from the teacher'))
  if summary.get('workdir'):
    files = ', '.join(summary.get('files') or [SUMMARY])
    rows.append(('files', f'{files} in {summary["workdir"]}'))
  privacy = [] if summary.get('synthetic') is False else [PRIVACY]
  return '\n'.join(
      ['', *_table(summary), '', *(f'{name:21}{text}' for name, text in rows), *privacy])


def _table(summary: Summary) -> list[str]:
  """Formats a row of metrics for each network."""
  student, name = summary['student'], summary.get('network', 'student')
  if student['last'].get('top1') is None:
    return ['no real test images']
  rows = [
      ('teacher', summary.get('teacher'), []),
      (f'{name}, last', student['last'], []),
      (f'{name}, best', student.get('best'), ['best is selected on the test set']),
      ('control', summary.get('control'),
       ['same student and steps, on noise images labelled by the teacher'])]
  lines = [('on real test images', 'top-1', 'top-5', 'agreement', 'cross-entropy', '')]
  for label, result, notes in rows:
    if result:
      forms = {'top1': '.2%', 'top5': '.2%', 'agreement': '.2%', 'cross_entropy': '.4f'}
      cells = ['' if result.get(key) is None else f'{float(result[key]):{form}}'
               for key, form in forms.items()]
      if result.get('round') is not None:
        notes = [f'round {result["round"]}', *notes]
      lines.append((label, *cells, '; '.join(notes)))
  return ['{:21}{:>11}{:>11}{:>11}{:>15}  {}'.format(*line).rstrip() for line in lines]


def _time_rows(seconds: dict[str, float], wall: float | None) -> list[tuple[str, str]]:
  """Formats the seconds of each part, the largest first; 'other' is the time in no part."""
  parts = {name: value for name, value in seconds.items() if value > 0}
  total = sum(parts.values()) if wall is None else wall
  if (other := total - sum(parts.values())) > 0.005 * total:
    parts['other'] = other
  ordered = sorted(parts.items(), key=lambda part: -part[1])
  rows = [('', f'{value:8.1f} s {value / total:4.0%}  {name}') for name, value in ordered]
  return [('time', f'{total:8.1f} s in all'), *rows]
