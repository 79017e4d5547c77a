"""Numbers that are not finite: finds the first one of a round."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.types import PRNGKey, PyTree


class Fault(ValueError):  # noqa: N818 (a number is wrong, not the program)
  """The first number of a round that is not finite: a term, or an array of the state.

  The `part` is 'synthesis', 'student', or 'state': everything that the round leaves behind. `step`
  and `call` count from 0. An array of the state has neither, and no value. `key` is of the call.
  """

  def __init__(self, part: str, name: str, key: PRNGKey, value: float | None = None,
               step: int | None = None, call: int | None = None):
    self.about = {'part': part, 'name': name, 'value': None if value is None else str(value),
                  'step': step, 'call': call, 'key': np.asarray(jax.random.key_data(key)).tolist()}
    when = '' if step is None else f' at step {step} of call {call}'
    super().__init__(f'{name!r} of the {part} is {"not finite" if value is None else value}{when}')


def check_series(part: str, series: Mapping[str, np.ndarray], key: PRNGKey, call: int = 0) -> None:
  """Raises Fault at the earliest step [num_steps] at which a series is not finite."""
  bad = {name: ~np.isfinite(np.asarray(values, np.float64)) for name, values in series.items()}
  # At one step, a term comes before the 'loss', which is the sum of the terms.
  faults = [(int(is_bad.argmax()), name == 'loss', name)
            for name, is_bad in bad.items() if is_bad.any()]
  if faults:
    step, _, name = min(faults)
    raise Fault(part, name, key, float(series[name][step]), step, call)


def compile_check(state: PyTree) -> Callable[[PyTree, PRNGKey], None]:
  """Compiles a check of states with these shapes, which raises Fault for an array not finite."""
  is_checked = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
  names = [jax.tree_util.keystr(path, simple=True, separator='/')
           for path, leaf in jax.tree_util.tree_leaves_with_path(state) if is_checked(leaf)]

  def are_finite(state):
    return jnp.stack(
        [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state) if is_checked(leaf)])

  program = jax.jit(are_finite).lower(state).compile()

  def check(state, key):
    is_finite = np.asarray(program(state))
    if not is_finite.all():
      raise Fault('state', names[int(is_finite.argmin())], key)

  return check
