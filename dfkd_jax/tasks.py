"""Tasks that teachers are trained for: one class per image, or one class per pixel.

The library asks a task for labels to request, reduction and metrics. Losses need none: they keep
leading axes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.losses.divergence import cross_entropy
from dfkd_jax.types import Array, Metrics

_AGREEMENT = ('agreement', 'agreement', '.2%')
_CROSS_ENTROPY = ('cross_entropy', 'cross-entropy', '.4f')


class Task(NamedTuple):
  """A task, as a tuple of functions.

  Logits are [B, K] in classification and [B, H, W, K] in segmentation. Labels have no class axis.
  """

  num_classes: int  # K
  # (key, batch_size, histogram [K] | None) -> [B] int32, classes to request.
  sample_labels: Callable[..., Array]
  labels_from: Callable[..., Array]  # (logits, requested [B] | None) -> int32 one_hot targets
  predicted: Callable[[Array], Array]  # (logits) -> [B] int32, a class per image, for the buffer
  metrics: Callable[[Array, Array], Metrics]  # (logits, labels) -> sums over this batch
  # (sums, added up over batches) -> metrics to report. Higher is better, except for the loss.
  summarize: Callable[[Metrics], dict[str, float]]
  # Metrics that reports show: name, title and format. The first one picks the best round.
  columns: tuple[tuple[str, str, str], ...]
  label_axes: int = 0  # 2 if labels are masks [H, W]
  ignore: int = -1  # label that metrics and losses skip
  asks: bool = True  # whether a class can be requested; if not, `sample_labels` is not used

  @property
  def selection(self) -> str:
    """Metric that picks the best round."""
    return self.columns[0][0]

  def reduce(self, per_element: Array) -> Array:
    """Mean over all axes but the batch: [B, ...] -> [B]."""
    return per_element.reshape(per_element.shape[0], -1).mean(axis=1)


def classification(num_classes: int, *, balanced: bool = False, stratified: bool = False,
                   ignore: int = -1) -> Task:
  """Makes the task of one class per image.

  Without `balanced` and `stratified`, labels are uniform and independent, as published. Raises a
  ValueError if both are set.

  Args:
    balanced: Whether to draw labels by `shortfall` of the buffer's histogram.
    stratified: Whether to request each class equally often, up to one.
    ignore: Label of the examples that pad a batch; metrics skip them.
  """
  if balanced and stratified:
    raise ValueError('labels are either balanced or stratified, not both')

  def sample_labels(key, batch_size, histogram=None):
    if stratified:  # A random subset of classes once more than the others, in random order.
      class_key, order_key = jax.random.split(key)
      labels = jnp.resize(jax.random.permutation(class_key, num_classes), batch_size)
      return jax.random.permutation(order_key, labels).astype(jnp.int32)
    if balanced and histogram is not None:
      log_odds = jnp.log(shortfall(histogram))
      return jax.random.categorical(key, log_odds, shape=(batch_size,)).astype(jnp.int32)
    return jax.random.randint(key, (batch_size,), 0, num_classes, jnp.int32)

  def labels_from(logits, requested=None):
    return _argmax(logits) if requested is None else requested

  def metrics(logits, labels):
    is_known = labels != ignore
    # By rank in a sorted order: counting larger logits would reward constant or NaN logits.
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = (best == labels[:, None]) & is_known[:, None]
    return {'top1': hits[:, 0].sum(), 'top5': hits.any(axis=1).sum(), 'count': is_known.sum(),
            'cross_entropy': cross_entropy(logits, labels, ignore).sum()}

  def summarize(sums):
    count = _count_labelled(sums)
    return {name: float(sums[name]) / count for name in ('top1', 'top5', 'cross_entropy')}

  columns = (('top1', 'top-1', '.2%'), ('top5', 'top-5', '.2%'), _AGREEMENT, _CROSS_ENTROPY)
  return Task(num_classes, sample_labels, labels_from, _argmax, metrics, summarize, columns,
              ignore=ignore)


def shortfall(histogram: Array) -> Array:
  """Unnormalized odds by which to request classes, [K] counts -> [K] float32 above 0.

  max(h) - h + mean(h): the number of images that a class lacks to the most common one, plus the
  mean. No class is ever left out. The odds keep their ratios if all counts double. The rarest class
  is requested at most 1 + max(h) / mean(h) times as often as the most common. The odds are uniform
  where counts are equal, also where all are 0.
  """
  counts = histogram.astype(jnp.float32)
  odds = counts.max() - counts + counts.mean()
  return jnp.where(counts.max() > 0, odds, 1.0)


def segmentation(num_classes: int, ignore: int = 255, *, count_void: bool = False) -> Task:
  """Makes the task of one class per pixel.

  A map of classes cannot be requested without real maps at hand. The targets are therefore the
  teacher's own predictions at each pixel: `sample_labels` returns zeros, and `labels_from`
  ignores them.

  Three rules of the mean intersection over union (IoU) are in use, and all are reported:

  * `mean_iou` drops unlabelled pixels, and skips classes that neither truth nor prediction has;
  * `mean_iou_void` counts unlabelled pixels as false positives of the class predicted there;
  * `mean_iou_absent_0` is `mean_iou` with an IoU of 0 for skipped classes.

  Args:
    num_classes: K, outputs of the network.
    ignore: Label of unlabelled pixels. Below K it is an output of the network, void, which has no
      IoU of its own. A labelled pixel that is predicted as void is a miss.
    count_void: Whether `mean_iou_void` picks the best round, in place of `mean_iou`.
  """
  classes = np.array([label for label in range(num_classes) if label != ignore])

  def sample_labels(key, batch_size, histogram=None):
    return jnp.zeros(batch_size, jnp.int32)

  def labels_from(logits, requested=None):
    return _argmax(logits)

  def predicted(logits):
    pixels = jax.nn.one_hot(_argmax(logits), num_classes, dtype=jnp.int32)
    return _argmax(pixels.sum(axis=tuple(range(1, pixels.ndim - 1))))

  def metrics(logits, labels):
    labels = labels.astype(jnp.int32)
    is_known = (labels != ignore) & (labels >= 0) & (labels < num_classes)
    rows = jnp.where(is_known, labels, num_classes)  # The last row has unlabelled pixels.
    cells = rows * num_classes + _argmax(logits)
    counts = jnp.zeros((num_classes + 1) * num_classes, jnp.int32).at[cells].add(1, mode='drop')
    return {'confusion': counts.reshape(num_classes + 1, num_classes),  # true class, prediction
            'cross_entropy': cross_entropy(logits, labels, ignore).sum(),
            'count': is_known.sum()}

  def summarize(sums):
    count = _count_labelled(sums)
    confusion = np.asarray(sums['confusion'], np.float64)
    hits, truth = np.diagonal(confusion)[classes], confusion[:-1].sum(axis=1)[classes]
    either = truth + confusion[:-1].sum(axis=0)[classes] - hits
    either_or_void = either + confusion[-1][classes]
    iou, iou_void = _ratios(hits, either), _ratios(hits, either_or_void)
    return {'mean_iou': float(np.nanmean(iou)), 'mean_iou_void': float(np.nanmean(iou_void)),
            'mean_iou_absent_0': float(np.nan_to_num(iou).mean()),
            'pixel_accuracy': float(hits.sum()) / count,
            'class_accuracy': float(np.nanmean(_ratios(hits, truth))),
            'cross_entropy': float(sums['cross_entropy']) / count,
            **{f'iou_{label}': float(value) for label, value in zip(classes, iou, strict=True)
               if not np.isnan(value)}}

  rules = [('mean_iou', 'mIoU', '.4f'), ('mean_iou_void', 'mIoU, void', '.4f')]
  columns = (*(rules[::-1] if count_void else rules),
             ('pixel_accuracy', 'pixels', '.2%'), ('class_accuracy', 'classes', '.2%'),
             _AGREEMENT, _CROSS_ENTROPY)
  return Task(num_classes, sample_labels, labels_from, predicted, metrics, summarize, columns,
              label_axes=2, ignore=ignore, asks=False)


def _ratios(parts: np.ndarray, totals: np.ndarray) -> np.ndarray:
  """Returns parts / totals, NaN where the total is 0."""
  return np.divide(parts, totals, out=np.full(len(parts), np.nan), where=totals > 0)


def _argmax(scores: Array) -> Array:
  """Index of the largest score over the last axis, int32."""
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _count_labelled(sums: Metrics) -> int:
  """Number of labelled examples; raises ValueError if there are none."""
  count = int(sums['count'])
  if count == 0:
    raise ValueError('count is 0: there is no labelled example to report on')
  return count
