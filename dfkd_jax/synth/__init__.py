"""Data-free synthesis as a library: `import dfkd_jax.synth`.

synthesizer = synth.create('fast_dfkd', generator=..., image_shape=(32, 32, 3), ...)
state = synthesizer.init(key, teacher)
state, metrics = synthesizer.synthesize(state, key, teacher, student)
batch = synthesizer.sample(state, key)
"""

import importlib
import inspect
import pkgutil
from typing import Any

from dfkd_jax.messages import check_choice
from dfkd_jax.synth import generators, inner_loop, methods, objective, replay
from dfkd_jax.synth.objective import Factors
from dfkd_jax.synth.synthesizer import Synthesizer

__all__ = ['Factors', 'Synthesizer', 'create', 'generators', 'names', 'objective', 'inner_loop', 'replay']


def names() -> tuple[str, ...]:
  """Names of all methods: the files in `synth/methods`."""
  return tuple(sorted(module.name for module in pkgutil.iter_modules(methods.__path__)))


def create(name: str, **numbers: Any) -> Synthesizer:
  """Makes a method by the name of its file in `synth/methods`.

  Args:
    name: Such as 'fast_dfkd'; see `names()`.
    **numbers: Of the function of the same name in that file.

  Raises:
    ValueError: If there is no such method, or it has no such number.
  """
  for number in numbers:
    check_choice(number, parameters(name), f'argument of {name}')
  return _constructor(name)(**numbers)


def parameters(name: str) -> tuple[str, ...]:
  """What `create(name, ...)` takes."""
  return tuple(inspect.signature(_constructor(name)).parameters)


def _constructor(name: str):
  return getattr(importlib.import_module(f'{methods.__name__}.{check_choice(name, names(), "method")}'), name)
