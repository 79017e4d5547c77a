"""Versions and devices that a run uses."""

import importlib.metadata
import os
import platform

import jax

import dfkd_jax

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def versions() -> dict[str, str]:
  """Returns the versions of Python, of this library and of the packages it computes with."""
  return {'python': platform.python_version(), 'dfkd_jax': dfkd_jax.__version__} | {
      name: importlib.metadata.version(name) for name in _PACKAGES}


def device() -> dict[str, str | int]:
  """Describes accelerator and host: platform, kind, count, processes, cpu (model), usable cores."""
  devices = jax.devices()
  has_affinity = hasattr(os, 'sched_getaffinity')
  return {
      'platform': devices[0].platform,
      'kind': devices[0].device_kind,
      'count': len(devices),
      'processes': jax.process_count(),
      'cpu': _cpu_model(),
      'cores': len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1}


def _cpu_model() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
      models = [line.split(':', 1)[1].strip() for line in file if line.startswith('model name')]
  except OSError:
    models = []
  return models[0] if models else platform.processor() or platform.machine() or 'unknown'
