"""DeepInversion against the published numbers, in float64: losses, and pixels at every step."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import golden
from golden_networks import (
  cast,
  check_images,
  formula_network,
  formula_reference,
  labels_of,
  sequence,
  wide_resnet,
)
from method_runs import Noting

from dfkd_jax import augment, parallel, synth

TERMS = {'loss': 'total', 'batch_norm': 'bn_teacher', 'student_batch_norm': 'bn_student',
         'one_hot': 'oh', 'adversarial': 'adv(-jsdiv T3)', 'total_variation': 'tv', 'l2': 'l2'}


def jitter(table):
  """Roll and flip by the rows of a table.

  A step shows its number by its key, split from the key of the call.
  """
  _, _, of_steps = jax.random.split(jax.random.key(0), 3)
  keys = jax.random.key_data(jax.random.split(parallel.task_keys(of_steps, 1, None)[0], len(table)))

  def move(key, images):
    step = jnp.argmax((keys == jax.random.key_data(key)).all(-1))
    height, width, flipped = jnp.asarray(table)[step]
    return augment.flip_where(
        jnp.roll(images, (height, width), axis=(1, 2)), jnp.broadcast_to(flipped, images.shape[:1]))

  return move


def call(teacher, student, targets, start, **numbers):
  """Metrics, the images given in each step, and what the buffer holds then."""
  noting = Noting(numbers.pop('augment', augment.identity))
  method = synth.create(
      'deep_inversion', image_shape=start.shape[1:], task=labels_of(targets)._replace(
          num_classes=teacher.params['fc']['bias'].size), sample_pixels=lambda *_: start,
      augment=noting, batch_size=len(start), sample_batch_size=len(start), capacity=len(start),
      **numbers)
  state = method.init(jax.random.key(1), teacher)
  state, metrics = jax.jit(method.synthesize)(state, jax.random.key(0), teacher, student)
  given, _ = noting.given_and_seen()
  return jax.device_get(metrics), given, np.asarray(state.buffer.images[0])


def test_the_published_trajectory(x64):
  """Which keeps the last iterate, whatever its loss."""
  archive = golden('deepinv')
  teacher, student = cast(wide_resnet('teacher_wrn16_1')), cast(wide_resnet('student_wrn16_1'))
  metrics, given, kept = call(
      teacher, student, np.sort(archive['targets_before_sort']),
      cast(archive['x0'].transpose(0, 2, 3, 1)), num_steps=3, keep='last',
      augment=jitter(archive['jitter_h_w_flip']), factors=synth.Factors(
          batch_norm=10.0, student_batch_norm=0.01, one_hot=1.0, adversarial=1.0,
          total_variation=0.01, l2=1e-3))
  columns = dict(zip(archive['loss_columns'].tolist(), archive['loss_f64'].T, strict=True))
  assert set(metrics) == set(TERMS)
  for name, short in TERMS.items():
    sign = -1 if name == 'student_batch_norm' else 1  # It is minimised, so minus the distance.
    np.testing.assert_allclose(metrics[name], sign * columns[short], rtol=1e-9, err_msg=name)
  pixels = (given - np.array(teacher.mean)) / np.array(teacher.std)
  np.testing.assert_allclose(
      pixels, archive['inputs_at_iteration_f64'].transpose(0, 1, 3, 4, 2), rtol=1e-6, atol=1e-6)
  check_images(kept, archive['best_returned_f64'])


def test_the_run_whose_weights_are_a_formula(x64):
  """A fourth step shows in full what the published code returns after three."""
  reference = formula_reference()['deepinv']
  teacher, student = formula_network((6, 8), 0), formula_network((4, 5), 6)
  start = jnp.asarray(sequence((6, 3, 8, 8), 50, 1.0).transpose(0, 2, 3, 1))
  metrics, given, kept = call(
      teacher, student, np.array([0, 0, 1, 1, 2, 3]), start, num_steps=4, factors=synth.Factors(
          batch_norm=10.0, student_batch_norm=0.01, one_hot=1.0, adversarial=1.0,
          total_variation=1e-3, l2=1e-4))
  np.testing.assert_allclose(metrics['loss'][:3], reference['total'], rtol=1e-9)
  returned = given[3]
  np.testing.assert_allclose(
      [returned.mean(), returned.min(), returned.max(), *returned[0, 0, 0]],
      [reference['returned_mean'], reference['min'], reference['max'], *reference['returned_px']],
      rtol=1e-9, atol=1e-12)
  best = given[metrics['loss'].argmin()]  # Ours.
  check_images(kept, best.transpose(0, 3, 1, 2))
