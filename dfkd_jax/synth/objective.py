"""What inversion minimises: a weighted sum of named terms."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from dfkd_jax.losses import inversion
from dfkd_jax.models.network import Network
from dfkd_jax.types import Array, Metrics, Moments, Outputs


class Adversary(NamedTuple):
  """How the adversarial term measures how far student and teacher are apart; see `losses.inversion.adversarial`."""

  divergence: str = 'kl'  # 'kl', 'js' or 'l1'
  temperature: float = 1.0
  masked: bool = True  # only images on which they agree count


class Factors(NamedTuple):
  """Factors of the terms, none negative: each term is something to minimise.

  A term whose factor is the number 0 is not computed. A factor may be a traced
  array, to switch a term on in the course of a run.
  """

  one_hot: float | Array = 0.0
  batch_norm: float | Array = 0.0
  adversarial: float | Array = 0.0
  balance: float | Array = 0.0
  activation: float | Array = 0.0
  total_variation: float | Array = 0.0
  l2: float | Array = 0.0
  student_batch_norm: float | Array = 0.0
  contrast: float | Array = 0.0
  relative_batch_norm: float | Array = 0.0

  def active(self, name: str) -> bool:
    """Whether the term is to be computed at all."""
    factor = getattr(self, name)
    return not isinstance(factor, (int, float)) or factor != 0

  def checked(self, own: tuple[str, ...] = ()) -> 'Factors':
    """The factors, if none is a negative or non-finite number, and the contrast is 0 but for its own method.

    Args:
      own: Terms beyond those of `terms` that the method computes itself.

    Raises:
      ValueError: Names the first that does not hold.
    """
    for name, factor in self._asdict().items():
      if isinstance(factor, (int, float)) and not 0 <= factor < float('inf'):
        raise ValueError(f'Factor {name} is {factor}, must be a finite number and at least 0.')
    if self.active('contrast') and 'contrast' not in own:
      raise ValueError(f'Factor contrast is {self.contrast}, must be 0: this method has no such term.')
    return self


def terms(
    factors: Factors,
    outputs: Outputs,
    images: Array,
    labels: Array,
    *,
    teacher: Network,
    student: Network | None = None,
    past: dict[str, Moments] | None = None,
    momentum: float | Array = 0.0,
    modulation: Array | None = None,
    adversary: Adversary = Adversary(),
    balance_temperature: float = 1.0,
    pixels: Array | None = None,
    reduce: Callable[[Array], Array] = lambda per_sample: per_sample,
) -> dict[str, Array]:
  """The active terms, per sample [B] where meaningful, else []; all but `contrast`, which is CMI's own.

  Args:
    factors: Says which terms are active.
    outputs: The teacher's, for `images`.
    images: [B, H, W, C] in [0, 1], as both networks see them.
    labels: [B] int32, the classes asked for (or one per pixel).
    teacher: For its running moments.
    student: The adversary; needed if the adversarial or the student_batch_norm term is active.
    past: Moments averaged over former batches, by layer.
    momentum: Share of `past` in the moments that are matched, in [0, 1).
    modulation: [B] or as `labels`, by which the one_hot term of each counts.
    adversary: The measure of the adversarial term.
    balance_temperature: T of the balance term.
    pixels: [B, H, W, C], whose total_variation and l2 count; None: `images`.
    reduce: Takes losses [B, ...] of dense predictions to [B].

  References: arXiv:2112.06253, equations 2 to 5; factors for each method in configs/methods.
  """
  found, pixels = {}, images if pixels is None else pixels
  if factors.active('one_hot'):
    one_hot = inversion.one_hot(outputs.logits, labels)
    found['one_hot'] = reduce(one_hot if modulation is None else modulation * one_hot)
  if factors.active('batch_norm') or factors.active('relative_batch_norm'):
    moments = outputs.moments if past is None else inversion.mix(outputs.moments, past, momentum)
  if factors.active('batch_norm'):
    found['batch_norm'] = inversion.batch_norm(moments, teacher.running())
  if factors.active('relative_batch_norm'):
    found['relative_batch_norm'] = inversion.relative_batch_norm(moments, teacher.running())
  if factors.active('adversarial') or factors.active('student_batch_norm'):
    if student is None:
      raise ValueError(
          'student is None, must be a Network where the factor adversarial or student_batch_norm is above 0.')
    answer = student(images)
  if factors.active('adversarial'):
    found['adversarial'] = reduce(inversion.adversarial(answer.logits, outputs.logits, **adversary._asdict()))
  if factors.active('student_batch_norm'):
    found['student_batch_norm'] = -inversion.batch_norm(answer.moments, student.running())
  if factors.active('balance'):
    found['balance'] = inversion.balance(outputs.logits, balance_temperature)
  if factors.active('activation'):
    if outputs.features is None:
      raise ValueError(f'Factor activation is {factors.activation}, must be 0 where the teacher sows no features.')
    found['activation'] = inversion.activation(outputs.features)
  if factors.active('total_variation'):
    found['total_variation'] = inversion.total_variation(pixels)
  if factors.active('l2'):
    found['l2'] = inversion.l2(pixels)
  return found


def total(found: dict[str, Array], factors: Factors) -> tuple[Array, Metrics]:
  """Weighted sum of the terms' means [], and the means themselves before weighting."""
  means = {name: jnp.mean(term) for name, term in found.items()}
  weighted = [getattr(factors, name) * mean for name, mean in means.items()]
  return sum(weighted[1:], weighted[0]), means
