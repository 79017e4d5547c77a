"""On what a run ran."""

import importlib.metadata
import os
import platform

import jax

import dfkd_jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def versions() -> dict[str, str | None]:
  """Versions of Python, of this library and of what it stands on; None for what is not installed."""
  return {'python': platform.python_version(), 'dfkd_jax': dfkd_jax.__version__} | {
    name: _version(name) for name in PACKAGES
  }


def device() -> dict[str, str | int]:
  """Accelerator and host: platform, kind, count, processes, cpu (model), cores (those this process may use)."""
  devices = jax.devices()
  return {
    'platform': devices[0].platform,
    'kind': devices[0].device_kind,
    'count': len(devices),
    'processes': jax.process_count(),
    'cpu': _cpu_model(),
    'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1,
  }


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _cpu_model() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
      models = [line.split(':', 1)[1].strip() for line in file if line.startswith('model name')]
  except OSError:
    models = []
  return models[0] if models else platform.processor() or platform.machine() or 'unknown'
