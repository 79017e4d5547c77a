"""A config field: its default, its allowed values, and the check of a value."""

from typing import Any, NamedTuple

from dfkd_jax.messages import nearest, short_repr

NO_DEFAULT = object()  # the field is in a config only if its method has it
LARGEST = 2**31 - 1  # JAX counts in 32 bits
_TYPES = {int: 'whole number', float: 'number', bool: 'True or False', str: 'text', dict: 'section'}
FROM_1, FROM_0, ABOVE_0, ANY = '[1, inf)', '[0, inf)', '(0, inf)', '(-inf, inf)'
SHARE, DECAY = '(0, 1]', '[0, 1)'


class Field(NamedTuple):
  """One row of the table of fields."""

  name: str  # dotted, such as 'distill.rounds'
  default: Any
  kind: type  # int, float, bool, str, or dict for a section without fixed fields
  allowed: str | tuple[str, ...]  # interval of numbers such as '[0, 1)', or the choices, or ''
  doc: str
  flags: str = ''  # 'none': may be None; 'path': names a file; 'free': may change on resume
  length: int | None = None  # of a tuple; 0: any length; None: no tuple

  def describe(self) -> str:
    """Returns the allowed values in words, such as 'a whole number in [1, inf)'."""
    kind, none = _TYPES[self.kind], ' or None' * ('none' in self.flags)
    if isinstance(self.allowed, tuple):
      return f'one of {", ".join(self.allowed)}{none}'
    if self.length is not None:
      kind = f'a tuple of {f"{self.length} " * bool(self.length)}{kind}s'
    elif self.kind in (int, float, dict):
      kind = f'a {kind}'
    return f'{kind}{f" in {self.allowed}" * bool(self.allowed)}{none}'

  def error(self, value: Any) -> str | None:
    """Returns why a value is not allowed, or None if it is allowed."""
    if value is None and 'none' in self.flags:
      return None
    values = (value,) if self.length is None else value
    has_length = self.length is None or (
        isinstance(value, (tuple, list)) and self.length in (0, len(value)))
    if not has_length or not all(map(self._allows, values)):
      hint = nearest(str(value), self.allowed) if isinstance(self.allowed, tuple) else ''
      return f'{self.name} is {short_repr(value)}, must be {self.describe()}.{hint}'
    if self.kind is int and self.allowed.endswith('inf)') and max(values, default=0) > LARGEST:
      return f'{self.name} is {short_repr(value)}, must be at most {LARGEST}.'
    return None

  def _allows(self, value: Any) -> bool:
    """Whether one value has the right type and is allowed."""
    kinds = (int, float) if self.kind is float else (self.kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
      return False
    if isinstance(self.allowed, tuple):
      return value in self.allowed
    return not self.allowed or is_inside(value, self.allowed)


def is_inside(number: float, interval: str) -> bool:
  """Whether a number lies in an interval such as '[0, 1)'."""
  low, high = map(float, interval[1:-1].split(','))
  return (low <= number if interval[0] == '[' else low < number) and (
      number <= high if interval[-1] == ']' else number < high)
