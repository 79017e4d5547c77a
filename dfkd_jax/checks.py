"""What a config must be, as far as that can be judged without building anything."""

import ml_collections
import numpy as np

from dfkd_jax import host_buffer
from dfkd_jax.names import known
from dfkd_jax.synth import objective

JOBS = ('distill', 'train', 'check')

# Where a number must lie; fields that a config does not have, or leaves open, are passed over.
RANGES = {
    '[0, 4294967296)': ('seed',),
    '[2, inf)': ('dataset.num_classes',),
    '[1, inf)': (
        'num_devices', 'distributed.num_processes', 'distributed.timeout',
        'dataset.image_shape', 'distill.rounds', 'distill.calls_per_round', 'distill.steps_per_round',
        'distill.batch_size',
        'train.epochs', 'train.batch_size', 'evaluate.every', 'evaluate.batch_size', 'checkpoint.every',
        'checkpoint.max_to_keep', 'budget.images', 'grid.columns', 'grid.rows', 'method.num_steps', 'method.batch_size',
        'method.capacity', 'method.num_tasks', 'method.latent_dim', 'method.bank_size', 'method.num_negatives',
        'method.projection_size', 'method.redraw_every', 'method.restart_every', 'preflight.batch_size',
        'teacher.resize', 'student.resize', 'judge.resize'),
    '[0, inf)': (
        'distributed.process_id', 'faults.reseed',
        'distill.distill_after', 'train.label_factor', 'train.teacher_factor', 'optimizer.weight_decay',
        'optimizer.end_value', 'optimizer.warmup_steps', 'optimizer.milestones', 'method.adversarial_after',
        'method.reset_after', 'method.gamma', 'method.beta', 'method.threshold_growth', 'distill.attention_factor',
        *(f'factors.{name}' for name in objective.Factors._fields)),
    '(0, inf)': (
        'device_memory_gb', 'budget.minutes', 'teacher.std', 'student.std', 'judge.std', 'distill.temperature',
        'train.temperature', 'optimizer.learning_rate',
        'method.generator_lr', 'method.latent_lr', 'method.meta_lr', 'method.learning_rate', 'method.head_lr',
        'method.contrast_temperature', 'method.threshold_start', 'method.balance_temperature', 'method.epsilon',
        'method.adversary.temperature', 'method.init_std', 'method.redraw_std', 'method.clip_weights'),
    '[0, 1)': (
        'train.label_smoothing', 'optimizer.momentum', 'method.adam_b1', 'method.adam_b2', 'method.moments_momentum',
        'method.ema_decay'),
    '(0, 1]': ('optimizer.gamma', 'dataset.crop'),
    '(0, 1)': ('method.ema_share',),
}


def check(config: ml_collections.ConfigDict) -> None:
  """Looks at names and numbers that can be judged without building anything.

  Raises:
    ValueError: In one line, all numbers that are out of range; or the first of what else does not fit.
  """
  wrong = [
      f'{name} is {value}, must be in {interval}'
      for interval, names in RANGES.items() for name in names
      if (value := _get(config, name)) is not None and not _within(value, interval)]
  if wrong:
    raise ValueError(f'{"; ".join(wrong)}.')
  known(config.job, JOBS, 'job')
  known(config.buffer, host_buffer.PLACES, 'buffer')
  if config.dataset.name is None and config.job == 'train':
    raise ValueError("dataset.name is None, must be the name of a prepared data set where job is 'train'.")
  if config.dataset.name is None and config.control:
    raise ValueError('control is True, must be False where dataset.name is None: it is judged on real images.')
  if len(config.dataset.image_shape) != 3:
    raise ValueError(f'dataset.image_shape is {config.dataset.image_shape}, must be (height, width, channels).')
  channels = config.dataset.image_shape[-1]
  for name in (f'{which}.{what}' for which in ('teacher', 'student', 'judge') for what in ('mean', 'std')):
    value = _get(config, name)
    if len(value) not in (1, channels):
      raise ValueError(f'{name} is {value}, must have one number for each of the {channels} channels.')
  for name in ('teacher.resize', 'student.resize', 'judge.resize'):
    if (value := _get(config, name)) is not None and len(value) != 2:
      raise ValueError(f'{name} is {value}, must be (height, width), or None for images as they are.')
  if config.job == 'distill' and config.distill.distill_after >= config.distill.rounds:
    raise ValueError(
        f'distill.distill_after is {config.distill.distill_after}, must be below distill.rounds, '
        f'{config.distill.rounds}: else the student takes no step.')


def _get(config: ml_collections.ConfigDict, name: str):
  """The value of a dotted name, None if there is none."""
  for part in name.split('.'):
    config = config.get(part)
    if config is None:
      return None
  return config


def _within(value, interval: str) -> bool:
  """Whether a number, or each of a tuple, is one and lies in an interval such as '[0, 1)'."""
  values = value if isinstance(value, (tuple, list)) else (value,)
  if any(isinstance(each, bool) or not isinstance(each, (int, float)) for each in values):
    return False
  low, high = map(float, interval[1:-1].split(','))
  above = np.greater_equal if interval[0] == '[' else np.greater
  below = np.less_equal if interval[-1] == ']' else np.less
  return all(above(each, low) and below(each, high) for each in values)
