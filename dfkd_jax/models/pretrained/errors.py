"""Why a file is not read."""


class RefusedError(ValueError):
  """The file is not, or not only, a set of weights that we read; the text goes on after 'it '."""
