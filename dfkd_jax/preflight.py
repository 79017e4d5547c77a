"""A look at the teacher before anything is spent on it: what it offers an inversion, and what each term would weigh.

Published factors do not transfer: the moments term of two good networks may differ by four orders of magnitude (it
sums un-squared norms over layers whose scale training chose), and then either drowns the classes asked for or goes
unheard itself. So the terms are measured where the run begins, on images of a fresh generator, by the pull of each on
the images, the norm of its gradient times its factor.
"""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dfkd_jax import build, parallel, synth, tasks
from dfkd_jax.losses import inversion
from dfkd_jax.models import pretrained
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generative, objective
from dfkd_jax.types import Array, PRNGKey

_FOR_LOOKING = 1 << 30  # The run splits the same key.
MOMENTS = ('batch_norm', 'relative_batch_norm')
# Pull of the moments over that of one_hot. Runs that went well had 0.07 (the quick start) and 0.9 (ResNet-56); with 11
# the classes asked for went unheard (ResNet-56 with the published factors). AIM is in the middle.
BALANCED = (0.02, 5.0)
AIM = 0.5
SMOOTHNESS = 0.1  # Pull of total_variation over that of one_hot, where it has to stand in for the moments.
ALIKE = 1e-4  # Of the logits' range: less spread than that from image to image is none.


class Sight(NamedTuple):
  """What a network says of a batch of images: scalars."""

  spread: Array  # deviation of logits from image to image, root mean square over classes
  range: Array  # deviation of logits over classes, of the mean image
  confidence: Array  # mean highest probability
  classes: Array  # how many are the highest of some image
  finite: Array  # whether all logits are


class Measured(NamedTuple):
  """What the program of `measure` finds."""

  noise: Sight  # of uniform noise
  generated: Sight  # of images of a fresh generator
  values: dict[str, Array]  # of each term, before its factor
  pulls: dict[str, Array]  # norm of each term's gradient by the images, before its factor
  layers: dict[str, Array]  # of the batch_norm term, by path of the layer


def measure(
    key: PRNGKey, teacher: Network, student: Network | None, *, generator: nn.Module | None,
    latent_shape: tuple[int, ...], image_shape: tuple[int, int, int], task: tasks.Task, factors: objective.Factors,
    adversary: objective.Adversary = objective.Adversary(),
) -> Measured:
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
      images = generative.render(generator, generator.init(key_params, latents)['params'], latents)
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
    return Measured(_sight(teacher(noise).logits), _sight(outputs.logits), values, pulls, layers)

  return jax.device_get(program(key, teacher, student))


class Verdict(NamedTuple):
  """What follows from what was measured."""

  refusal: str | None  # why there is nothing to invert, in one line
  notes: tuple[str, ...]  # what a user should know
  suggested: dict[str, float]  # factors that would be in balance, of those that are not
  factors: objective.Factors  # to go on with


