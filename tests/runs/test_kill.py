"""A killed run resumes bit for bit. Each run is a process, as under a scheduler."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
import run_processes
import toy_runs

spec = importlib.util.spec_from_file_location('kill', toy_runs.ROOT / 'benchmarks' / 'kill.py')
kill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill)


@pytest.fixture(scope='module')
def arguments():
  """A toy run whose files all processes see, with programs that they keep."""
  return [f'--config={toy_runs.config_file("killed.py", distill__rounds=25, checkpoint__every=2)}']


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  monkeypatch.setenv('PYTHONPATH', str(toy_runs.ROOT))


def test_kills_change_nothing(arguments, tmp_path, capsys):
  """Of every kind; benchmarks/kill.py has more of them, of the quick start."""
  status = kill.main(['--kills=3', '--a_run=3', f'--workdir={tmp_path / "kills"}', *arguments])
  found = json.loads((tmp_path / 'kills' / 'kills.json').read_text())
  assert status == 0, capsys.readouterr().out
  assert len(found['kills']) == 3
  assert sum(run['kills'] for run in found['runs']) == 3
  assert found['results'] > 30
  assert all(run['differing'] == [] for run in found['runs'])


def test_what_differs_is_named(tmp_path):
  import numpy as np

  one = {'a': np.float32([1, 2]), 'b': [{'loss': 1.0}], 'c': np.int32(3)}
  assert kill.differing(one, one) == []
  assert kill.differing(one, one | {'a': np.float32([1, np.nextafter(np.float32(2), 3)])}) == ['a']
  assert kill.differing(one, one | {'a': np.float64([1, 2])}) == ['a']
  assert kill.differing(one, one | {'b': [{'loss': 1.5}], 'd': 0}) == ['b', 'd']


@pytest.mark.parametrize(('number', 'status'), [
    (signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive)])
def test_a_signal_ends_the_process_in_order(arguments, tmp_path, number, status, heeded):
  workdir = tmp_path / 'run'
  command = [sys.executable, str(toy_runs.ROOT / 'main.py'), *arguments, f'--workdir={workdir}',
             '--config.distill.rounds=100000', '--config.optimizer.schedule=constant']
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
    for line in run.stderr:
      if line.startswith('round 1/100000  '):
        os.kill(run.pid, number)
        break
    out, err = run.communicate(timeout=120)
  assert run.returncode == status
  assert out == ''
  last = err.splitlines()[-1]
  assert last.startswith(f'Stopped by {signal.Signals(number).name} after round ')
  assert last.endswith(f'saved in {workdir}; the same command goes on.')
  done = int(last.split('after round ')[1].split()[0])
  assert (workdir / 'checkpoints' / str(done)).is_dir()


SHARED_CONFIG = """
import os
from ml_collections import config_dict

def get_config():
  config = config_dict.ConfigDict({fields!r})
  config.distributed.update(
      coordinator='127.0.0.1:{port}', num_processes=2, process_id=int(os.environ['PROCESS']))
  return config
"""


@pytest.mark.exhaustive  # As commands; tests/parallel has it within processes that run anyway.
def test_a_signal_to_one_of_two_processes_ends_both(tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2')
  monkeypatch.setenv('PJRT_NPROC', '32')
  config = run_processes.config(
      distill__rounds=100_000, optimizer__schedule='constant', checkpoint__every=1_000)
  path, workdir = tmp_path / 'config.py', tmp_path / 'run'
  path.write_text(SHARED_CONFIG.format(fields=config.to_dict(), port=run_processes.free_port()))
  command = [sys.executable, str(toy_runs.ROOT / 'main.py'), f'--config={path}',
      f'--workdir={workdir}']
  first, second = (
      subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                       env=os.environ | {'PROCESS': str(index)}) for index in range(2))
  with first, second:
    try:
      for line in first.stderr:
        if line.startswith('round 1/100000  '):
          second.send_signal(signal.SIGTERM)
          break
      said, _ = first.communicate(timeout=120)[1], second.communicate(timeout=120)
    finally:
      first.kill()
      second.kill()
  assert (first.returncode, second.returncode) == (0, 0)
  assert said.splitlines()[-1].startswith('Stopped by SIGTERM after round ')
  step, = (int(found.name) for found in (workdir / 'checkpoints').iterdir())
  assert f'after round {step} of 100000, saved' in said


@pytest.mark.parametrize(('number', 'status'), [
    (signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive)])
def test_a_signal_while_programs_compile_ends_a_run_at_once(
    arguments, tmp_path, monkeypatch, number, status, heeded):
  monkeypatch.setenv('JAX_LOG_COMPILES', '1')
  command = [sys.executable, str(toy_runs.ROOT / 'main.py'), *arguments,
      f'--workdir={tmp_path / "run"}']
  with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
      text=True) as run:
    for line in run.stderr:
      if 'Compiling ' in line:
        run.send_signal(number)
        break
    said = run.communicate(timeout=120)[1].splitlines()
  assert run.returncode == status
  assert said[-1].startswith(
      f'Stopped by {signal.Signals(number).name}. The same command goes on from the last ')
  assert not any('Traceback' in line for line in said)
  assert not (tmp_path / 'run').exists()
