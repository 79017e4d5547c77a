"""Errors of damaged files."""

import contextlib
import re
from collections.abc import Iterator

from dfkd_jax import messages


@contextlib.contextmanager
def reporting_read_errors(name: str) -> Iterator[None]:
  """Turns any error of the block into a ValueError of one line: "<name> cannot be read: ..."."""
  try:
    yield
  except Exception as error:  # Readers of damaged files raise errors of many types.
    reason = re.sub(r' <_io\.BytesIO.*?>', '', str(error)) or type(error).__name__
    raise ValueError(f'{name} cannot be read: {messages.one_line(reason)}') from error
