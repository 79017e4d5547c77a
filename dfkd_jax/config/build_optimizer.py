"""Makes the optimizer and its learning rate from resolved settings."""

import optax

from dfkd_jax import distill
from dfkd_jax.config.records import Optimizer


def optimizer(
    section: Optimizer, rounds: int, steps_per_round: int) -> optax.GradientTransformation:
  """Makes the optimizer; weight decay is coupled, on all parameters, as published.

  Args:
    section: Its settings.
    rounds: Epochs, or rounds with student steps, over which the learning rate falls.
    steps_per_round: Steps in each.
  """
  rate = schedule(section, rounds, steps_per_round)
  if section.name == 'adam':
    return optax.chain(optax.add_decayed_weights(section.weight_decay), optax.adam(rate))
  return distill.coupled_sgd(rate, section.momentum, section.weight_decay, section.nesterov)


def schedule(section: Optimizer, rounds: int, steps_per_round: int) -> optax.Schedule:
  """Makes the schedule of the learning rate, by step."""
  rate, warmup = section.learning_rate, section.warmup_steps
  if section.schedule == 'constant':
    return optax.constant_schedule(rate)
  if section.schedule == 'steps':
    return optax.piecewise_constant_schedule(
        rate, {epoch * steps_per_round: section.gamma for epoch in section.milestones})
  if section.schedule == 'cosine_by_round':
    return distill.cosine_by_round(rate, rounds, steps_per_round, section.end_value)
  return optax.warmup_cosine_decay_schedule(
      0.0 if warmup else rate, rate, warmup, max(rounds * steps_per_round, warmup + 1),
      section.end_value)
