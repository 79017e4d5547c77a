"""The problems of a config: collected, then raised together."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dfkd_jax.messages import FieldError, short_repr


class InvalidError(ValueError):
  """The config or the run's folder has problems.

  Attributes:
    problems: One line a problem.
  """

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

  def run(self, check: Callable, subject: Any, reads: Iterable[str] = ()) -> None:
    """Collects the problems that a check yields or raises.

    Skips the check if a field that it reads has a problem, as its own would only follow from that.
    """
    if self.affect(*reads):
      return
    try:
      for error in check(subject) or ():
        if not self.affect(error.field):
          self.errors.append(error)
    except FieldError as error:
      if not self.affect(error.field):
        self.errors.append(error)

  def raise_if_any(self) -> None:
    """Raises an InvalidError with all problems, if there are any."""
    if self.errors:
      raise InvalidError(' '.join(str(error).split()) for error in self.errors)


def raise_problems(check: Callable, subject: Any) -> None:
  """Raises an InvalidError with all problems that a check yields, if there are any."""
  problems = Problems()
  problems.run(check, subject)
  problems.raise_if_any()


def wrong_value(field: str, value: Any, allowed: str) -> FieldError:
  """Returns the problem of a value; `allowed` completes 'must be'."""
  return FieldError(field, f'{field} is {short_repr(value)}, must be {allowed}')


def caught(field: str, function: Callable, *arguments: Any) -> Iterator[FieldError]:
  """Yields the ValueError of a call as a problem of a field."""
  try:
    function(*arguments)
  except ValueError as error:
    yield error if isinstance(error, FieldError) else FieldError(field, str(error))
