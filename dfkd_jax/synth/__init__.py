"""Data-free synthesis as a library: `import dfkd_jax.synth`.

synthesizer = synth.create('fast_dfkd', generator=..., image_shape=(32, 32, 3), ...)
state = synthesizer.init(key, teacher)
state, metrics = synthesizer.synthesize(state, key, teacher, student)
batch = synthesizer.sample(state, key)
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from dfkd_jax.messages import check_choice
from dfkd_jax.synth import generators, inner_loop, methods, objective, replay
from dfkd_jax.synth.objective import Adversary, Factors
from dfkd_jax.synth.synthesizer import Synthesizer

__all__ = ['Adversary', 'Factors', 'Synthesizer', 'create', 'defaults', 'generators', 'inner_loop',
           'names', 'objective', 'parameters', 'replay']


def names() -> tuple[str, ...]:
  """Returns the names of all methods: the files in `synth/methods`."""
  return tuple(sorted(module.name for module in pkgutil.iter_modules(methods.__path__)))


def create(name: str, **arguments: Any) -> Synthesizer:
  """Makes a method by the name of its file in `synth/methods`.

  Args:
    name: Such as 'fast_dfkd'; see `names()`.
    **arguments: Of the function of the same name in that file. Fields of its groups of settings
      (`inner`, `outer`, `layout`, ...) are given by their own names: `num_steps=5`.

  Raises:
    ValueError: There is no such method or argument, or a value is not allowed.
  """
  constructor = _constructor(name)
  for argument in arguments:
    check_choice(argument, parameters(name), f'argument of {name}')
  for group, settings in _groups(constructor).items():
    fields = {field.name for field in dataclasses.fields(settings)} & arguments.keys()
    changes = {field: arguments.pop(field) for field in fields}
    arguments[group] = dataclasses.replace(settings, **changes)
  return constructor(**arguments)


def parameters(name: str) -> tuple[str, ...]:
  """Returns the names of the arguments that `create(name, ...)` takes."""
  return tuple(defaults(name))


def defaults(name: str) -> dict[str, Any]:
  """Returns the default of each argument of `create(name, ...)`; `inspect.Parameter.empty`
  where it has none.
  """
  constructor, values = _constructor(name), {}
  groups = _groups(constructor)
  for argument, parameter in inspect.signature(constructor).parameters.items():
    if argument in groups:
      settings = groups[argument]
      values |= {field.name: getattr(settings, field.name)
                 for field in dataclasses.fields(settings)}
    else:
      values[argument] = parameter.default
  return values


def _groups(constructor: Callable[..., Synthesizer]) -> dict[str, Any]:
  """Default settings of the arguments that group several: frozen dataclasses."""
  return {argument: parameter.default
          for argument, parameter in inspect.signature(constructor).parameters.items()
          if dataclasses.is_dataclass(parameter.default)}


def _constructor(name: str) -> Callable[..., Synthesizer]:
  module = importlib.import_module(f'{methods.__name__}.{check_choice(name, names(), "method")}')
  return getattr(module, name)
