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
# Pull of the moments over that of one_hot. Runs that went well had 0.07 (the quick start) and 0.9 (ResNet-56); with 11
# the classes asked for went unheard (ResNet-56 with the published factors). AIM is in the middle.
BALANCED = (0.02, 5.0)
AIM = 0.5
SMOOTHNESS = 0.1  # Pull of total_variation over that of one_hot, where it has to stand in for the moments.
ALIKE = 1e-4  # Of the logits' range: less spread than that from image to image is none.


class LogitStats(NamedTuple):
  """What a network says of a batch of images: scalars."""

  spread: Array  # deviation of logits from image to image, root mean square over classes
  range: Array  # deviation of logits over classes, of the mean image
  confidence: Array  # mean highest probability
  classes: Array  # how many are the highest of some image
  finite: Array  # whether all logits are


class Measurement(NamedTuple):
  """What the program of `measure` finds."""

  noise: LogitStats  # of uniform noise
  generated: LogitStats  # of images of a fresh generator
  values: dict[str, Array]  # of each term, before its factor
  pulls: dict[str, Array]  # norm of each term's gradient by the images, before its factor
  layers: dict[str, Array]  # of the batch_norm term, by path of the layer


def measure(
    key: PRNGKey, teacher: Network, student: Network | None, *, generator: nn.Module | None,
    latent_shape: tuple[int, ...], image_shape: tuple[int, int, int], task: tasks.Task, factors: objective.Factors,
    adversary: objective.Adversary = objective.Adversary(),
) -> Measurement:
  """Looks at noise and at a fresh generator's images; one compiled program.

  Args:
    key: PRNG key.
    teacher: To be looked at.
    student: Needed if a term of `factors` is.
    generator: Whose images are looked at; None: noise takes their place.
    latent_shape: [B, ...] of its latents; B is that of the noise, too.
    image_shape: [H, W, C].
    task: What the teacher was trained for.
    factors: Says which terms are active; sizes do not matter.
    adversary: The measure of the adversarial term.
  """

  @jax.jit
  def program(key, teacher, student):
    key_noise, key_params, key_latents, key_labels = jax.random.split(key, 4)
    noise = jax.random.uniform(key_noise, (latent_shape[0], *image_shape))
    images = noise
    if generator is not None:
      latents = jax.random.normal(key_latents, latent_shape)
      images = generators.render(generator, generator.init(key_params, latents)['params'], latents)
    asked = task.sample_labels(key_labels, latent_shape[0], None) if task.asks else None

    def means(images):
      outputs = teacher(images)
      found = objective.terms(
          factors, outputs, images, task.labels_from(outputs.logits, asked), teacher=teacher, student=student,
          adversary=adversary, reduce=task.reduce)
      return {name: jnp.mean(term) for name, term in found.items()}, outputs

    values, pull_back, outputs = jax.vjp(means, images, has_aux=True)
    names = sorted(values)
    basis = {name: jnp.asarray([name == other for other in names], values[name].dtype) for name in names}
    # In a loop: the backward pass is compiled once, not once a term.
    norms = jax.lax.map(lambda only: jnp.sqrt(jnp.square(pull_back(only)[0]).sum()), basis) if names else ()
    pulls = dict(zip(names, norms, strict=True))
    running = teacher.running()
    layers = inversion.batch_norm_by_layer(outputs.moments, running) if running else {}
    return Measurement(_logit_stats(teacher(noise).logits), _logit_stats(outputs.logits), values, pulls, layers)

  return jax.device_get(program(key, teacher, student))


class Verdict(NamedTuple):
  """What follows from what was measured."""

  refusal: str | None  # why there is nothing to invert, in one line
  notes: tuple[str, ...]  # what a user should know
  suggested: dict[str, float]  # factors that would be in balance, of those that are not
  factors: objective.Factors  # to go on with


