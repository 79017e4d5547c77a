"""Numbers that are not finite: the first one of a round, and a report to reproduce it."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import parallel, report
from dfkd_jax.types import PRNGKey, PyTree

REPORT = 'fault.json'


class Fault(ValueError):  # noqa: N818 (a number is wrong, not the program)
  """The first number of a round that is not finite: a term, or an array of the state.

  The `part` is 'synthesis', 'student', or 'state': everything that the round leaves behind. `key`
  reproduces the call. `step` counts the steps of a call, and `call` the calls of the round, from 0.
  An array of the state has no value, step or call.
  """

  def __init__(self, part: str, name: str, key: PRNGKey, value: float | None = None,
               step: int | None = None, call: int | None = None):
    self.about = {'part': part, 'name': name, 'value': None if value is None else str(value),
                  'step': step, 'call': call, 'key': np.asarray(jax.random.key_data(key)).tolist()}
    when = '' if step is None else f' at step {step} of call {call}'
    super().__init__(f'{name!r} of the {part} is {"not finite" if value is None else value}{when}')


def check_series(
    part: str, series: Mapping[str, np.ndarray], key: PRNGKey, call: int = 0) -> None:
  """Raises Fault at the earliest step [num_steps] at which a series is not finite.

  At one step, a term is named before the 'loss', which is the sum of the terms.
  """
  bad = {name: ~np.isfinite(np.asarray(values, np.float64)) for name, values in series.items()}
  faults = [(int(is_bad.argmax()), name == 'loss', name)
            for name, is_bad in bad.items() if is_bad.any()]
  if faults:
    step, _, name = min(faults)
    raise Fault(part, name, key, float(series[name][step]), step, call)


def compile_finite_check(state: PyTree) -> Callable[[PyTree, PRNGKey], None]:
  """Compiles a check for a state's shapes. It raises Fault for the first array not finite.

  Integers and NumPy arrays are not checked.
  """

  def float_arrays(state):
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and not isinstance(leaf, np.ndarray)}

  def check(state, key):
    is_finite = np.asarray(program(list(float_arrays(state).values())))
    if not is_finite.all():
      raise Fault('state', names[int(is_finite.argmin())], key)

  names, leaves = zip(*float_arrays(state).items(), strict=True)
  all_finite = jax.jit(lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))
  program = all_finite.lower(list(leaves)).compile()
  return check


def write_report(path: pathlib.Path, about: Mapping[str, Any]) -> None:
  """Writes a report of a fault, on the first process. Errors are raised on all processes."""
  with parallel.raise_on_all_processes():
    if parallel.is_first():
      with report.reporting_disk_errors(path), report.replace_file(path) as file:
        file.write(json.dumps(about, indent=2).encode() + b'\n')
