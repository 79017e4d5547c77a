"""Numbers that are not finite: where they first came up, and what repeats it."""

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


class Fault(ValueError):  # noqa: N818 (what is wrong is a number, not the program)
  """The first number of a round that is not finite.

  Args:
    part: Of the round: 'synthesis', 'student' or 'state', all that the round leaves behind.
    name: Of the term, or of the array in the state.
    value: The number; None of an array.
    step: Of the call's inner steps, or of the student's in this call, from 0; None of the state.
    call: Of the round, from 0.
  """

  def __init__(
      self, part: str, name: str, value: float | None = None, step: int | None = None, call: int | None = None):
    self.about = {'part': part, 'name': name, 'value': None if value is None else str(value), 'step': step,
                  'call': call}
    when = '' if step is None else f' at step {step} of call {call}'
    super().__init__(f'{name!r} of the {part} is {"not finite" if value is None else value}{when}')


def check_series(part: str, series: Mapping[str, np.ndarray], call: int = 0) -> None:
  """Raises Fault at the earliest step of which one of several series [num_steps] is not finite.

  Of several a term is named before the 'loss', the sum that it spoils.
  """
  found = []
  for name, values in series.items():
    bad = ~np.isfinite(np.asarray(values, np.float64))
    if bad.any():
      found.append((int(bad.argmax()), name == 'loss', name))
  if found:
    step, _, name = min(found)
    raise Fault(part, name, float(series[name][step]), step, call)


@contextlib.contextmanager
def attach_key(key: PRNGKey) -> Iterator[None]:
  """A fault within is noted with the key of the call, by which it may be repeated."""
  try:
    yield
  except Fault as fault:
    fault.about['key'] = np.asarray(jax.random.key_data(key)).tolist()
    raise


class Finite(NamedTuple):
  """Whether every array of a state is finite, as a compiled program."""

  names: tuple[str, ...]  # of the arrays that are looked at
  program: Any  # (their list) -> [n] bool

  def check(self, state: PyTree) -> None:
    """Raises Fault for the first that is not."""
    found = np.asarray(self.program(list(_inexact(state).values())))
    if not found.all():
      raise Fault('state', self.names[int(found.argmin())])


def compile_finite_check(state: PyTree) -> Finite:
  """Compiles the check of a state, of which only shapes and places matter; not of integers and what is on the host."""
  arrays = _inexact(state)
  program = jax.jit(lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))
  return Finite(tuple(arrays), program.lower(list(arrays.values())).compile())


def _inexact(state: PyTree) -> dict[str, Any]:
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(state)
      if jnp.issubdtype(leaf.dtype, jnp.inexact) and not isinstance(leaf, np.ndarray)}


def write(path: pathlib.Path, found: Mapping[str, Any]) -> None:
  """Writes what repeats a fault. Of several processes the first alone writes, and an error there is one on all."""
  with parallel.raise_on_all_processes():
    if parallel.is_first():
      with report.reporting_disk_errors(path), report.replace_file(path) as file:
        file.write(json.dumps(found, indent=2).encode() + b'\n')
