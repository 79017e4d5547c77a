"""What a job takes from a config: small frozen records, resolved once."""

from typing import Any, NamedTuple


class RunSettings(NamedTuple):
  """What every run needs, whatever its job."""

  config: dict[str, Any]  # the whole config as JSON; kept in checkpoints and in the summary
  seed: int
  evaluate_every: int  # rounds
  evaluate_batch_size: int
  save_every: int  # rounds between checkpoints
  max_to_keep: int | None  # checkpoints; None keeps all
  keep_best: bool  # whether checkpoints hold the best student too
  minutes: float | None  # budget of each start
  images: int | None  # budget of synthesised images, for the whole run
  reseed: int  # how often a round with non-finite numbers may be repeated with other keys


class InitFrom(NamedTuple):
  """Where a new run takes its first student and generator from; None: drawn at random."""

  student: str | None  # folder of a run, or file of weights
  generator: str | None  # folder of a run
