"""Four virtual CPU devices for every test, and where the shared reference values lie."""

import gc
import importlib.metadata
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

# The tolerances fit the CPU, and the tests want four devices.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most of the time goes to compiling programs that run for milliseconds.
os.environ.setdefault('XLA_FLAGS', ' '.join((
    '--xla_force_host_platform_device_count=4', '--xla_backend_optimization_level=1',
    # Halves it where it is known: later versions abort at the name.
    *(['--xla_cpu_use_fusion_emitters=false']
      if importlib.metadata.version('jaxlib').startswith('0.10.') else []))))
os.environ.setdefault('PJRT_NPROC', '32')  # On two cores, loops of collectives deadlock without.
HERE = pathlib.Path(__file__).resolve().parent
SHARED = HERE.parent.parent / 'shared'
jax.config.update('jax_debug_key_reuse', True)
# Traces allocate much and leave little for the collector to find.
gc.set_threshold(100_000, 50, 50)


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