def judge(
    measured: Measured, teacher: Network, factors: objective.Factors, *, momentum: float = 0.0, fallback: bool = False
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
  lacking = moments_lack(teacher)
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


def pull_ratio(measured: Measured, factors: objective.Factors, name: str, momentum: float) -> float:
  """The pull of a moments term over that of one_hot, factors included; NaN if that has none."""
  other = factors.one_hot * measured.pulls.get('one_hot', np.nan)
  return float(getattr(factors, name) * (1 - momentum) * measured.pulls[name] / other) if other else np.nan


def moments_lack(teacher: Network) -> str | None:
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


def _refusal(measured: Measured, factors: objective.Factors) -> str | None:
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


def _balanced(measured: Measured, factors: objective.Factors, name: str, momentum: float) -> float | None:
  """The factor that brings a moments term near one_hot, if it is far."""
  ratio = pull_ratio(measured, factors, name, momentum)
  if not np.isfinite(ratio) or ratio <= 0 or BALANCED[0] <= ratio <= BALANCED[1]:
    return None
  return float(f'{getattr(factors, name) * AIM / ratio:.2g}')


def _without_moments(measured: Measured, factors: objective.Factors) -> objective.Factors:
  """Factors of a teacher without moments: the generator and smooth images are all that is known of images."""
  one_hot = float(factors.one_hot) or 1.0
  found = factors._replace(**dict.fromkeys(MOMENTS, 0.0), one_hot=one_hot)
  if factors.active('total_variation'):
    return found
  pull = measured.pulls['total_variation']
  smooth = SMOOTHNESS * one_hot * measured.pulls['one_hot'] / pull if pull else 1e-3
  return found._replace(total_variation=float(f'{smooth:.2g}'))


def _sight(logits: Array) -> Sight:
  flat = logits.reshape(-1, logits.shape[-1])
  seen = jnp.zeros(flat.shape[-1]).at[flat.argmax(-1)].set(1.0)
  return Sight(
      spread=jnp.sqrt(flat.var(0).mean()), range=flat.mean(0).std(), confidence=jax.nn.softmax(flat).max(-1).mean(),
      classes=seen.sum(), finite=jnp.isfinite(flat).all())


def run(
    config: build.Config, workdir: str | None = None, command: str | None = None, teacher: Network | None = None
) -> dict[str, Any]:
  """The job 'check': looks at the teacher, prints what is found, and writes nothing.

  Args:
    config: Names the teacher, unless one is given, and the terms.
    workdir: Not used.
    command: Not used.
    teacher: In the place of the config's.

  Raises:
    ValueError: The teacher cannot be read, or offers nothing to invert.
  """
  del workdir, command
  source = None if teacher else config.teacher.source
  key = jax.random.split(jax.random.key(config.seed), 5)[0]  # That of the run.
  student = build.network(config, 'student', key) if config.student.name else None
  teacher = teacher or build.teacher(config)
  return report(config, teacher, student, build.card(teacher, source))[1]


def report(
    config: build.Config, teacher: Network, student: Network | None, card: pretrained.Card
) -> tuple[objective.Factors, dict[str, Any]]:
  """Looks, and prints what is found; the factors to go on with, and all as JSON has it.

  Args:
    config: Of the run.
    teacher: With its weights.
    student: As it begins, if there is one.
    card: Of the teacher.

  Raises:
    ValueError: The teacher offers nothing to invert.
  """
  measured, verdict = look(config, teacher, student)
  if verdict.refusal:
    raise ValueError(f'{verdict.refusal}.')
  if parallel.is_first():
    print('\n'.join(card.lines() + lines(measured, verdict, verdict.factors)), file=sys.stderr)
  return verdict.factors, {'card': card._asdict(), **plain(measured, verdict)}


def look(config: build.Config, teacher: Network, student: Network | None) -> tuple[Measured, Verdict]:
  """Measures with the numbers of a config, and judges.

  Args:
    config: Of the run.
    teacher: With its weights.
    student: As it begins; None: terms that need it are left out.
  """
  numbers, section = config.method, config.preflight
  if numbers.name is None:
    raise ValueError(f'method.name is None, must be one of {", ".join(synth.names())}: its terms are what is weighed.')
  factors = objective.Factors(**config.factors.to_dict())
  if student is None:
    factors = factors._replace(adversarial=0.0, student_batch_norm=0.0)
    if not any(factors.active(name) for name in factors._fields):
      raise ValueError('student.name is None, must name a network: all factors above 0 are of terms that need one.')
  has_moments = moments_lack(teacher) is None
  measured_too = {'one_hot': 1.0, 'total_variation': 1.0, **(dict.fromkeys(MOMENTS, 1.0) if has_moments else {})}
  active = factors._replace(contrast=0.0, **({} if has_moments else dict.fromkeys(MOMENTS, 0.0)))
  active = active._replace(**{name: getattr(active, name) or factor for name, factor in measured_too.items()})
  made = build.generator(config) if 'generator' in synth.parameters(numbers.name) else None
  latents = build.latent_dim(config) if 'latent_dim' in numbers else ()
  key = jax.random.fold_in(jax.random.key(config.seed), _FOR_LOOKING)
  measured = measure(
      key, teacher, student, generator=made, factors=active, task=build.task(config),
      latent_shape=(section.batch_size, *((latents,) if isinstance(latents, int) else latents)),
      image_shape=tuple(config.dataset.image_shape))
  return measured, judge(
      measured, teacher, factors, momentum=numbers.get('moments_momentum', 0.0), fallback=section.fallback)


def lines(measured: Measured, verdict: Verdict, factors: objective.Factors) -> list[str]:
  """For a reader: what the teacher says of images, and what each term would weigh."""
  found = [_about('uniform noise', measured.noise), _about('generated images', measured.generated)]
  found.append(f'{"term, at the start":20}{"value":>12}{"factor":>12}{"pull":>12}{"pull x factor":>15}')
  for name, value in sorted(measured.values.items()):
    factor, pull = float(getattr(factors, name)), float(measured.pulls[name])
    found.append(f'  {name:18}{float(value):12.4g}{factor:12.4g}{pull:12.4g}{factor * pull:15.4g}')
  if measured.layers:
    total = sum(map(float, measured.layers.values()))
    largest = sorted(measured.layers.items(), key=lambda item: -item[1])[:3]
    found.append('batch_norm by layer  ' + ', '.join(f'{path} {float(v) / total:.0%}' for path, v in largest)
                 + f', of {len(measured.layers)} layers')
  return found + [f'note: {note}' for note in verdict.notes]


def _about(what: str, sight: Sight) -> str:
  return (f'{what:20} logits vary by {sight.spread:.3g} from image to image and {sight.range:.3g} over classes, '
          f'confidence {sight.confidence:.2f}, {int(sight.classes)} classes seen')


def plain(measured: Measured, verdict: Verdict) -> dict[str, Any]:
  """The same as JSON has it."""
  numbers = lambda of: {name: float(value) for name, value in of.items()}
  return {
      'noise': numbers(measured.noise._asdict()), 'generated': numbers(measured.generated._asdict()),
      'values': numbers(measured.values), 'pulls': numbers(measured.pulls), 'layers': numbers(measured.layers),
      'notes': list(verdict.notes), 'suggested': verdict.suggested, 'factors': numbers(verdict.factors._asdict())}
