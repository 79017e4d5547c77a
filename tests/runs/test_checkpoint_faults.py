import pathlib
import re
import resource
import shutil

import jax
import numpy as np
import pytest

from dfkd_jax import parallel
from dfkd_jax.runs.checkpoint import Checkpoints, DamagedError, complete_steps, read_meta


def noise(size, seed=0):
  return {'a': np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)}


def make_state(seed):
  return {'student': noise(301, seed), 'ring': noise((7, 5, 3), seed)}


TEMPLATE = make_state(0)


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def one_line(error):
  text = str(error.value)
  assert '\n' not in text
  assert len(text) < 600


@pytest.fixture
def folder(tmp_path):
  return tmp_path / 'checkpoints'


@pytest.fixture
def saved(folder):
  """A folder with steps 3 and 8."""
  with Checkpoints(folder) as checkpoints:
    for step in (3, 8):
      checkpoints.save(step, make_state(step), {'round': step})
  return folder


def test_a_cut_off_save_is_ignored_and_swept(saved):
  shutil.copytree(saved / '8', saved / '9.orbax-checkpoint-tmp')
  shutil.rmtree(saved / '9.orbax-checkpoint-tmp' / 'meta')
  with Checkpoints(saved) as checkpoints:
    assert complete_steps(saved) == [3, 8]
    assert_same(checkpoints.restore(TEMPLATE)[0], make_state(8))
    checkpoints.save(9, make_state(9), {})
    assert checkpoints.latest() == 9
  assert not list(saved.glob('*tmp*'))


def test_a_folder_of_someone_else_is_no_checkpoint(saved):
  (saved / '11').mkdir()
  (saved / 'notes').mkdir()
  with Checkpoints(saved) as checkpoints:
    assert checkpoints.latest() == 8


@pytest.mark.parametrize('content', ['{"a": 1}', '[1]', '{"form'])
def test_foreign_and_damaged_meta_data_are_passed_over(saved, content):
  (saved / '8' / 'meta' / 'metadata').write_text(content)
  with Checkpoints(saved) as checkpoints:
    with pytest.raises(DamagedError, match='tep 8 in ') as error:
      checkpoints.restore(TEMPLATE, step=8)
    one_line(error)
    assert read_meta(saved) == {'round': 3}
    assert_same(checkpoints.restore(TEMPLATE)[0], make_state(3))
    assert list(checkpoints.damaged) == [8]
    checkpoints.save(8, make_state(9), {'round': 9})
    assert_same(checkpoints.restore(TEMPLATE)[0], make_state(9))
  assert (saved / 'damaged-8' / 'meta' / 'metadata').read_text() == content


def test_a_future_format_is_refused_and_not_passed_over(saved):
  (saved / '8' / 'meta' / 'metadata').write_text('{"format": 2, "leaves": [], "meta": {}}')
  before = sorted(saved.rglob('*'))
  with Checkpoints(saved) as checkpoints:
    for read in (lambda: read_meta(saved), lambda: checkpoints.restore(TEMPLATE)):
      with pytest.raises(
          ValueError, match=r'Step 8 in .* has format 2; this version reads 1') as error:
        read()
      one_line(error)
  assert sorted(saved.rglob('*')) == before


def test_damage_upon_damage_keeps_every_folder(saved):
  damage = lambda step: (saved / str(step) / 'meta' / 'metadata').write_text('{')
  for _ in range(2):
    damage(8)
    with Checkpoints(saved) as checkpoints:
      assert_same(checkpoints.restore(TEMPLATE)[0], make_state(3))
      checkpoints.save(8, make_state(8), {'round': 8})
  damage(8)
  damage(3)
  before = sorted(saved.rglob('*'))
  with Checkpoints(saved) as checkpoints:
    with pytest.raises(
        ValueError, match=r'No checkpoint of \[3, 8\] can be read\. Nothing was ch') as error:
      checkpoints.restore(TEMPLATE)
    one_line(error)
  assert sorted(saved.rglob('*')) == before
  assert sorted(path.name for path in saved.iterdir()) == ['3', '8', 'damaged-8', 'damaged-8-2']


def test_a_folder_without_its_meta_data_is_incomplete_and_does_not_stand_in_the_way(saved):
  shutil.rmtree(saved / '8' / 'meta')
  with Checkpoints(saved) as checkpoints:
    assert checkpoints.all_steps() == [3, 8]
    assert checkpoints.latest() == 3
    assert_same(checkpoints.restore(TEMPLATE)[0], make_state(3))
    assert 'it is incomplete' in checkpoints.damaged[8]
    checkpoints.save(8, make_state(8), {'round': 8})
    assert checkpoints.latest() == 8


def test_a_flipped_bit_is_noticed(saved):
  """TensorStore notices it in its own tables, and not in the arrays' bytes."""
  draw, noticed = np.random.default_rng(0), 0
  for path in [path for path in (saved / '8').rglob('*') if path.is_file() and path.stat().st_size]:
    whole = path.read_bytes()
    for _ in range(6):
      flipped = bytearray(whole)
      flipped[draw.integers(len(whole))] ^= 1 << draw.integers(8)
      path.write_bytes(flipped)
      with Checkpoints(saved) as checkpoints:
        try:
          assert_same(checkpoints.restore(TEMPLATE, step=8)[0], make_state(8))
        except DamagedError:
          noticed += 1
    path.write_bytes(whole)
  assert noticed > 20
  with Checkpoints(saved) as checkpoints:
    assert checkpoints.restore(TEMPLATE)[1] == {'round': 8}


