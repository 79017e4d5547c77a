"""Measures the terms of the loss on a teacher, and suggests factors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dfkd_jax import tasks
from dfkd_jax.losses import inversion
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generators, objective
from dfkd_jax.types import Array, PRNGKey

MOMENTS = ('batch_norm', 'relative_batch_norm')
# Ratio of gradient norms, the moments term over one_hot, factors included. Good runs had 0.07 (the
# quick start) and 0.9 (ResNet-56). With 11 (published factors) images ignored their classes.
BALANCED = (0.02, 5.0)
TARGET_RATIO = 0.5
SMOOTHNESS_RATIO = 0.1  # the same of total_variation, where it replaces the moments
MIN_SPREAD = 1e-4  # of logits between images, relative to their range; less is no spread


class LogitStats(NamedTuple):
  """Statistics of a network's predictions for a batch of images: scalars."""

  spread: Array  # deviation of logits between images, root mean square over classes
  range: Array  # deviation between classes of the logits averaged over images
  confidence: Array  # mean highest probability
  classes: Array  # how many classes are predicted
  finite: Array  # whether all logits are finite


class Measurement(NamedTuple):
  """The result of `measure`; terms are before their factors."""

  noise: LogitStats  # on uniform noise
  generated: LogitStats  # on images of a fresh generator
  values: dict[str, Array]  # by term
  gradient_norms: dict[str, Array]  # norm of each term's gradient by the images
  layers: dict[str, Array]  # the batch_norm term by path of the layer


class Verdict(NamedTuple):
  """Conclusions from a measurement."""

  notes: tuple[str, ...]  # for the user
  suggested: dict[str, float]  # balanced factors of the terms that are out of balance
  factors: objective.Factors  # to go on with


def measure(
    key: PRNGKey, teacher: Network, student: Network | None, *, generator: nn.Module | None,
    latent_shape: tuple[int, ...], image_shape: tuple[int, int, int], task: tasks.Task,
    factors: objective.Factors) -> Measurement:
  """Measures the terms on noise and on a fresh generator's images, in one compiled program.

  Measures each term with a factor above 0; adversarial ones need the student. Latents have the
  shape [B, ...]. There are B noise images [H, W, C] too; without a generator, all are noise.
  """

  @jax.jit
  def program(key, teacher, student):
    key_noise, key_params, key_latents, key_labels = jax.random.split(key, 4)
    images = noise = jax.random.uniform(key_noise, (latent_shape[0], *image_shape))
    if generator is not None:
      latents = jax.random.normal(key_latents, latent_shape)
      params = generator.init(key_params, latents)['params']
      images = generators.render(generator, params, latents)
    asked = task.sample_labels(key_labels, latent_shape[0], None) if task.asks else None

    def mean_terms(images):
      outputs = teacher(images)
      terms = objective.terms(
          factors, outputs, images, task.labels_from(outputs.logits, asked), teacher=teacher,
          student=student, reduce=task.reduce)
      return {name: jnp.mean(term) for name, term in terms.items()}, outputs

    values, pull_back, outputs = jax.vjp(mean_terms, images, has_aux=True)
    # A loop over the terms, so that one backward pass is compiled.
    one_term = {name: jnp.asarray([name == other for other in sorted(values)], value.dtype)
                for name, value in values.items()}
    norms = jax.lax.map(lambda only: jnp.sqrt(jnp.square(pull_back(only)[0]).sum()), one_term)
    running = teacher.running()
    return Measurement(
        _logit_stats(teacher(noise).logits), _logit_stats(outputs.logits), values,
        gradient_norms=dict(zip(sorted(values), norms, strict=True)),
        layers=inversion.batch_norm_by_layer(outputs.moments, running) if running else {})

  return jax.device_get(program(key, teacher, student))


