"""Two processes of two devices each against one process with four devices, or with one."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy_runs
from run_processes import config, free_port

from dfkd_jax import parallel, train
from dfkd_jax.config import build
from dfkd_jax.config.records import resolve
from dfkd_jax.parallel import launch, processes
from dfkd_jax.runs.checkpoint import Checkpoints

LIMIT = 600  # Seconds for all jobs of two processes.


def teacher_config(**changes):
  return toy_runs.config(**dict(
      num_devices=None, job='train', train__network='teacher', train__epochs=2,
      dataset__name='grey',
      augment__student__name='shift', augment__student__pad=1,
      optimizer__schedule='cosine_by_step', **changes))


def job(config, workdir, stop_after=None, changes=None, full=None, signalled=None):
  return {
      'config': config.to_dict(), 'workdir': str(workdir), 'stop_after': stop_after,
      'changes': changes or {}, 'full': full, 'signalled': signalled}


def in_processes(jobs, folder, number=2, devices=2):
  """Runs jobs in `number` processes; returns the results and both streams of each."""
  coordinator = {'coordinator': f'127.0.0.1:{free_port()}', 'num_processes': number, 'timeout': 60}
  for job_ in jobs:
    job_['config']['distributed'].update(coordinator)
  path = folder / 'jobs'
  path.write_bytes(pickle.dumps(jobs))
  flags = [flag for flag in os.environ['XLA_FLAGS'].split() if 'device_count' not in flag]
  environment = os.environ | {
      'XLA_FLAGS': ' '.join([*flags, f'--xla_force_host_platform_device_count={devices}']),
      'JAX_PLATFORMS': 'cpu', 'PJRT_NPROC': '32', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'PYTHONPATH': str(toy_runs.ROOT)}
  program = toy_runs.ROOT / 'tests' / 'one_process.py'
  running = [
      subprocess.Popen(
          [sys.executable, str(program), str(path), str(index)], env=environment, text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE) for index in range(number)]
  try:
    streams = [process.communicate(timeout=LIMIT) for process in running]
  finally:
    for process in running:
      process.kill()
      process.wait()
  assert [process.returncode for process in running] == [0] * number, streams
  return [
      json.loads((folder / f'results-{index}.json').read_text())
      for index in range(number)], streams


def contents(workdir):
  """Step and leaves of the last checkpoint, by path."""
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    step = checkpoints.latest()
    about = json.loads((workdir / 'checkpoints' / str(step) / 'meta' / 'metadata').read_text())
    template = {path: np.zeros(shape, dtype) for path, shape, dtype in about['leaves']}
    return step, checkpoints.restore(template)[0]


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


@pytest.fixture(scope='module')
def several(tmp_path_factory):
  """Results of two processes: whole and stopped runs, real data, missing data, two configs."""
  folder = tmp_path_factory.mktemp('processes')
  lacking = config().dataset.to_dict() | {'data_dir': str(folder / 'nothing')}
  results, streams = in_processes([
      job(config(), folder / 'whole'), job(config(), folder / 'stopped', stop_after=1),
      job(teacher_config(), folder / 'teacher'),
      job(config(), folder / 'lacking', changes={1: {'dataset': lacking}}),
      job(config(), folder / 'differing', changes={1: {'seed': 6}}),
      job(config(), folder / 'whole'), job(config(), folder / 'full', full=0),
      job(config(), folder / 'full'), job(config(), folder / 'signalled', signalled=1),
  ], folder)
  return folder, results, streams


@pytest.fixture(scope='module')
def single(tmp_path_factory):
  """The same in this process: on four devices and on one."""
  folder = tmp_path_factory.mktemp('single')
  return {
      number: (folder / str(number), train.run(config(num_devices=number), folder / str(number)))
          for number in (4, 1)}


def check(workdir, other_workdir):
  (step, leaves), (other_step, expected) = contents(workdir), contents(other_workdir)
  assert step == other_step == 3
  assert leaves.keys() == expected.keys()
  parts = {'/'.join(path.split('/')[:depth]) for path in leaves for depth in (2, 3)}
  assert {
      'student/network/batch_stats', 'student/network/params', 'student/opt_state',
      'synthesis/buffer/images', 'synthesis/buffer/histogram', 'synthesis/meta_params',
      'synthesis/meta_opt_state', 'synthesis/past'} <= parts
  for path, leaf in leaves.items():
    other = expected[path]
    assert leaf.dtype == other.dtype, path
    if path == 'synthesis/buffer/images':
      assert np.abs(leaf.astype(int) - other.astype(int)).max() <= 1
      assert (leaf == other).mean() > 0.999
    elif leaf.dtype.kind == 'f':
      np.testing.assert_allclose(
          leaf, other, rtol=1e-4, atol=1e-4 * np.abs(other).max(), err_msg=path)
    else:
      np.testing.assert_array_equal(leaf, other, err_msg=path)
  lines, expected_lines = toy_runs.metrics(workdir), toy_runs.metrics(other_workdir)
  assert len(lines) == 3
  for line, other in zip(lines, expected_lines, strict=True):
    assert line == pytest.approx(other, rel=1e-4)
    for name in ('top1', 'top5', 'agreement', 'count', 'step'):
      assert line[name] == other[name], name


@pytest.mark.parametrize('number', [4, 1])
def test_a_run_is_that_of_one_process(several, single, number):
  workdir, summary = single[number]
  folder, (results, _), _ = several
  check(folder / 'whole', workdir)
  for name in ('student', 'teacher', 'parameters'):
    assert results[0][name].keys() == summary[name].keys()
  for ours, theirs in ((results[0]['student']['last'], summary['student']['last']),
                       (results[0]['teacher'], summary['teacher'])):
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert (ours['top1'], ours.get('agreement')) == (theirs['top1'], theirs.get('agreement'))
  assert (results[0]['device']['count'], results[0]['device']['processes']) == (4, 2)
  assert results[0]['config_hash'] == summary['config_hash']


def test_the_student_has_moved(single):
  """The comparison above would notice a student that never moves."""
  network = build.fresh_network(
      resolve(config()).student, jax.random.split(jax.random.key(2), 5)[0])
  _, leaves = contents(single[1][0])
  for layer, weights in network.params.items():
    for name, value in weights.items():
      # Twice the tolerance above.
      assert np.abs(leaves[f'student/network/params/{layer}/{name}'] - value).max() > 2e-4
  lines = toy_runs.metrics(single[1][0])
  assert len({line['top1'] for line in lines}) > 1
  assert len({line['agreement'] for line in lines} - {0.0}) > 1


def test_all_processes_have_the_result_and_the_first_alone_speaks(several):
  folder, results, streams = several
  assert sorted(path.name for path in (folder / 'whole').iterdir()) == [
      '.lock', 'checkpoints', 'images.png', 'metrics.jsonl', 'student.safetensors',
      'student_best.safetensors', 'summary.json']
  for kind in ('student', 'teacher', 'config_hash'):
    assert results[0][0][kind] == results[1][0][kind]
  gloo = re.compile(r'\[Gloo\]|peer ranks')  # Its threads write into each other's lines.
  lines = [
      [line for line in stream.splitlines() if line and not gloo.search(line)]
      for stream in streams[1]]
  assert lines == [[], []]
  out, err = streams[0]
  assert 'student, last' in out
  assert 'The first of 2 processes waits at 127.0.0.1' in err
  assert 'round 3/3' in err
  assert json.loads((folder / 'whole' / 'summary.json').read_text()) == results[0][0]
  assert results[0][5] == results[1][5] == results[0][0]  # It had finished: nothing was done again.


def test_a_signal_to_one_of_two_processes_ends_both(several):
  folder, results, _ = several
  assert [(of_process[8]['stopped'], of_process[8]['done']) for of_process in results] == [
      ('SIGTERM', 1)] * 2
  assert contents(folder / 'signalled')[0] == 1


def test_a_run_of_two_processes_goes_on_in_one(several, single, capsys):
  folder, results, _ = several
  assert [of_process[1] for of_process in results] == ['KeyboardInterrupt: '] * 2
  assert contents(folder / 'stopped')[0] == 1
  summary = train.run(config(num_devices=1), folder / 'stopped')
  assert 'after round 1' in capsys.readouterr().err
  check(folder / 'stopped', single[1][0])
  assert summary['student']['last'] == pytest.approx(single[1][1]['student']['last'], rel=1e-4)


def test_training_on_real_data_is_that_of_one_process(several, tmp_path):
  folder, results, _ = several
  summary = train.run(teacher_config(), tmp_path)
  assert summary['device']['count'] == 4
  (_, leaves), (_, expected) = contents(folder / 'teacher'), contents(tmp_path)
  for path, leaf in expected.items():
    np.testing.assert_allclose(leaves[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)
  assert results[0][2]['student']['last'] == pytest.approx(summary['student']['last'], rel=1e-4)


def test_what_is_wrong_on_one_process_is_told_to_all(several):
  folder, results, _ = several
  first, second = (of_process[3] for of_process in results)
  assert second.startswith("InvalidError: Data set 'toy' is not prepared in")
  assert first.startswith("ValueError: Process 1 of 2: Data set 'toy' is not prepared in")
  assert not (folder / 'lacking').exists()
  for of_process in results:
    assert of_process[4] == (
        'ValueError: The config must be the same in all 2 processes, but differs.')


def test_what_the_first_alone_cannot_write_ends_all_and_they_go_on(several):
  _, results, _ = several
  first, second = (of_process[6] for of_process in results)
  reason = 'Cannot write metrics.jsonl: No space left on device.'
  assert (first, second) == (f'ValueError: {reason}', f'ValueError: Process 0 of 2: {reason}')
  for of_process in results:
    assert of_process[7]['student'] == of_process[0]['student']
  assert results[0][7]['counts']['starts'] == 2


@pytest.fixture
def joined(monkeypatch):
  """Settings with which JAX was told to meet others; no cluster is around."""
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **settings: calls.append(settings))
  for name in (*launch._COUNTS, *launch._HOSTS, 'SLURM_NTASKS'):
    monkeypatch.delenv(name, raising=False)
  return calls


def test_nobody_is_waited_for_without_a_cluster(joined, monkeypatch):
  launch.initialize()
  monkeypatch.setenv('SLURM_NTASKS', '4')  # Of a batch script, which is one process.
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '')
  launch.initialize()
  assert joined == []


@pytest.mark.parametrize(('name', 'value', 'number'), [
    ('SLURM_STEP_NUM_TASKS', '3', 3), ('OMPI_COMM_WORLD_SIZE', '2', 2),
    ('MEGASCALE_NUM_SLICES', '2', 2),
    ('TPU_WORKER_HOSTNAMES', 't0,t1,t2,t3', 4), ('TPU_PROCESS_ADDRESSES', 'a:1,b:1', 2)])
def test_a_cluster_of_several_is_left_to_jax(joined, monkeypatch, name, value, number):
  monkeypatch.setenv(name, value)
  assert launch.started_together() == number
  launch.initialize(timeout=17)
  settings, = joined
  assert settings.keys() == {'initialization_timeout', 'shutdown_timeout_seconds'}
  assert settings['shutdown_timeout_seconds'] <= 60
  assert settings['initialization_timeout'] > 17  # JAX aborts the process at its own timeout.
  launch.initialize(num_processes=1)
  assert len(joined) == 1  # By itself.


def test_what_is_given_is_taken(joined, monkeypatch):
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '8')
  launch.initialize('host7:1234', 2, 1, timeout=9)
  settings, = joined
  assert settings.pop('shutdown_timeout_seconds') <= 60
  assert settings.pop('initialization_timeout') > 9
  assert settings == {
      'coordinator_address': 'host7:1234', 'num_processes': 2, 'process_id': 1,
      'cluster_detection_method': 'deactivate'}
  launch.initialize('auto')
  assert joined[1].keys() == {'initialization_timeout', 'shutdown_timeout_seconds'}


@pytest.mark.parametrize(('arguments', 'words'), [
    (('h:1', None, None),
     r'distributed\.num_processes and distributed\.process_id must be set as well, since '
     r'distributed\.coordinator is\.'),
    ((None, 2, 1),
     r'distributed\.coordinator must be set as well, since distributed\.num_processes and '
     r'distributed\.process_id is\.'),
    (('h', 2, 1), r"distributed\.coordinator is 'h', must be 'host:port', or 'auto'\."),
    (('h:port', 2, 1), r"distributed\.coordinator is 'h:port', must be"),
    (('h:1', 2, 2), r'distributed\.process_id is 2, must be in 0\.\.1, for 2 processes\.'),
    (('h:1', 1, 1), r'distributed\.process_id is 1, must be in 0\.\.0')])
def test_what_does_not_fit_costs_one_line(joined, arguments, words):
  with pytest.raises(ValueError, match=words) as error:
    launch.initialize(*arguments)
  assert len(str(error.value).splitlines()) == 1
  assert joined == []


def test_a_run_says_so_too(tmp_path):
  fields = {'distributed__process_id': 1}
  with pytest.raises(
      ValueError, match=r'distributed\.coordinator and distributed\.num_processes must be set'):
    train.run(config(**fields), tmp_path / 'run')
  with pytest.raises(
      ValueError, match=r'distributed\.num_processes is 0, must be a whole number in \[1, inf\)'):
    train.run(config(distributed__num_processes=0), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


JOIN = """
import sys
from dfkd_jax.parallel import launch
try:
  launch.initialize({arguments}timeout=2)
