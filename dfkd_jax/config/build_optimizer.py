"""The student's optimizer, and how its learning rate goes, by their names in a config."""

import ml_collections
import optax

from dfkd_jax import distill
from dfkd_jax.messages import check_choice

NAMES = ('sgd', 'adam')
SCHEDULES = ('cosine_by_round', 'cosine_by_step', 'steps', 'constant')


def optimizer(config: ml_collections.ConfigDict, rounds: int, steps_per_round: int) -> optax.GradientTransformation:
  """The student's optimizer; weight decay is coupled, on all parameters, as published.

  Args:
    config: Its section `optimizer` is read.
    rounds: Over which the learning rate falls: epochs, or rounds that distil.
    steps_per_round: Steps in each.
  """
  section = config.optimizer
  rate = schedule(section, rounds, steps_per_round)
  name = check_choice(section.name, NAMES, 'optimizer')
  if name == 'adam':
    return optax.chain(optax.add_decayed_weights(section.weight_decay), optax.adam(rate))
  return distill.coupled_sgd(rate, section.momentum, section.weight_decay, section.nesterov)


def schedule(section: ml_collections.ConfigDict, rounds: int, steps_per_round: int) -> optax.Schedule:
  """Learning rate by step."""
  name = check_choice(section.schedule, SCHEDULES, 'schedule')
  rate, warmup, total = section.learning_rate, section.warmup_steps, rounds * steps_per_round
  if warmup and name != 'cosine_by_step':
    raise ValueError(f'optimizer.warmup_steps is {warmup}, must be 0 with the schedule {name!r}.')
  if name == 'constant':
    return optax.constant_schedule(rate)
  if name == 'steps':
    return optax.piecewise_constant_schedule(
        rate, {epoch * steps_per_round: section.gamma for epoch in section.milestones})
  if name == 'cosine_by_round':
    return distill.cosine_by_round(rate, rounds, steps_per_round, section.end_value)
  return optax.warmup_cosine_decay_schedule(
      rate if not warmup else 0.0, rate, warmup, max(total, warmup + 1), section.end_value)
