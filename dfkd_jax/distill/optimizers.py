"""Optimizers and schedules of the published recipes."""

import optax


def cosine_by_round(
    init_value: float, rounds: int, steps_per_round: int, end_value: float = 0.0) -> optax.Schedule:
  """Cosine from `init_value` to `end_value` over `rounds`, constant within a round.

  Equals PyTorch's CosineAnnealingLR stepped once per epoch, as in the published recipe
  (arXiv:2112.06253). At round j: end + (init - end) (1 + cos(pi j / rounds)) / 2. It stays at the
  end after the last round.
  """
  cosine = optax.cosine_decay_schedule(init_value, rounds, end_value / init_value)
  return lambda step: cosine(step // steps_per_round)


def coupled_sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float, weight_decay: float,
    nesterov: bool = False) -> optax.GradientTransformation:
  """SGD as in PyTorch: weight decay is added to every parameter's gradient before momentum."""
  return optax.chain(
      optax.add_decayed_weights(weight_decay),
      optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov))