except ValueError as error:
  sys.exit(f'error: {{error}}')
"""
SLURM = {
    'SLURM_JOB_ID': '4242', 'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_LOCALID': '0',
    'SLURM_STEP_NODELIST': 'localhost'}


@pytest.mark.parametrize(('process_id', 'cluster'), [
    (1, False), *(pytest.param(*each, marks=pytest.mark.exhaustive)
                  for each in ((0, False), (0, True), (1, True)))])
def test_a_process_whose_partner_never_joins_ends_with_one_line(cluster, process_id):
  coordinator = f'127.0.0.1:{free_port()}'
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(toy_runs.ROOT)}
  if cluster:
    environment |= SLURM | {
        'SLURM_PROCID': str(process_id), 'JAX_COORDINATOR_PORT': str(free_port())}
  arguments = '' if cluster else f'{coordinator!r}, 2, {process_id}, '
  ended = subprocess.run(
      [sys.executable, '-c', JOIN.format(arguments=arguments)], env=environment, text=True,
      capture_output=True, timeout=LIMIT, check=False)
  lines = ended.stderr.splitlines()
  if not cluster and process_id == 0:
    assert f'waits at {coordinator} for the others, 2 s at most' in lines.pop(0)
  assert (ended.returncode, ended.stdout, len(lines)) == (1, '', 1), ended.stderr
  place = '' if cluster else f' at {coordinator}'
  assert f'error: The processes of this run cannot meet: others did not join{place} ' in lines[0]
  assert 'within 2 s' in lines[0]
  assert 'distributed.num_processes=1' in lines[0]


def test_a_port_that_is_taken():
  with socket.create_server(('', 0)) as server:
    taken = f'127.0.0.1:{server.getsockname()[1]}'
    with pytest.raises(ValueError, match=f"'{taken}', but its port cannot be opened"):
      launch.initialize(taken, 2, 0)


def test_devices_were_asked_for_before(monkeypatch):
  assert jax.devices()
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '2')
  with pytest.raises(
      ValueError, match=r'The processes of this run cannot meet: jax\.distributed\.initialize'):
    launch.initialize()


def test_a_second_call_changes_nothing(joined, monkeypatch):
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  share(monkeypatch, 0, 2)
  launch.initialize('h:1', 2, 0)
  launch.initialize('auto')
  with pytest.raises(
      ValueError, match='distributed has process 1 of 2, but this one runs as 0 of 2 already'):
    launch.initialize('h:1', 2, 1)
  assert joined == []


def share(monkeypatch, process, number):
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  monkeypatch.setattr(jax, 'process_count', lambda: number)


@pytest.mark.parametrize(('total', 'number'), [(23, 2), (7, 3), (2, 5), (1, 4), (12, 1)])
def test_rows_are_shared_out(monkeypatch, total, number):
  rows, shares = np.arange(total * 2).reshape(total, 2), []
  for process in range(number):
    share(monkeypatch, process, number)
    shares.append(rows[parallel.process_rows(total)])
  np.testing.assert_array_equal(np.concatenate(shares), rows)
  sizes = [len(part) for part in shares]
  assert max(sizes) - min(sizes) <= 1
  longest = max(sizes)
  monkeypatch.setattr(processes, 'gather_processes', lambda padded: np.stack(
      [np.pad(part, [(0, longest - len(part)), (0, 0)]) for part in shares]))
  np.testing.assert_array_equal(parallel.gather_rows(shares[-1], total), rows)


def test_a_mesh_of_several_processes_has_all_devices(monkeypatch):
  share(monkeypatch, 0, 2)
  with pytest.raises(
      ValueError, match=r'num_devices is 2, must be None or 4, the devices of all 2 processes'):
    parallel.make_mesh(2)
  with pytest.raises(
      ValueError, match=r"one of 2 processes .* set distributed\.coordinator to 'auto'"):
    parallel.make_mesh()
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  with pytest.raises(ValueError, match=r'method\.num_tasks is 6, must be a positive multiple of 4'):
    build.make_mesh(resolve(config(method__num_tasks=6)))


def test_one_process_speaks_with_itself():
  value = np.float64(1 / 3)
  assert parallel.gather_processes(value).tolist() == [1 / 3]
  parallel.check_same_on_all('text', 'The config')
  with pytest.raises(ZeroDivisionError), parallel.raise_on_all_processes():
    1 / 0  # noqa: B018