def suggest_factors(
    measured: Measurement, teacher: Network, factors: objective.Factors, *, momentum: float = 0.0, fallback: bool = False
) -> Verdict:
  """Weighs the terms, and says whether there is something to invert.

  Args:
    measured: By `measure`, with a total_variation term if there may be a fallback.
    teacher: That was looked at.
    factors: As wanted.
    momentum: Share of former batches in the moments that are matched: the rest is the share of the pull that stays.
    fallback: Whether to go on without a moments term, by smoothness of the images, where the teacher has no moments.
  """
  refusal = _refusal(measured, factors)
  if refusal:
    return Verdict(refusal, (), {}, factors)
  lacking = missing_moments(teacher)
  wanted = [name for name in MOMENTS if factors.active(name)]
  if lacking and wanted and not fallback:
    return Verdict(
        f'factors.{wanted[0]} is {getattr(factors, wanted[0])}, must be 0: {lacking}. '
        'preflight.fallback=True goes on by the smoothness of images instead.', (), {}, factors)
  if lacking and wanted:
    factors = _without_moments(measured, factors)
    return Verdict(None, (
        f'{lacking}: goes on without {" and ".join(wanted)}, by one_hot {factors.one_hot:.3g} and '
        f'total_variation {factors.total_variation:.3g}',), {}, factors)
  suggested = {name: factor for name in wanted if (factor := _balanced(measured, factors, name, momentum))}
  notes = tuple(
      f'the pull of {name} is {pull_ratio(measured, factors, name, momentum):.3g} times that of one_hot, '
      f'{"the classes asked for" if pull_ratio(measured, factors, name, momentum) > 1 else "the moments"} may go '
      f'unheard; --config.factors.{name}={factor:.2g} would balance them' for name, factor in suggested.items())
  return Verdict(None, notes, suggested, factors)


def pull_ratio(measured: Measurement, factors: objective.Factors, name: str, momentum: float) -> float:
  """The pull of a moments term over that of one_hot, factors included; NaN if that has none."""
  other = factors.one_hot * measured.pulls.get('one_hot', np.nan)
  return float(getattr(factors, name) * (1 - momentum) * measured.pulls[name] / other) if other else np.nan


def missing_moments(teacher: Network) -> str | None:
  """Why the running moments of a teacher are nothing to match, or None if they are."""
  running = teacher.running()
  if not running:
    return 'the teacher has no batch norm whose moments could be matched'
  running = jax.device_get(running)
  for path, (mean, var) in sorted(running.items()):
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
      return f'the running moments of {path!r} are not finite, or a variance is below 0'
  if all((mean == 0).all() and (var == 1).all() for mean, var in running.values()):
    return f'the running moments of all {len(running)} batch norms are 0 and 1, as before any training'
  return None


def _refusal(measured: Measurement, factors: objective.Factors) -> str | None:
  """What stands in the way of any inversion."""
  if not any(factors.active(name) for name in factors._fields):
    return 'all factors are 0, at least one must be above: there is nothing to minimise'
  for where, sight in (('noise', measured.noise), ('generated images', measured.generated)):
    if not sight.finite:
      return f'the logits of the teacher on {where} are not finite: weights or preprocessing do not fit'
  spread = max(measured.noise.spread, measured.generated.spread)
  if spread <= ALIKE * max(measured.noise.range, measured.generated.range, ALIKE):
    return (f'the teacher answers all images alike (its logits vary by {spread:.3g}): '
            'weights or preprocessing do not fit, and there is nothing to invert')
  return None


def _balanced(measured: Measurement, factors: objective.Factors, name: str, momentum: float) -> float | None:
  """The factor that brings a moments term near one_hot, if it is far."""
  ratio = pull_ratio(measured, factors, name, momentum)
  if not np.isfinite(ratio) or ratio <= 0 or BALANCED[0] <= ratio <= BALANCED[1]:
    return None
  return float(f'{getattr(factors, name) * AIM / ratio:.2g}')


def _without_moments(measured: Measurement, factors: objective.Factors) -> objective.Factors:
  """Factors of a teacher without moments: the generator and smooth images are all that is known of images."""
  one_hot = float(factors.one_hot) or 1.0
  found = factors._replace(**dict.fromkeys(MOMENTS, 0.0), one_hot=one_hot)
  if factors.active('total_variation'):
    return found
  pull = measured.pulls['total_variation']
  smooth = SMOOTHNESS * one_hot * measured.pulls['one_hot'] / pull if pull else 1e-3
  return found._replace(total_variation=float(f'{smooth:.2g}'))


def _logit_stats(logits: Array) -> LogitStats:
  flat = logits.reshape(-1, logits.shape[-1])
  seen = jnp.zeros(flat.shape[-1]).at[flat.argmax(-1)].set(1.0)
  return LogitStats(
      spread=jnp.sqrt(flat.var(0).mean()), range=flat.mean(0).std(), confidence=jax.nn.softmax(flat).max(-1).mean(),
      classes=seen.sum(), finite=jnp.isfinite(flat).all())
