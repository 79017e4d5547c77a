"""The objective of synthesis: a weighted sum of named terms."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from dfkd_jax.losses import inversion
from dfkd_jax.messages import FieldError
from dfkd_jax.models.network import Network
from dfkd_jax.types import Array, Metrics, Moments, Outputs


class Adversary(NamedTuple):
  """Divergence of student and teacher in the adversarial term; `losses.inversion.adversarial`."""

  divergence: str = 'kl'  # 'kl', 'js', 'l1' or 'log_l1'
  temperature: float = 1.0
  masked: bool = True  # only images on which both predict the same class count
  train_mode: bool = False  # whether the student's batch norms take the moments of this batch


class History(NamedTuple):
  """Moments of earlier batches, mixed into the moments of this batch before matching."""

  moments: dict[str, Moments]  # averaged over earlier calls, by layer
  momentum: float | Array  # their share, in [0, 1)


class Factors(NamedTuple):
  """Factors of the terms, none negative: each term is minimised.

  A term with the number 0 as its factor is not computed. A factor may be a traced array, which
  switches a term on in the course of a run.
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
    """Whether the term is computed at all."""
    factor = getattr(self, name)
    return not isinstance(factor, (int, float)) or factor != 0

  def checked(self, own: tuple[str, ...] = ()) -> 'Factors':
    """Returns the factors if they suit a method.

    Args:
      own: Terms that the method computes itself, such as `contrast`.

    Raises:
      FieldError: A factor is negative or not finite, or `contrast` is on in another method.
    """
    for name, factor in self._asdict().items():
      if isinstance(factor, (int, float)) and not 0 <= factor < float('inf'):
        raise FieldError(f'factors.{name}', f'Factor {name} is {factor}, must be a finite number '
                         'and at least 0.')
    if self.active('contrast') and 'contrast' not in own:
      raise FieldError('factors.contrast', f'Factor contrast is {self.contrast}, must be 0: this '
                       'method has no such term.')
    return self

  def late_adversary(self, step: Array, adversarial_after: int) -> 'Factors':
    """Switches the adversarial term off for the first `adversarial_after` calls."""
    if not self.active('adversarial'):
      return self
    return self._replace(adversarial=self.adversarial * (step >= adversarial_after))

  def for_student(self, student: Network | None) -> 'Factors':
    """Switches the terms off that need a student, if there is none."""
    if student is not None:
      return self
    return self._replace(adversarial=0.0, student_batch_norm=0.0)


def terms(
    factors: Factors,
    outputs: Outputs,
    images: Array,
    labels: Array,
    *,
    teacher: Network,
    student: Network | None = None,
    history: History | None = None,
    modulation: Array | None = None,
    adversary: Adversary = Adversary(),
    balance_temperature: float = 1.0,
    pixels: Array | None = None,
    reduce: Callable[[Array], Array] = lambda per_sample: per_sample,
) -> dict[str, Array]:
  """Computes the active terms, per sample [B] where meaningful, otherwise [].

  `contrast` is left to CMI.

  Args:
    factors: Their non-zero entries are the active terms.
    outputs: The teacher's, for `images`.
    images: [B, H, W, C] in [0, 1], as both networks see them.
    labels: [B] int32, the requested classes (or one a pixel).
    teacher: For its running moments.
    student: The adversary, for the terms adversarial and student_batch_norm.
    history: Moments of earlier calls; None: only this batch is matched.
    modulation: [B] or as `labels`, multiplies the one_hot term of each.
    adversary: Divergence of the adversarial term.
    balance_temperature: T of the balance term.
    pixels: [B, H, W, C], for total_variation and l2; None: `images`.
    reduce: Takes losses [B, ...] of dense predictions to [B].

  Raises:
    ValueError: A term needs a student or features, and there are none.

  References: arXiv:2112.06253, equations 2 to 5; factors of each method in configs/methods.
  """
  computed, pixels = {}, images if pixels is None else pixels
  if factors.active('one_hot'):
    one_hot = inversion.one_hot(outputs.logits, labels)
    computed['one_hot'] = reduce(one_hot if modulation is None else modulation * one_hot)
  if factors.active('batch_norm') or factors.active('relative_batch_norm'):
    moments = outputs.moments
    if history is not None:
      moments = inversion.mix(moments, *history)
  if factors.active('batch_norm'):
    computed['batch_norm'] = inversion.batch_norm(moments, teacher.running())
  if factors.active('relative_batch_norm'):
    computed['relative_batch_norm'] = inversion.relative_batch_norm(moments, teacher.running())
  if factors.active('adversarial') or factors.active('student_batch_norm'):
    if student is None:
      raise ValueError('student is None, must be a Network where the factor adversarial or '
                       'student_batch_norm is above 0.')
    answer, _ = student.forward(images, train=adversary.train_mode)
  if factors.active('adversarial'):
    computed['adversarial'] = reduce(
        inversion.adversarial(answer.logits, outputs.logits, masked=adversary.masked,
                              divergence=adversary.divergence, temperature=adversary.temperature))
  if factors.active('student_batch_norm'):
    computed['student_batch_norm'] = -inversion.batch_norm(answer.moments, student.running())
  if factors.active('balance'):
    computed['balance'] = inversion.balance(outputs.logits, balance_temperature)
  if factors.active('activation'):
    if outputs.features is None:
      raise FieldError('factors.activation', f'Factor activation is {factors.activation}, must be '
                       '0 where the teacher sows no features.')
    computed['activation'] = inversion.activation(outputs.features)
  if factors.active('total_variation'):
    computed['total_variation'] = inversion.total_variation(pixels)
  if factors.active('l2'):
    computed['l2'] = inversion.l2(pixels)
  return computed


def total(computed: dict[str, Array], factors: Factors) -> tuple[Array, Metrics]:
  """Returns the weighted sum of the terms' means [], and the means before weighting."""
  means = {name: jnp.mean(term) for name, term in computed.items()}
  weighted = [getattr(factors, name) * mean for name, mean in means.items()]
  return sum(weighted[1:], weighted[0]), means
