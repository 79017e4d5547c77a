"""Evaluation against NumPy, with sizes that do not divide."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from dfkd_jax import evaluate, tasks
from dfkd_jax.models import network

SHAPE = (5, 7, 3)


class Linear(nn.Module):
  """Logits [B, K], linear in the mean pixel; or one answer a pixel."""

  num_classes: int
  dense: bool = False

  @nn.compact
  def __call__(self, images, train: bool = False):
    images = nn.BatchNorm(use_running_average=not train)(images)
    inputs = images if self.dense else images.reshape(images.shape[0], -1)
    return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(3.0))(inputs)


def tiny(num_classes, seed=0, dense=False):
  return network.create(Linear(num_classes, dense), jax.random.key(seed), SHAPE)


def real(size, num_classes, seed=0, per_pixel=False):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (size, *SHAPE), np.uint8)
  return images, rng.integers(0, num_classes, (size, *SHAPE[:2]) if per_pixel else size)


def by_hand(student, images):
  """Logits in NumPy, float64."""
  parameters = jax.tree.map(lambda a: np.asarray(a, np.float64), student.params)
  inputs = images / 255 / np.sqrt(1 + 1e-5)
  if not student.module.dense:
    inputs = inputs.reshape(len(images), -1)
  return inputs @ parameters['Dense_0']['kernel'] + parameters['Dense_0']['bias']


def negative_log_likelihood(logits, labels):
  shifted = logits - logits.max(-1, keepdims=True)
  log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  return -np.take_along_axis(log_probs, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize(
    ('num_classes', 'size', 'batch_size'), [(11, 23, 8), (3, 16, 16), (6, 5, 64), (2, 9, 1)])
def test_classification_equals_numpy(num_classes, size, batch_size):
  student, teacher = tiny(num_classes), tiny(num_classes, seed=1)
  images, labels = real(size, num_classes)
  scores = evaluate.evaluate(
      student, (images, labels, 'names'), task=tasks.classification(num_classes),
      batch_size=batch_size, teacher=teacher)
  logits = by_hand(student, images)
  order = np.argsort(-logits, axis=-1)
  expected = {
      'top1': np.mean(order[:, 0] == labels),
      'top5': np.mean((order[:, :5] == labels[:, None]).any(-1)),
      'cross_entropy': negative_log_likelihood(logits, labels).mean(),
      'agreement': np.mean(order[:, 0] == by_hand(teacher, images).argmax(-1)),
      'count': size}
  assert scores.keys() == expected.keys()
  for name, value in expected.items():
    assert isinstance(scores[name], float)
    assert scores[name] == pytest.approx(value, rel=2e-5), name
  assert num_classes > 5 or scores['top5'] == 1.0


def test_segmentation_equals_numpy_and_passes_over_void():
  student, teacher = tiny(4, dense=True), tiny(4, seed=1, dense=True)
  images, labels = real(7, 4, per_pixel=True)
  labels[:, 0] = 255
  predictions = evaluate.predict(teacher, images, batch_size=3)
  scores = evaluate.evaluate(student, (images, labels), task=tasks.segmentation(4), batch_size=4,
                             teacher_predictions=predictions)
  logits, known = by_hand(student, images), labels != 255
  answers = logits.argmax(-1)
  unions = [((answers == k) | (labels == k))[known].sum() for k in range(4)]
  both = [((answers == k) & (labels == k))[known].sum() for k in range(4)]
  assert scores['mean_iou'] == pytest.approx(np.mean(np.divide(both, unions)))
  assert scores['pixel_accuracy'] == pytest.approx((answers == labels)[known].mean())
  nll = negative_log_likelihood(logits[known], labels[known])
  assert scores['cross_entropy'] == pytest.approx(nll.mean(), rel=1e-5)
  agreement = (answers == by_hand(teacher, images).argmax(-1)).mean()
  assert scores['agreement'] == pytest.approx(agreement)
  assert scores['count'] == 7


def test_predictions():
  student = tiny(6)
  images, _ = real(13, 6)
  answers = evaluate.predict(student, images, batch_size=5)
  assert answers.dtype == np.int32
  np.testing.assert_array_equal(answers, by_hand(student, images).argmax(-1))


def test_bytes_and_floats_are_the_same_images():
  images, labels = real(9, 6)
  score = functools.partial(evaluate.evaluate, task=tasks.classification(6), batch_size=4)
  floats = images.astype(np.float32) / 255
  scores = [score(tiny(6), (pixels, labels)) for pixels in (images, floats)]
  assert scores[0] == pytest.approx(scores[1], rel=1e-6)
  assert 'agreement' not in scores[0]


def test_one_compilation_for_a_run():
  traces = []

  class Counted(Linear):
    def __call__(self, images, train: bool = False):
      traces.append(images.shape)
      return super().__call__(images, train)

  students = [network.create(Counted(6), jax.random.key(seed), SHAPE) for seed in (0, 1)]
  score = functools.partial(evaluate.evaluate, task=tasks.classification(6), batch_size=4)
  images, labels = real(11, 6)
  traces.clear()
  first = score(students[0], (images, labels))
  second = score(students[1], (images[:6], labels[:6].astype(np.uint8)),
                 teacher_predictions=labels[:6])
  assert traces == [(4, *SHAPE)]
  assert first['cross_entropy'] != second['cross_entropy']
  assert second['agreement'] == second['top1']


def test_metrics_do_not_see_the_padding_whatever_they_are():
  def metrics(logits, labels):
    # A label of 0, as in the padding, makes 'broken' infinite.
    return {'rows': (labels == labels).sum(), 'broken': 1 / labels.sum()}

  task = tasks.classification(6)._replace(
      metrics=metrics, summarize=lambda sums: jax.tree.map(float, sums))
  images, _ = real(5, 6)
  scores = evaluate.evaluate(tiny(6), (images, np.full(5, 4)), task=task, batch_size=3)
  assert scores == {'rows': 5.0, 'broken': 1.25, 'count': 5.0}


@pytest.mark.parametrize(('images', 'labels', 'options', 'message'), [
    (np.zeros((3, *SHAPE), np.uint8), np.zeros(2, int), {}, r'got \(3, 5, 7, 3\) and \(2,\)'),
    (np.zeros((0, *SHAPE), np.uint8), np.zeros(0, int), {}, 'N > 0'),
    (np.zeros((3, *SHAPE), np.int32), np.zeros(3, int), {}, 'got int32'),
    (np.zeros((3, *SHAPE), np.uint8), np.full(3, 6), {}, 'below 6, got 6'),
    (np.zeros((3, *SHAPE), np.uint8), np.zeros(3, int), {'teacher_predictions': np.zeros(4)},
     r'must be \(3,\)'),
])
def test_arrays_that_do_not_fit_are_refused(images, labels, options, message):
  with pytest.raises(ValueError, match=rf'\A(?!.*\n).*{message}'):
    evaluate.evaluate(tiny(6), (images, labels), task=tasks.classification(6), **options)


def test_a_network_of_another_number_of_classes_is_refused():
  with pytest.raises(ValueError, match='has 6 classes, the task 7'):
    evaluate.evaluate(tiny(6), real(3, 6), task=tasks.classification(7))
