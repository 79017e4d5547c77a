"""Full and read-only disks and truncated checkpoints cost a run one line; nothing is lost."""

import contextlib
import functools
import json
import os
import shutil
import subprocess

import pytest
import toy_runs

from dfkd_jax import train

FILES = ('images.png', 'student.safetensors', 'student_best.safetensors')


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


@functools.cache
def undisturbed():
  """Results of the toy run, and its folder after four rounds with checkpoints 2 and 4."""
  folder = toy_runs.folder() / 'storage'
  toy_runs.stopped(toy_runs.config(), folder / 'stopped', 5)
  train.run(toy_runs.config(), folder / 'whole')
  assert sorted(path.name for path in (folder / 'stopped' / 'checkpoints').iterdir()) == ['2', '4']
  return results(folder / 'whole'), folder / 'stopped'


def results(workdir):
  """All that a run came to: metrics, scores, and the bytes of its files."""
  summary = json.loads((workdir / 'summary.json').read_text())
  return toy_runs.metrics(workdir), summary['student'], [(workdir / name).read_bytes()
      for name in FILES]


@contextlib.contextmanager
def disk(place, size):
  """A file system of its own, of so many kilobytes; skips where it may not be mounted."""
  place.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', f'size={size}k', 'tmpfs', str(place)]
  if shutil.which('mount') is None or subprocess.run(command, capture_output=True,
      check=False).returncode:
    pytest.skip('A tmpfs cannot be mounted here.')
  try:
    yield place
  finally:
    subprocess.run(['umount', '-l', str(place)], check=True)


def remount(place, options):
  subprocess.run(['mount', '-o', f'remount,{options}', str(place)], check=True)


def fails_in_a_line(workdir, *words):
  with pytest.raises(ValueError) as error:  # noqa: PT011 (the words follow)
    train.run(toy_runs.config(), workdir)
  text = str(error.value)
  assert len(text.splitlines()) == 1
  assert len(text) < 600
  for word in words:
    assert word in text
  return text


def used(place):
  """Kilobytes."""
  found = os.statvfs(place)
  return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024


@pytest.mark.parametrize('spare', [
    0, pytest.param(40, marks=pytest.mark.exhaustive), 120])
def test_a_full_disk_costs_a_line_and_once_there_is_room_nothing(tmp_path, spare):
  """With `spare` kilobytes beside two checkpoints, the disk becomes full later in the run."""
  wanted, stopped = undisturbed()
  with disk(tmp_path / 'disk', 20_000) as place:
    workdir = place / 'run'
    shutil.copytree(stopped, workdir)
    before = toy_runs.tree_of(workdir / 'checkpoints' / '4')
    remount(place, f'size={used(place) + spare}k')
    fails_in_a_line(workdir, str(workdir), 'No space left')
    assert toy_runs.tree_of(workdir / 'checkpoints' / '4') == before
    remount(place, 'size=20000k')
    train.run(toy_runs.config(), workdir)
    assert results(workdir) == wanted


def test_a_new_run_on_a_full_disk(tmp_path):
  wanted, _ = undisturbed()
  with disk(tmp_path / 'disk', 64) as place:
    fails_in_a_line(place / 'run', str(place), 'No space left')
    remount(place, 'size=20000k')
    train.run(toy_runs.config(), place / 'run')
    assert results(place / 'run') == wanted


@pytest.mark.exhaustive
@pytest.mark.parametrize('size', [56, 64])
def test_as_a_process_a_full_disk_is_one_line(tmp_path, size):
  """Kilobytes: most often several arrays fail at once, each with an error of its own."""
  config = toy_runs.config_file('full.py')
  with disk(tmp_path / 'disk', size) as place:
    found = toy_runs.process(f'--config={config}', f'--workdir={place / "run"}', cwd=tmp_path)
  assert found.returncode == 2, found.stderr
  *rounds, last = found.stderr.partition('Results go to ')[2].splitlines()[1:]
  assert last.startswith(f'error: Cannot save in {place}')
  assert 'No space left' in last
  assert last.endswith('. There is no checkpoint yet.')
  assert all(line.startswith('round ') for line in rounds), found.stderr


