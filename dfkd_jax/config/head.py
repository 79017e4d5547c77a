"""The student's head: its layers, the round before which it is fitted, and whether it can be."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.config import build
from dfkd_jax.config.problems import wrong_value
from dfkd_jax.config.records import Distill, Head, Settings
from dfkd_jax.messages import FieldError
from dfkd_jax.models import layers
from dfkd_jax.spline import head_init


def fit_round(head: Head, distill: Distill) -> int:
  """Returns the round, counted from 0, before which the head is fitted.

  By default a quarter of the rounds with student steps are done by then: the features of a fresh
  backbone mean little. Before round 0 there are no images.
  """
  if head.round is not None:
    return head.round
  return max(1, distill.distill_after + distill.learning_rounds // 4)


def layer_names(module: nn.Module, init: str) -> tuple[str, ...]:
  """Returns `layers.head_layers`; raises a FieldError if the module names none."""
  names = layers.head_layers(module)
  if not names:
    raise wrong_value('student.head_init', init, f"'random': {type(module).__name__} does not name "
                      'a dense layer as its head.')
  return names


def check_head(settings: Settings) -> Iterator[FieldError]:
  """Yields fields with which the head could not be fitted."""
  head, rounds = settings.head, settings.distill
  if head.init == 'random' or settings.job == 'check':
    return
  if settings.job == 'train':
    yield wrong_value('student.head_init', head.init, "'random' where job is 'train'.")
    return
  least = max(1, rounds.distill_after)
  if not least <= fit_round(head, rounds) < rounds.rounds:
    yield wrong_value('student.head_round', head.round, f'in [{least}, {rounds.rounds}): rounds '
                      'with student steps, and images to begin with.')
  num_classes = settings.student.num_classes
  try:
    head_init.check_width(head.init, head.width, num_classes, 'student.head_width')
  except ValueError as error:
    yield FieldError('student.head_width', str(error))
    return
  module = build.module(settings.student)
  names = layer_names(module, head.init)
  images = jax.ShapeDtypeStruct((1, *settings.student.input_shape), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), images)['params']
  num_features = params[names[0]]['kernel'].shape[0]
  terms = head_init.max_terms(head.init, head.width, num_features, num_classes)
  if head.images <= terms:
    yield wrong_value('student.head_images', head.images, f'above {terms}, the terms of the fit.')
