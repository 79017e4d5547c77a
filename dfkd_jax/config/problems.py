"""The problems of a config: collected, then raised together."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dfkd_jax.messages import FieldError, short_repr


class InvalidError(ValueError):
  """The config or the run's folder has problems; `problems` has a line for each."""

  def __init__(self, problems: Iterable[str]):
    self.problems = tuple(problems)
    super().__init__(' '.join(self.problems))


class Problems:
  """Collects problems, at most one a field."""

  def __init__(self):
    self.errors: list[FieldError] = []

  def affect(self, *fields: str) -> bool:
    """Whether one of these fields or sections, or a part of one, has a problem."""
    names = [f'{error.field}.' for error in self.errors]
    return any(f'{field}.'.startswith(name) or name.startswith(f'{field}.')
               for field in fields for name in names)

  def run(self, check: Callable, *inputs: Any, reads: Iterable[str] = (), field: str = '') -> Any:
    """Returns check(*inputs), or None; collects the FieldErrors that it yields or raises.

    Skips the check if a field that it `reads` has a problem: its own would only follow from that.
    A ValueError that names no field is one of `field`.
    """
    if self.affect(*reads):
      return None
    try:
      result = check(*inputs)
      for error in result if isinstance(result, Iterator) else ():
        self._add(error)
      return result
    except ValueError as error:
      self._add(error if isinstance(error, FieldError) else FieldError(field, str(error)))
      return None

  def _add(self, error: FieldError) -> None:
    if not self.affect(error.field):
      self.errors.append(error)

  def raise_if_any(self) -> None:
    """Raises an InvalidError with all problems, if there are any."""
    if self.errors:
      raise InvalidError(' '.join(str(error).split()) for error in self.errors)


def raise_problems(check: Callable, *inputs: Any) -> None:
  """Raises an InvalidError with all problems of a check, if there are any."""
  problems = Problems()
  problems.run(check, *inputs)
  problems.raise_if_any()


def wrong_value(field: str, value: Any, allowed: str) -> FieldError:
  """Returns the problem of a value; `allowed` completes 'must be'."""
  return FieldError(field, f'{field} is {short_repr(value)}, must be {allowed}')