def test_a_read_only_disk_costs_a_line(tmp_path):
  wanted, stopped = undisturbed()
  with disk(tmp_path / 'disk', 20_000) as place:
    shutil.copytree(stopped, place / 'run')
    before = toy_runs.tree_of(place)
    remount(place, 'ro')
    fails_in_a_line(place / 'run', str(place / 'run'))
    fails_in_a_line(place / 'new', str(place / 'new'))
    assert toy_runs.tree_of(place) == before
    remount(place, 'rw')
    train.run(toy_runs.config(), place / 'run')
    assert results(place / 'run') == wanted


@pytest.mark.parametrize('tenths', [
    0, 6, *(pytest.param(tenths, marks=pytest.mark.exhaustive)
            for tenths in (1, 2, 3, 4, 5, 7, 8, 9))])
def test_a_cut_off_checkpoint_is_passed_over(tmp_path, tenths, capfd):
  """Arrays or meta data are cut to `tenths` of their length."""
  wanted, stopped = undisturbed()
  latest = stopped / 'checkpoints' / '4'
  arrays, about = [*latest.glob('state/**/d/*')], [latest / 'meta' / 'metadata']
  assert arrays
  for number, paths in enumerate((arrays, about) if tenths % 3 == 0 else (arrays,)):
    workdir = tmp_path / str(number)
    shutil.copytree(stopped, workdir)
    for path in paths:
      cut = workdir / path.relative_to(stopped)
      cut.write_bytes(path.read_bytes()[:path.stat().st_size * tenths // 10])
    capfd.readouterr()
    train.run(toy_runs.config(), workdir)
    err = capfd.readouterr().err
    assert 'ead step 4 in' in err
    assert 'It is set aside. The checkpoint before it is used.' in err
    assert 'after round 2' in err
    assert (workdir / 'checkpoints' / 'damaged-4').is_dir()
    assert results(workdir) == wanted


@pytest.mark.parametrize(('file', 'words'), [('metadata', 'No checkpoint of [2, 4] can be read')])
def test_without_any_that_can_be_read_nothing_is_begun_anew(tmp_path, file, words):
  _, stopped = undisturbed()
  shutil.copytree(stopped, tmp_path / 'run')
  for step in ('2', '4'):
    (tmp_path / 'run' / 'checkpoints' / step / 'meta' / file).write_text('')
  before = toy_runs.tree_of(tmp_path)
  fails_in_a_line(tmp_path / 'run', words)
  assert toy_runs.tree_of(tmp_path) == before


@pytest.mark.exhaustive
def test_checkpoints_of_another_method_student_or_version(tmp_path):
  _, stopped = undisturbed()
  shutil.copytree(stopped, tmp_path / 'run')
  before = toy_runs.tree_of(tmp_path)
  other = toy_runs.config()
  other.student.options = dict(widths=(2, 4), strides=(1, 2))
  for config, resume, words in (
      (other, None, r'student\.options\.widths is \[2, 3\] there, \[2, 4\] here'),
      (other, 'force', r'another architecture.*\[3\] there, .*\[4\] here'),
      (toy_runs.config(method__meta_lr=0.5), None, 'method.meta_lr'),
      (toy_runs.config(method__carry_latents=True), 'force',
          'another architecture.*synthesis/latents')):
    with pytest.raises(ValueError, match=words) as error:
      train.run(config, tmp_path / 'run', resume=resume)
    assert len(str(error.value).splitlines()) == 1
    assert toy_runs.tree_of(tmp_path) == before
  path = tmp_path / 'run' / 'checkpoints' / '4' / 'meta' / 'metadata'
  path.write_text(
      path.read_text().replace('"format": 1', '"format": 9').replace('"format":1', '"format":9'))
  fails_in_a_line(tmp_path / 'run', 'has format 9; this version reads 1')
