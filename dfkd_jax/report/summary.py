"""What a run came to: `summary.json` and the lines at its end.

A summary is a dict; what is missing or None is left out of the lines:

  student: {'last': RESULT, 'best': RESULT} with RESULT = {top1, top5, cross_entropy, agreement, round};
    fractions in [0, 1], agreement with the teacher
  teacher: RESULT without agreement and round
  control: RESULT of a student that had noise images
  network: 'teacher' where `student` tells of the training of one
  parameters: {'student': int, 'teacher': int}
  seconds: seconds by part, as from `Ledger.seconds`
  wall_seconds: float
  rates: {'synthesis_image_steps': a second, 'student_images': a second}
  seed, command, config, versions, device: as they were
  workdir: str, and files: list of names there
  external_prior: file of what was known beside the teacher, such as embeddings of the classes' names
  synthetic: False where no images were synthesised, and nothing need be said of privacy
"""

import json
import os

from dfkd_jax import parallel
from dfkd_jax.report.files import plain, replace_file, reporting_disk_errors

SUMMARY = 'summary.json'
PRIVACY = 'Synthetic images carry no privacy guarantee: they may reveal what the teacher was trained on.'
FIRST = ('student', 'teacher', 'control', 'parameters', 'seconds', 'wall_seconds', 'seed', 'command', 'workdir')
SHARES = {'top1': 'top-1', 'top5': 'top-5', 'agreement': 'agreement'}


def write_summary(workdir: str | os.PathLike, summary: dict) -> None:
  """Replaces `summary.json` in one go: results first, the rest by name; NaN and infinity become null.

  Of several processes the first alone writes.

  Raises:
    ValueError: A value is not JSON, or the disk refuses the file.
  """
  names = [name for name in FIRST if name in summary] + sorted(summary.keys() - set(FIRST))
  text = json.dumps({name: plain(summary[name], name) for name in names}, indent=2, ensure_ascii=False)
  path = os.path.join(workdir, SUMMARY)
  if not parallel.is_first():
    return
  with reporting_disk_errors(path):
    os.makedirs(workdir, exist_ok=True)
    with replace_file(path) as file:
      file.write(text.encode() + b'\n')


def format_summary(summary: dict) -> str:
  """The lines at the end of a run: results, ratio, sizes, time by part, where the files are."""
  student, teacher = summary['student'], summary.get('teacher')
  lines = ['', *_table(summary), '']
  if student['last'].get('held_out_agreement') is not None:
    lines += _synthetic(student)
  if teacher and teacher['top1']:
    ratios = [f'{student[kind]["top1"] / teacher["top1"]:.3f} {kind}' for kind in ('last', 'best') if student.get(kind)]
    lines.append(f'student / teacher   {", ".join(ratios)}')
  if images := summary.get('images'):
    lines.append(f'images, by the judge {images["judge_top1"]:.2%} top-1, {images["judge_top5"]:.2%} top-5 '
                 f'of {images["count"]:.0f} samples are what the teacher sees in them')
  sizes = summary.get('parameters') or {}
  if sizes.get('student'):
    name = summary.get('network', 'student')
    lines.append(f'parameters          {name} {sizes["student"]:,}{_quotient(sizes)}')
  if summary.get('seconds'):
    lines += _times(summary['seconds'], summary.get('wall_seconds'))
  if rates := summary.get('rates'):
    lines.append(f'rates, once compiled {rates["synthesis_image_steps"]:8,.0f} image-steps/s of synthesis, '
                 f'{rates["student_images"]:,.0f} images/s of the student')
  if prior := summary.get('external_prior'):
    lines.append(f'external prior      {prior}: what it holds comes from elsewhere than the teacher')
  if summary.get('workdir'):
    lines.append(f'files               {", ".join(summary.get("files") or [SUMMARY])} in {summary["workdir"]}')
  if summary.get('synthetic') is not False:
    lines.append(PRIVACY)
  return '\n'.join(lines)


def _table(summary: dict) -> list[str]:
  student, trained = summary['student'], summary.get('network', 'student')
  rows = [
    ('teacher', summary.get('teacher'), ''),
    (f'{trained}, last', student.get('last'), ''),
    (f'{trained}, best', student.get('best'), 'best is picked on the test set'),
    ('control', summary.get('control'), 'same student and steps, on noise images labelled by the teacher'),
  ]
  if student['last'].get('top1') is None:  # Nothing real to be measured on.
    return ['no real test images']
  head = f'{"on real test images":19}' + ''.join(f'{title:>11}' for title in SHARES.values()) + f'{"cross-entropy":>15}'
  return [head] + [_row(name, result, note) for name, result, note in rows if result]


def _synthetic(student: dict) -> list[str]:
  """What fresh synthetic images say: of the student, and of themselves, if a judge looked at them."""
  last, best = student['last'], student.get('best') or {}
  best_round = f', best {_text(best.get("held_out_agreement"), "{:.2%}")} at round {best.get("round", 0):.0f}'
  found = [f'fresh synthetic images  agreement with the teacher {last["held_out_agreement"]:.2%} last{best_round}']
  return found


def _row(name: str, result: dict, note: str) -> str:
  shares = ''.join(f'{_text(result.get(key), "{:.2%}"):>11}' for key in SHARES)
  notes = '; '.join(filter(None, [_text(result.get('round'), 'round {:.0f}'), note]))
  return f'{name:19}{shares}{_text(result.get("cross_entropy"), "{:.4f}"):>15}  {notes}'.rstrip()


def _text(value: float | None, form: str) -> str:
  return '' if value is None else form.format(float(value))


def _quotient(sizes: dict) -> str:
  if not sizes.get('teacher'):
    return ''
  return f', teacher {sizes["teacher"]:,}: {sizes["student"] / sizes["teacher"]:.3f} of it'


def _times(seconds: dict[str, float], wall: float | None) -> list[str]:
  """The largest part first; what no part counted is 'other'."""
  parts = {name: value for name, value in seconds.items() if value > 0}
  total = sum(parts.values()) if wall is None else wall
  if total - sum(parts.values()) > 0.005 * total:
    parts['other'] = total - sum(parts.values())
  ordered = sorted(parts.items(), key=lambda part: -part[1])
  rows = [f'{value:27.1f} s {value / total:4.0%}  {name}' for name, value in ordered]
  return [f'time              {total:9.1f} s in all', *rows]