@pytest.mark.parametrize('tenths', [None, 0, 5, 9])
def test_a_truncated_or_missing_file_never_gives_wrong_arrays(saved, tenths):
  failures = []
  for path in [path for path in (saved / '8').rglob('*') if path.is_file()]:
    whole = path.read_bytes()
    path.unlink() if tenths is None else path.write_bytes(whole[: len(whole) * tenths // 10])
    with Checkpoints(saved) as checkpoints:
      try:
        assert_same(checkpoints.restore(TEMPLATE, step=8)[0], make_state(8))
      except ValueError as error:
        failures.append(str(error))
        assert_same(checkpoints.restore(TEMPLATE, step=3)[0], make_state(3))
    path.write_bytes(whole)
  assert len(failures) >= 3
  for failure in failures:
    assert re.fullmatch(r'Cannot read step 8 in .*', failure)


def test_an_error_while_reading_is_one_short_line_however_many_arrays(folder):
  state = {f'leaf {number}': noise(4_001, number) for number in range(20)}
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    for path in (folder / '1' / 'state').glob('**/d/*'):
      path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        ValueError, match=r'Cannot read step 1 in .* is not valid for value of size 200$') as error:
      checkpoints.restore(state)
    one_line(error)


def test_reading_meta_data_changes_nothing(saved):
  (saved / '9.orbax-checkpoint-tmp').mkdir()
  before = sorted(saved.rglob('*'))
  assert read_meta(saved) == {'round': 8}
  with pytest.raises(ValueError, match='There is no checkpoint in'):
    read_meta(saved / 'missing')
  assert sorted(saved.rglob('*')) == before


def test_an_unwritable_folder_is_refused_at_once(tmp_path):
  (tmp_path / 'file').write_text('')
  for place in (tmp_path / 'file' / 'checkpoints', tmp_path / 'file',
      pathlib.Path('/proc/checkpoints')):
    with pytest.raises(ValueError, match=f'Cannot write to {place}: .*') as error:
      Checkpoints(place)
    one_line(error)


@pytest.fixture
def small_files():
  """The system refuses files above 100 kB, as it does when a disk is full."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failing_disk_is_reported_and_loses_nothing(folder, small_files):
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, noise(1_000), {})
    checkpoints.save(2, noise(3_000_000), {})
    with pytest.raises(ValueError, match=r'Cannot save in .*File too large') as error:
      checkpoints.save(3, noise(1_000), {})
    one_line(error)
    assert_same(checkpoints.restore(noise(1_000))[0], noise(1_000))
    checkpoints.save(4, noise(2_000), {})
    checkpoints.wait()
    assert complete_steps(folder) == [1, 4]


def test_closing_reports_a_failed_save_but_hides_no_earlier_error(folder, small_files):
  def run(error):
    with Checkpoints(folder) as checkpoints:
      checkpoints.save(1, noise(3_000_000), {})
      if error:
        raise error

  with pytest.raises(ValueError, match=r'Cannot save in .*File too large'):
    run(None)
  with pytest.raises(ZeroDivisionError):
    run(ZeroDivisionError())


@pytest.mark.parametrize('error', [
    MemoryError(), OSError(5, 'Input/output error'), PermissionError(13, 'Permission denied'),
    ValueError('RESOURCE_EXHAUSTED: Out of memory')])
def test_what_says_nothing_of_a_checkpoint_is_no_damage(tmp_path, monkeypatch, error):
  state = {'a': np.arange(3.0)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.save(2, state, {})
    checkpoints.wait()

    def fail(*arguments, **more):
      raise error

    monkeypatch.setattr(checkpoints._manager, 'restore', fail)
    with pytest.raises(ValueError, match=r'^Cannot read step 2 in ') as found:
      checkpoints.restore(state)
    assert not isinstance(found.value, DamagedError)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2']


def test_a_read_that_fails_on_another_process_is_an_error_here(tmp_path, monkeypatch):
  state = {'a': np.arange(3.0)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    monkeypatch.setattr(parallel, 'gather_processes', lambda own: np.array([own, 2]))
    with pytest.raises(ValueError, match=r'^Cannot read step 1 in .* on another process'):
      checkpoints.restore(state)


def _saved(checkpoints, state):
  checkpoints.save(2, state, {})
  checkpoints.wait()


def test_a_folder_that_is_gone_is_told_in_a_line(tmp_path):
  state = {'a': np.arange(3.0)}
  folder = tmp_path / 'checkpoints'
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    shutil.rmtree(folder)
    folder.write_text('here')
    with pytest.raises(ValueError, match=r'^Cannot save') as error:
      _saved(checkpoints, state)
    assert len(str(error.value).splitlines()) == 1
