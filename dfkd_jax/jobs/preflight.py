"""A look at the teacher before anything is spent on it: what it offers an inversion, and what each term would weigh.

Published factors do not transfer: the moments term of two good networks may differ by four orders of magnitude (it
sums un-squared norms over layers whose scale training chose), and then either drowns the classes asked for or goes
unheard itself. So the terms are measured where the run begins, on images of a fresh generator, by the pull of each on
the images, the norm of its gradient times its factor.
"""

import sys
from typing import Any

import jax

from dfkd_jax import parallel, synth, weights
from dfkd_jax.config import build
from dfkd_jax.evaluate.loss_terms import (
  MOMENTS,
  LogitStats,
  Measurement,
  Verdict,
  measure,
  missing_moments,
  suggest_factors,
)
from dfkd_jax.models.network import Network
from dfkd_jax.synth import objective

_FOR_LOOKING = 1 << 30  # The run splits the same key.


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
    config: build.Config, teacher: Network, student: Network | None, card: weights.Card
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


def look(config: build.Config, teacher: Network, student: Network | None) -> tuple[Measurement, Verdict]:
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
  has_moments = missing_moments(teacher) is None
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
  return measured, suggest_factors(
      measured, teacher, factors, momentum=numbers.get('moments_momentum', 0.0), fallback=section.fallback)


def lines(measured: Measurement, verdict: Verdict, factors: objective.Factors) -> list[str]:
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


def _about(what: str, sight: LogitStats) -> str:
  return (f'{what:20} logits vary by {sight.spread:.3g} from image to image and {sight.range:.3g} over classes, '
          f'confidence {sight.confidence:.2f}, {int(sight.classes)} classes seen')


def plain(measured: Measurement, verdict: Verdict) -> dict[str, Any]:
  """The same as JSON has it."""
  numbers = lambda of: {name: float(value) for name, value in of.items()}
  return {
      'noise': numbers(measured.noise._asdict()), 'generated': numbers(measured.generated._asdict()),
      'values': numbers(measured.values), 'pulls': numbers(measured.pulls), 'layers': numbers(measured.layers),
      'notes': list(verdict.notes), 'suggested': verdict.suggested, 'factors': numbers(verdict.factors._asdict())}
