"""Measures the teacher and the terms of the loss before a run spends anything on it.

Published factors do not transfer between networks: the moments term, a sum of norms over layers of
any scale, differs by up to four orders of magnitude. Then it drowns the requested classes, or they
drown it. So each term's gradient is measured on images of a fresh generator, where the run begins.
"""

import re
from typing import Any

import jax
import numpy as np

from dfkd_jax import data, weights
from dfkd_jax.config import build, build_method
from dfkd_jax.config.records import Settings
from dfkd_jax.evaluate import input_scale, loss_terms
from dfkd_jax.evaluate.loss_terms import MOMENTS, Measurement, Verdict
from dfkd_jax.models.network import Network
from dfkd_jax.report import note


def run(settings: Settings, teacher: Network | None = None) -> dict[str, Any]:
  """Runs the job 'check': measures the teacher of the settings, or a network in its place.

  Prints the findings, and writes nothing. Raises ValueError if there is nothing to invert.
  """
  source = settings.teacher.source if teacher is None else None
  key = jax.random.split(jax.random.key(settings.run.seed), 5)[0]  # the run's own
  student = build.fresh_network(settings.student, key) if settings.student.name else None
  teacher = build.trained_network(settings.teacher) if teacher is None else teacher
  return report(settings, teacher, student, build.make_card(teacher, source),
                _load_images(settings))


def _load_images(settings: Settings) -> np.ndarray | None:
  """Loads the first images of the test split, or returns None if there are none at hand.

  Raises a ValueError if a data set at hand does not suit the settings.
  """
  dataset = settings.dataset
  if dataset.name is None or not data.is_prepared(dataset.name, dataset.data_dir):
    return None
  split = re.match(r'\w*', dataset.test_split)[0]
  try:
    first = f'{split}[:{settings.preflight.batch_size}]'
    return build.load_split(dataset, settings.task, first).images
  except ValueError:  # the split has fewer images
    return build.load_split(dataset, settings.task, split).images


def report(settings: Settings, teacher: Network, student: Network | None, card: weights.Card,
           images: np.ndarray | None = None) -> dict[str, Any]:
  """Measures, prints the findings, and returns them as JSON, with the `factors` to go on with.

  Leaves out terms that lack a student. Real `images` [N, H, W, C], uint8 or float in [0, 1], tell
  whether the teacher's mean and std fit. Raises ValueError if there is nothing to invert.
  """
  scale = input_scale.check(teacher, images, settings.preflight.batch_size,
                            settings.method.generator.image_shape)
  try:
    measurement, verdict = _measure(settings, teacher, student)
  except ValueError:
    if scale:
      note(f'note: {scale}')  # a likely reason
    raise
  verdict = verdict._replace(notes=verdict.notes + (scale,) * bool(scale))
  note('\n'.join(card.lines() + lines(measurement, verdict)))
  records = {'noise': measurement.noise._asdict(), 'generated': measurement.generated._asdict(),
             'values': measurement.values, 'gradient_norms': measurement.gradient_norms,
             'layers': measurement.layers, 'factors': verdict.factors._asdict()}
  numbers = {part: {name: float(value) for name, value in record.items()}
             for part, record in records.items()}
  return {'card': card._asdict(), **numbers, 'notes': list(verdict.notes),
          'suggested': verdict.suggested}


def _measure(
    settings: Settings, teacher: Network, student: Network | None) -> tuple[Measurement, Verdict]:
  method, factors = settings.method, settings.method.factors
  parameters = build_method.parameters(method)
  if student is None:
    factors = factors._replace(adversarial=0.0, student_batch_norm=0.0)
    if 'factors' in parameters and not any(factors):
      raise ValueError('student.name is None, must name a network: all factors above 0 are of '
                       'terms that need one.')
  # Terms that a suggestion needs are measured too; the contrast has parts of its own.
  has_moments = loss_terms.missing_moments(teacher) is None
  zero_terms = ('contrast', *(() if has_moments else MOMENTS))
  needed_terms = ('one_hot', 'total_variation', *(MOMENTS if has_moments else ()))
  measured = factors._replace(**dict.fromkeys(zero_terms, 0.0))
  measured = measured._replace(**{name: getattr(measured, name) or 1.0 for name in needed_terms})
  generator, latent_shape = None, (settings.preflight.batch_size,)
  if 'generator' in parameters:
    generator = build_method.generator(method.generator)
    latent_shape = build_method.latent_shape(method, *latent_shape)
  key = jax.random.fold_in(jax.random.key(settings.run.seed), 1 << 30)  # the run splits the seed's
  measurement = loss_terms.measure(
      key, teacher, student, generator=generator, latent_shape=latent_shape,
      image_shape=method.generator.image_shape, task=settings.task, factors=measured)
  return measurement, loss_terms.suggest_factors(
      measurement, teacher, factors, momentum=method.numbers.get('moments_momentum', 0.0),
      fallback=settings.preflight.fallback)


def lines(measurement: Measurement, verdict: Verdict) -> list[str]:
  """Formats the teacher's predictions and the gradient of each term."""
  images = {'uniform noise': measurement.noise, 'generated images': measurement.generated}
  text = [f'{name:20} logits vary by {stats.spread:.3g} between images and {stats.range:.3g} '
          f'between classes, confidence {stats.confidence:.2f}, {int(stats.classes)} classes seen'
          for name, stats in images.items()]
  text.append(f'{"term, at the start":20}{"value":>12}{"factor":>12}{"gradient":>12}'
              f'{"gradient x factor":>19}')
  for name, value in sorted(measurement.values.items()):
    factor = float(getattr(verdict.factors, name))
    norm = float(measurement.gradient_norms[name])
    text.append(f'  {name:18}{float(value):12.4g}{factor:12.4g}{norm:12.4g}{factor * norm:19.4g}')
  if measurement.layers:
    total = sum(map(float, measurement.layers.values()))
    largest = sorted(measurement.layers.items(), key=lambda item: -item[1])[:3]
    shares = ', '.join(f'{path} {float(value) / total:.0%}' for path, value in largest)
    text.append(f'batch_norm by layer  {shares}, of {len(measurement.layers)} layers')
  return text + [f'note: {line}' for line in verdict.notes]
