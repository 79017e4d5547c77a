"""Tasks: requested labels, and metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_jax import tasks

K = 7


def add(*batches):
  return jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *batches)


def test_labels_are_uniform_by_default():
  labels = tasks.classification(K).sample_labels(jax.random.key(0), 7000)
  assert labels.dtype == jnp.int32
  counts = np.bincount(labels, minlength=K)
  assert len(counts) == K
  assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # Chi-square with 6 degrees, p = 0.001.
  assert len(set(counts)) > 1


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([1, 7, 20]), st.sampled_from([2, 7]), st.integers(0, 2**31))
def test_stratified_counts_differ_by_at_most_one(batch_size, num_classes, seed):
  task = tasks.classification(num_classes, stratified=True)
  labels = np.asarray(task.sample_labels(jax.random.key(seed), batch_size))
  counts = np.bincount(labels, minlength=num_classes)
  assert (labels.shape, len(counts)) == ((batch_size,), num_classes)
  assert counts.max() - counts.min() <= 1


def test_stratified_favours_no_class_and_no_place():
  task = tasks.classification(3, stratified=True)
  keys = jax.random.split(jax.random.key(0), 3000)
  labels = np.asarray(jax.jit(jax.vmap(lambda key: task.sample_labels(key, 4)))(keys))
  counts = np.stack([(labels == c).sum(0) for c in range(3)])  # By class and place.
  assert (np.abs(counts - 1000) < 120).all()


def test_balanced_asks_for_what_is_missing():
  task = tasks.classification(4, balanced=True)
  histogram = jnp.array([100, 0, 50, 50])
  np.testing.assert_allclose(tasks.shortfall(histogram), [50, 150, 100, 100])
  labels = jax.jit(lambda key, h: task.sample_labels(key, 8000, h))(jax.random.key(0), histogram)
  np.testing.assert_allclose(
      np.bincount(labels) / 8000, np.array([50, 150, 100, 100]) / 400, atol=0.02)
  np.testing.assert_array_equal(tasks.shortfall(jnp.zeros(4, int)), 1)
  np.testing.assert_allclose(tasks.shortfall(2 * histogram), 2 * tasks.shortfall(histogram))
  assert task.sample_labels(jax.random.key(0), 5).shape == (5,)


def test_balanced_levels_a_histogram():
  task = tasks.classification(4, balanced=True)
  def ask(histogram, key):
    labels = task.sample_labels(key, 16, histogram)
    return histogram + jnp.bincount(labels, length=4), None
  start = jnp.array([300, 0, 10, 100])
  end, _ = jax.lax.scan(ask, start, jax.random.split(jax.random.key(0), 200))
  assert end.sum() == start.sum() + 3200
  assert np.ptp(end) < np.ptp(start) / 2


def test_balanced_and_stratified_exclude_each_other():
  with pytest.raises(ValueError, match='either balanced or stratified'):
    tasks.classification(4, balanced=True, stratified=True)


def test_targets_are_what_was_asked_or_else_the_answer():
  logits, asked = jax.random.normal(jax.random.key(0), (3, 5, 4, K)), jnp.array([6, 0, 2])
  images, pixels = tasks.classification(K), tasks.segmentation(K)
  np.testing.assert_array_equal(images.labels_from(logits[:, 0, 0], asked), asked)
  np.testing.assert_array_equal(images.labels_from(logits[:, 0, 0]), logits[:, 0, 0].argmax(-1))
  np.testing.assert_array_equal(images.predicted(logits[:, 0, 0]), logits[:, 0, 0].argmax(-1))
  zeros = pixels.sample_labels(jax.random.key(0), 3, jnp.ones(K))
  np.testing.assert_array_equal(zeros, [0, 0, 0])
  np.testing.assert_array_equal(pixels.labels_from(logits, zeros), logits.argmax(-1))


def test_segmentation_predicts_the_most_frequent_class():
  classes = jnp.array([[[1, 1, 2], [4, 4, 4]], [[0, 3, 3], [6, 6, 6]], [[5, 5, 2], [2, 5, 5]]])
  logits = jax.nn.one_hot(classes, K)
  predicted = tasks.segmentation(K).predicted(logits)
  np.testing.assert_array_equal(predicted, [4, 6, 5])
  assert predicted.dtype == jnp.int32


@pytest.mark.parametrize(
    'task', [tasks.classification(K), tasks.segmentation(K)], ids=['class', 'pixels'])
def test_reduce_keeps_the_batch(task):
  np.testing.assert_array_equal(task.reduce(jnp.array([1.0, 2, 3])), [1, 2, 3])
  losses = jnp.arange(24.0).reshape(2, 3, 4)
  np.testing.assert_allclose(task.reduce(losses), [5.5, 17.5])


def test_classification_metrics_by_hand():
  # Class 6 first, then 5, ...; 1 and 0 are not among five.
  logits = jnp.tile(jnp.arange(float(K)), (5, 1))
  labels = jnp.array([6, 2, 1, 6, -1])
  task = tasks.classification(K)
  sums = jax.jit(task.metrics)(logits, labels)
  assert {name: int(sums[name]) for name in ('top1', 'top5', 'count')} == {
      'top1': 2, 'top5': 3, 'count': 4}
  log_z = np.log(np.exp(np.arange(K)).sum())
  summary = task.summarize(add(sums, sums))
  np.testing.assert_allclose(summary['cross_entropy'], log_z - (6 + 2 + 1 + 6) / 4, rtol=1e-6)
  assert (summary['top1'], summary['top5']) == (0.5, 0.75)
  with pytest.raises(ValueError, match='count is 0'):
    task.summarize(task.metrics(logits, jnp.full(5, -1)))


@pytest.mark.parametrize('value', [0.0, jnp.nan])
def test_a_broken_network_does_no_better_than_chance(value):
  labels = jnp.arange(10).repeat(3)
  sums = tasks.classification(10).metrics(jnp.full((30, 10), value), labels)
  assert (int(sums['top1']), int(sums['top5'])) == (3, 15)


def test_top5_of_few_classes_is_certain():
  sums = tasks.classification(3).metrics(jnp.zeros((4, 3)), jnp.array([0, 1, 2, 2]))
  assert int(sums['top5']) == 4


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 6]))
def test_segmentation_metrics_equal_brute_force(seed, num_classes):
  rng = np.random.default_rng(seed)
  logits = rng.standard_normal((2, 3, 5, num_classes)).astype(np.float32)
  labels = rng.integers(0, num_classes, (2, 3, 5)).astype(np.uint8)
  labels[rng.random(labels.shape) < 0.3] = 255
  labels[0, 0, 0] = 1
  task = tasks.segmentation(num_classes)
  metrics = jax.jit(task.metrics)
  halves = [metrics(jnp.asarray(logits[i:i + 1]), jnp.asarray(labels[i:i + 1])) for i in range(2)]
  summary = task.summarize(add(*halves))
  known, answers = labels != 255, logits.argmax(-1)
  ious = []
  for c in range(num_classes):
    truth, answer = (labels == c) & known, (answers == c) & known
    if (truth | answer).any():
      ious.append((truth & answer).sum() / (truth | answer).sum())
  np.testing.assert_allclose(summary['mean_iou'], np.mean(ious), rtol=1e-9)
  np.testing.assert_allclose(
      summary['pixel_accuracy'], (labels == answers)[known].mean(), rtol=1e-9)
  shifted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = np.take_along_axis(shifted, np.where(known, labels, 0)[..., None].astype(int), -1)[
      ..., 0]
  np.testing.assert_allclose(summary['cross_entropy'], -chosen[known].mean(), rtol=1e-4)


def summarize(task, truth, predictions, num_classes):
  logits = jax.nn.one_hot(jnp.asarray(predictions), num_classes)
  return task.summarize(task.metrics(logits[None], jnp.asarray(truth)[None]))


def test_the_rules_of_the_mean_iou_differ_on_void_pixels_and_absent_classes():
  truth = [[0, 0, 0, 1], [1, 255, 255, 2]]
  predictions = [[0, 0, 1, 1], [1, 0, 2, 3]]
  summary = summarize(tasks.segmentation(5), truth, predictions, 5)
  # Class 4 occurs nowhere. Void pixels are seen as 0 and 2.
  np.testing.assert_allclose(summary['mean_iou'], (2 / 3 + 2 / 3 + 0 + 0) / 4)
  np.testing.assert_allclose(summary['mean_iou_void'], (2 / 4 + 2 / 3 + 0 + 0) / 4)
  np.testing.assert_allclose(summary['mean_iou_absent_0'], (2 / 3 + 2 / 3) / 5)
  np.testing.assert_allclose(summary['pixel_accuracy'], 4 / 6)
  np.testing.assert_allclose(summary['class_accuracy'], (2 / 3 + 1 + 0) / 3)
  assert summary['iou_1'] == pytest.approx(2 / 3)
  assert 'iou_4' not in summary


@pytest.mark.parametrize(('ignore', 'mean_iou', 'mean_iou_void', 'mean_iou_absent_0'), [
    (255, 0.46242240215924424, 0.41952190933676264, 0.3853520017993702),
    (0, 0.4842265399807836, 0.37977428749739967, 0.3873812319846269),
    (3, 0.4552410617551463, 0.4198569321254988, 0.364192849404117)])
def test_the_mean_iou_is_that_of_scikit_learn(
    ignore, mean_iou, mean_iou_void, mean_iou_absent_0):
  """`jaccard_score` over the classes that occur, with void as a label of its own, and over all."""
  rng = np.random.default_rng(11)
  truth = rng.choice([0, 1, 2, 3, 255], (5, 7, 9), p=[0.3, 0.25, 0.2, 0.1, 0.15])
  others = rng.choice(5, truth.shape)  # Class 5 occurs nowhere.
  is_right = (rng.random(truth.shape) < 0.6) & (truth != 255)
  predictions, truth = np.where(is_right, truth, others), np.where(truth == 255, ignore, truth)
  task, logits = tasks.segmentation(6, ignore), jax.nn.one_hot(predictions, 6)
  summary = task.summarize(task.metrics(logits, jnp.asarray(truth)))
  np.testing.assert_allclose(
      [summary[name] for name in ('mean_iou', 'mean_iou_void', 'mean_iou_absent_0')],
      [mean_iou, mean_iou_void, mean_iou_absent_0], rtol=1e-9)


@pytest.mark.parametrize('void', [3, 0])
def test_an_output_for_void_has_no_iou_but_a_miss_where_it_is_predicted(void):
  first, second, third = (label for label in range(4) if label != void)
  truth = [[first, first, second, void]]
  predictions = [[first, void, second, third]]
  summary = summarize(tasks.segmentation(4, ignore=void), truth, predictions, 4)
  np.testing.assert_allclose(summary['mean_iou'], (1 / 2 + 1) / 2)
  np.testing.assert_allclose(summary['mean_iou_void'], (1 / 2 + 1 + 0) / 3)
  assert f'iou_{void}' not in summary
