"""Versions and devices that a run uses."""

import contextlib
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
  devices, cpu = jax.devices(), platform.processor() or platform.machine()
  with contextlib.suppress(OSError), open('/proc/cpuinfo', errors='replace') as file:
    cpu = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), cpu)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return {'platform': devices[0].platform, 'kind': devices[0].device_kind, 'count': len(devices),
          'processes': jax.process_count(), 'cpu': cpu, 'cores': cores}
