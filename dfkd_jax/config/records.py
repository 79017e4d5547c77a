"""What a job takes from a config: small frozen records, resolved once."""

from typing import Any, NamedTuple

from ml_collections import config_dict


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


def run_settings(config: config_dict.ConfigDict) -> RunSettings:
  """Returns the settings of a run from its config."""
  return RunSettings(
      config=to_json(config), seed=config.seed, evaluate_every=config.evaluate.every,
      evaluate_batch_size=config.evaluate.batch_size, save_every=config.checkpoint.every,
      max_to_keep=config.checkpoint.max_to_keep, keep_best=config.checkpoint.keep_best,
      minutes=config.budget.minutes, images=config.budget.images, reseed=config.faults.reseed)


def to_json(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns a config as nested dicts of JSON values; tuples become lists."""
  return _to_json(config.to_dict())


def _to_json(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _to_json(item) for name, item in value.items()}
  return [_to_json(item) for item in value] if isinstance(value, (list, tuple)) else value
