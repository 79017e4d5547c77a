"""Four virtual CPU devices for every test, and where the shared reference values lie."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import signal
import tempfile

# JAX reads these when it is imported. Tolerances are for CPU, and four devices are needed.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most of the time goes to compiling programs that run for milliseconds.
os.environ.setdefault('XLA_FLAGS', ' '.join((
    '--xla_force_host_platform_device_count=4', '--xla_backend_optimization_level=1',
    # Halves the time of compiling, and takes an eighth off the rest. Later versions abort at an
    # unknown flag.
    *(['--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1']
      if importlib.metadata.version('jaxlib').startswith('0.10.') else []))))
os.environ.setdefault('PJRT_NPROC', '32')  # Collectives deadlock without it on two cores.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  # All workers share what they compile. The folder is removed with the process that made it.
  _programs = tempfile.TemporaryDirectory(prefix='dfkd_jax_programs_')
  os.environ |= {
      'JAX_COMPILATION_CACHE_DIR': _programs.name,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}

import jax
import numpy as np
import pytest
import refusals

HERE = pathlib.Path(__file__).resolve().parent
SHARED = HERE.parent.parent / 'shared'
# Files of minutes, begun first, so that no worker waits for the other at the end.
_LONGEST = (
    'runs/test_changed_configs.py', 'config/test_configs.py', 'test_docs.py',
    'parallel/test_processes.py', 'jobs/test_train.py', 'jobs/test_methods.py',
    'synth/test_host_replay.py', 'synth/test_contract.py', 'runs/test_resume.py',
    'runs/test_storage_faults.py', 'synth/test_fast_dfkd.py', 'synth/test_cmi.py',
    'synth/test_ssd_kd.py', 'weights/test_loading.py')
# Files that use every method and augmentation. In these a key that is used twice is an error. The
# check takes an eighth of the time; --exhaustive makes it everywhere.
_KEYS_CHECKED = [HERE / name for name in (
    'synth/test_contract.py', 'distill/test_distill.py', 'test_augment.py')]
# Traces allocate much and leave little for the collector to find.
gc.set_threshold(100_000, 50, 50)


def pytest_addoption(parser):
  parser.addoption('--exhaustive', action='store_true', help='also run the tests marked exhaustive')


def pytest_configure(config):
  refusals.is_exhaustive = config.getoption('--exhaustive')


def pytest_collection_modifyitems(config, items):
  if not config.getoption('--exhaustive'):
    further = [item for item in items if item.get_closest_marker('exhaustive')]
    config.hook.pytest_deselected(items=further)
    items[:] = [item for item in items if not item.get_closest_marker('exhaustive')]
  ranks = {HERE / name: rank for rank, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_runtest_setup(item):
  is_checked = item.config.getoption('--exhaustive') or item.path in _KEYS_CHECKED
  jax.config.update('jax_debug_key_reuse', is_checked)


@pytest.fixture(autouse=True, scope='module')
def _few_maps():
  """Drops compiled programs before the process has more memory maps than Linux allows, 65,530."""
  yield
  maps = pathlib.Path('/proc/self/maps')  # Some 60 lines for a program.
  if maps.exists() and maps.read_text().count('\n') > 25_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
  """Float64 for the length of a test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def heeded():
  """Signals as in a terminal, also for tests started in the background, which ignores SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def golden(name: str) -> dict[str, np.ndarray]:
  """Reference values, from the full set where it is at hand, else the committed subset.

  Args:
    name: Without ending, such as 'losses'.
  """
  for folder in (SHARED / 'golden', HERE / 'golden'):
    path = folder / f'{name}.npz'
    if path.exists():
      with np.load(path) as archive:
        return dict(archive)
  pytest.skip(f'Reference values {name}.npz are not at hand.')


def shared_loader():
  """Returns the module that loads the shared real data sets; skips the test without it."""
  path = SHARED / 'data' / 'load.py'
  if not path.exists():
    pytest.skip('The shared real data sets are not at hand.')
  spec = importlib.util.spec_from_file_location('load', path)
  loader = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loader)
  return loader
