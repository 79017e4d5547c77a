"""Numbers that are not finite: the first one of a round, and a report to reproduce it."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import parallel, report
from dfkd_jax.types import PRNGKey, PyTree

REPORT = 'fault.json'


class Fault(ValueError):  # noqa: N818 (a number is wrong, not the program)
  """The first number of a round that is not finite.

  Args:
    part: 'synthesis', 'student', or 'state': everything that the round leaves behind.
    name: The term, or the array of the state.
    value: The number; None of an array.
    step: Inner step of the call, or step of the student in it, from 0; None of the state.
    call: Call of the round, from 0.
  """

  def __init__(
      self, part: str, name: str, value: float | None = None, step: int | None = None,
      call: int | None = None):
    self.about = {'part': part, 'name': name, 'value': None if value is None else str(value),
                  'step': step, 'call': call}
    when = '' if step is None else f' at step {step} of call {call}'
    text = 'not finite' if value is None else value
    super().__init__(f'{name!r} of the {part} is {text}{when}')


def check_series(part: str, series: Mapping[str, np.ndarray], call: int = 0) -> None:
  """Raises Fault at the earliest step [num_steps] at which a series is not finite.

  At one step, a term is named before the 'loss', which is the sum of the terms.
  """
  faults = []
  for name, values in series.items():
    is_bad = ~np.isfinite(np.asarray(values, np.float64))
    if is_bad.any():
      faults.append((int(is_bad.argmax()), name == 'loss', name))
  if faults:
    step, _, name = min(faults)
    raise Fault(part, name, float(series[name][step]), step, call)


@contextlib.contextmanager
def attach_key(key: PRNGKey) -> Iterator[None]:
  """Adds the key of the call to a Fault within, to reproduce it."""
  try:
    yield
  except Fault as fault:
    fault.about['key'] = np.asarray(jax.random.key_data(key)).tolist()
    raise


class FiniteCheck(NamedTuple):
  """A compiled check that every array of a state is finite."""

  names: tuple[str, ...]  # of the arrays
  program: Any  # (list of the arrays) -> [n] bool

  def check(self, state: PyTree) -> None:
    """Raises Fault for the first array that is not finite."""
    is_finite = np.asarray(self.program(list(_float_arrays(state).values())))
    if not is_finite.all():
      raise Fault('state', self.names[int(is_finite.argmin())])


def compile_finite_check(state: PyTree) -> FiniteCheck:
  """Compiles the check for a state's shapes. Skips integers and NumPy arrays."""
  arrays = _float_arrays(state)
  program = jax.jit(lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))
  return FiniteCheck(tuple(arrays), program.lower(list(arrays.values())).compile())


def _float_arrays(state: PyTree) -> dict[str, Any]:
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(state)
      if jnp.issubdtype(leaf.dtype, jnp.inexact) and not isinstance(leaf, np.ndarray)}


def write_report(path: pathlib.Path, about: Mapping[str, Any]) -> None:
  """Writes a report of a fault, on the first process. Errors are raised on all processes."""
  with parallel.raise_on_all_processes():
    if parallel.is_first():
      with report.reporting_disk_errors(path), report.replace_file(path) as file:
        file.write(json.dumps(about, indent=2).encode() + b'\n')
