"""The results of a run: `summary.json`, and the lines that end a run."""

import json
import os
from typing import Any, NotRequired, TypedDict

from dfkd_jax import parallel, tasks
from dfkd_jax.messages import short_repr
from dfkd_jax.report.files import replace_file, reporting_disk_errors, to_json

SUMMARY = 'summary.json'
PRIVACY = 'Synthetic images carry no privacy guarantee: they may reveal the training data.'
_FIRST = ('student', 'teacher', 'control', 'parameters', 'seconds', 'wall_seconds', 'seed',
          'command', 'workdir')  # The first keys of the file; the others follow by name.


# Metrics of a network in a round: round, the metrics of the task, and agreement with the teacher on
# real test images (agreement) and on fresh synthetic images (held_out_agreement). Fractions are in
# [0, 1]. None: not measured.
Result = dict[str, float | None]


class Summary(TypedDict):
  """A summary, as JSON values. Optional fields may be None; further fields are allowed."""

  student: dict[str, Result]  # 'last', and 'best' if rounds were compared.
  config: dict
  weights: dict  # SHA-256 by network.
  changed: list  # Changes of the config on resuming.
  columns: NotRequired[list]  # Metrics to show, see `tasks.Task`; the first one is compared.
  class_names: NotRequired[list[str]]  # Of the data set, where classes have metrics of their own.
  teacher: NotRequired[Result]
  control: NotRequired[Result]  # A student of noise images.
  network: NotRequired[str]  # 'teacher' if `student` describes the training of a teacher.
  parameters: NotRequired[dict[str, int]]  # Numbers, of student and teacher.
  head: NotRequired[dict]  # init, round, images, terms and seconds of a head that was fitted.
  images: NotRequired[dict[str, float]]  # judge_top1, judge_top5 and count of judged images.
  seconds: NotRequired[dict[str, float]]  # By part, see `Ledger.seconds`.
  wall_seconds: NotRequired[float]
  rates: NotRequired[dict[str, float]]  # synthesis_image_steps and student_images, per second.
  workdir: NotRequired[str]
  files: NotRequired[list]  # Names of files in `workdir`.
  external_prior: NotRequired[str]  # File of knowledge that is not from the teacher.
  synthetic: NotRequired[bool]  # False: no images were synthesised.


def check_summary(summary: dict[str, Any]) -> None:
  """Raises ValueError, which names the field, unless a summary has all required fields."""
  for name, kind in {'student': dict, 'config': dict, 'weights': dict, 'changed': list}.items():
    if not isinstance(value := summary.get(name), kind):
      raise ValueError(f'summary.{name} must be {kind.__name__}, got {short_repr(value)}')
  if not isinstance(summary['student'].get('last'), dict):
    raise ValueError('summary.student.last is missing')


def write_summary(workdir: str | os.PathLike, summary: Summary) -> None:
  """Replaces `summary.json` atomically. Results come first; NaN and infinity become null.

  Only the first process writes. Raises ValueError if a value or the file cannot be written.
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
  last, best = summary['student']['last'], summary['student'].get('best') or {}
  teacher, rows = summary.get('teacher') or {}, []
  headline = _columns(summary)[0][0]
  if last.get('held_out_agreement') is not None:
    rows.append(('synthetic images', 'agreement with the teacher '
                 f'{last["held_out_agreement"]:.2%} last, '
                 f'best {best.get("held_out_agreement", 0):.2%} at round {best.get("round", 0)}'))
  if teacher.get(headline):
    ratios = [f'{result[headline] / teacher[headline]:.3f} {name}'
              for name, result in (('last', last), ('best', best)) if result]
    rows.append(('student / teacher', ', '.join(ratios)))
  if images := summary.get('images'):
    top5 = f' and {images["judge_top5"]:.2%} (top-5)' if 'judge_top5' in images else ''
    rows.append(('images', f'judge and teacher agree on {images["judge_top1"]:.2%} (top-1){top5} '
                 f'of {images["count"]:.0f} samples'))
  sizes = summary.get('parameters') or {}
  if sizes.get('student'):
    text = f'{summary.get("network", "student")} {sizes["student"]:,}'
    if sizes.get('teacher'):
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
  student, name, columns = summary['student'], summary.get('network', 'student'), _columns(summary)
  if student['last'].get(columns[0][0]) is None:
    return ['no real test images']
  rows = [
      ('teacher', summary.get('teacher'), ''), (f'{name}, last', student['last'], ''),
      (f'{name}, best', student.get('best'), 'best is selected on the test set'),
      ('control', summary.get('control'),
       'same student and steps, on noise images labelled by the teacher')]
  widths = [max(11, len(title) + 2) for _, title, _ in columns]
  lines = [('on real test images', *(title for _, title, _ in columns), '')]
  for label, result, note in rows:
    if result:
      cells = ['' if result.get(key) is None else f'{float(result[key]):{form}}'
               for key, _, form in columns]
      chosen = '' if result.get('round') is None else f'round {result["round"]}'
      lines.append((label, *cells, '; '.join(filter(None, [chosen, note]))))
  form = ''.join(['{:21}', *(f'{{:>{width}}}' for width in widths), '  {}'])
  lines = [form.format(*line).rstrip() for line in lines]
  return lines + _iou_by_class(summary)


def _columns(summary: Summary) -> list[tuple[str, str, str]]:
  """Returns the columns of the table; summaries of earlier versions are of classification."""
  return summary.get('columns') or list(tasks.classification(2).columns)


def _iou_by_class(summary: Summary) -> list[str]:
  """Formats the IoU of each class, of student and teacher, if the task has any."""
  networks = {summary.get('network', 'student'): summary['student']['last'],
              'teacher': summary.get('teacher') or {}}
  networks = {name: {int(key.removeprefix('iou_')): value for key, value in result.items()
                  if key.startswith('iou_')} for name, result in networks.items()}
  networks = {name: iou for name, iou in networks.items() if iou}
  if not networks:
    return []
  names = dict(enumerate(summary.get('class_names') or []))
  lines = ['', f'{"IoU by class":21}' + ''.join(f'{name:>11}' for name in networks)]
  for label in sorted(set().union(*networks.values())):
    cells = (f'{values[label]:11.3f}' if label in values else f'{"-":>11}'
             for values in networks.values())
    lines.append(f'{names.get(label, label)!s:21}' + ''.join(cells))
  return lines


def _time_rows(seconds: dict[str, float], wall: float | None) -> list[tuple[str, str]]:
  """Formats the seconds of each part, the largest first; 'other' is the time in no part."""
  parts = {name: value for name, value in seconds.items() if value > 0}
  total = sum(parts.values()) if wall is None else wall
  if (other := total - sum(parts.values())) > 0.005 * total:
    parts['other'] = other
  ordered = sorted(parts.items(), key=lambda part: -part[1])
  rows = [('', f'{value:8.1f} s {value / total:4.0%}  {name}') for name, value in ordered]
  return [('time', f'{total:8.1f} s in all'), *rows]