def _logit_stats(logits: Array) -> LogitStats:
  flat = logits.reshape(-1, logits.shape[-1])
  predicted = jnp.zeros(flat.shape[-1]).at[flat.argmax(-1)].set(1.0)
  return LogitStats(
      jnp.sqrt(flat.var(0).mean()), flat.mean(0).std(), jax.nn.softmax(flat).max(-1).mean(),
      predicted.sum(), jnp.isfinite(flat).all())


def suggest_factors(
    measurement: Measurement, teacher: Network, factors: objective.Factors, *,
    momentum: float = 0.0, fallback: bool = False) -> Verdict:
  """Compares the terms. Raises a ValueError if there is nothing to invert.

  The gradient shrinks by `momentum`, the share of former batches in the matched moments. With
  `fallback`, smoothness of the images (the term total_variation) may replace missing moments.
  """
  missing, active = missing_moments(teacher), [name for name in MOMENTS if factors.active(name)]
  _check_logits(measurement)
  if missing and active:
    if not fallback:
      raise ValueError(
          f'factors.{active[0]} is {getattr(factors, active[0])}, must be 0: {missing}. '
          'preflight.fallback=True uses the smoothness of images instead.')
    factors = _smooth_factors(measurement, factors)
    note = (f'{missing}: goes on without {" and ".join(active)}, with one_hot '
            f'{factors.one_hot:.3g} and total_variation {factors.total_variation:.3g}')
    return Verdict((note,), {}, factors)
  norms = measurement.gradient_norms
  one_hot = factors.one_hot * norms.get('one_hot', 0.0)
  ratios = {name: float(getattr(factors, name) * (1 - momentum) * norms[name] / one_hot)
            for name in active if one_hot}
  suggested = {name: float(f'{getattr(factors, name) * TARGET_RATIO / ratio:.2g}')
               for name, ratio in ratios.items()
               if 0 < ratio < BALANCED[0] or BALANCED[1] < ratio < np.inf}
  notes = tuple(
      f'gradient norm of {name} is {ratios[name]:.3g}x the norm of one_hot: images may ignore the '
      f'{"requested classes" if ratios[name] > 1 else "moments"}; --config.factors.{name}='
      f'{factor:.2g} would balance them' for name, factor in suggested.items())
  return Verdict(notes, suggested, factors)


def missing_moments(teacher: Network) -> str | None:
  """Returns why the teacher has no running moments to match, or None if it has."""
  running = jax.device_get(teacher.running())
  if not running:
    return 'the teacher has no batch norm with moments to match'
  for path, (mean, var) in sorted(running.items()):
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
      return f'the running moments of {path!r} are not finite, or a variance is below 0'
  if all((mean == 0).all() and (var == 1).all() for mean, var in running.values()):
    return (f'the running moments of all {len(running)} batch norms are 0 and 1, as before any '
            'training')
  return None


def _check_logits(measurement: Measurement) -> None:
  noise, generated = measurement.noise, measurement.generated
  for images, stats in (('noise', noise), ('generated images', generated)):
    if not stats.finite:
      raise ValueError(f"the teacher's logits on {images} are not finite: weights or preprocessing "
                       'do not fit.')
  spread = max(noise.spread, generated.spread)
  if spread <= MIN_SPREAD * max(noise.range, generated.range, MIN_SPREAD):
    raise ValueError(
        f'the teacher predicts the same for all images (its logits vary by {spread:.3g}): weights '
        'or preprocessing do not fit, and there is nothing to invert.')


def _smooth_factors(measurement: Measurement, factors: objective.Factors) -> objective.Factors:
  """Replaces the moments by smoothness: it is all that is known of images then."""
  one_hot = float(factors.one_hot) or 1.0
  factors = factors._replace(**dict.fromkeys(MOMENTS, 0.0), one_hot=one_hot)
  if factors.active('total_variation'):
    return factors
  fit, roughness = (measurement.gradient_norms[name] for name in ('one_hot', 'total_variation'))
  smooth = SMOOTHNESS_RATIO * one_hot * fit / roughness if roughness else 1e-3
  return factors._replace(total_variation=float(f'{smooth:.2g}'))
