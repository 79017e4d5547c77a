"""Metrics of a network on real images, and its agreement with a teacher."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import parallel
from dfkd_jax.models.network import Network
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, Metrics

_IN_FLIGHT = 4  # Batches sent ahead, so that a large data set does not queue on the device.


def evaluate(
    network: Network, dataset: Sequence[np.ndarray], *, task: Task, batch_size: int = 256,
    teacher: Network | None = None, teacher_predictions: np.ndarray | None = None,
    shared: bool = False,
) -> dict[str, float]:
  """Computes the task's metrics over all images.

  Compiles one program for a task, a kind of network and a batch size. The last batch is padded.
  All processes must call this. Each process evaluates its share of the images, and all return the
  metrics of all images.

  Args:
    network: Network to evaluate, in evaluation mode.
    dataset: Images [N, H, W, C], uint8 or float in [0, 1], and labels int [N], or [N, H, W] in
      segmentation. Further items are ignored.
    task: Defines the metrics.
    batch_size: Images in a batch.
    teacher: Network to compute `agreement` with.
    teacher_predictions: Result of `predict(teacher, images)`, instead of `teacher`. Compute it
      once for a run.
    shared: If True, each process has N images of its own. If False, all have the same images.

  Returns:
    The result of `task.summarize`, such as `top1` and `top5` in [0, 1] (with fewer than five
    classes, `top5` is 1) and `cross_entropy` in nats. Also `count`, the number of images, and
    with a teacher `agreement`, the fraction of equal predictions.

  Raises:
    ValueError: The arrays do not fit each other, the task or the network.
  """
  images, labels = np.asarray(dataset[0]), np.asarray(dataset[1]).astype(np.int32)
  _check(images, labels, task, batch_size)
  if teacher_predictions is None and teacher is not None:
    teacher_predictions = predict(teacher, images, batch_size=batch_size, shared=shared)
  has_teacher = teacher_predictions is not None
  targets = np.asarray(teacher_predictions, np.int32) if has_teacher else labels
  if targets.shape != labels.shape:
    raise ValueError(f'teacher_predictions must be {labels.shape}, got {targets.shape}.')
  rows, network, sums = _process_rows(len(images), shared), parallel.local_copy(network), []
  for arrays, is_real in _batches((images[rows], labels[rows], targets[rows]), batch_size):
    sums.append(_batch_sums(network, *arrays, is_real, task=task))
    jax.block_until_ready(sums[-_IN_FLIGHT:][0])
  sums = jax.tree.map(lambda *parts: _total(np.asarray(parts, np.float64)), *jax.device_get(sums))
  count = float(_total(np.array([len(images)])) if shared else len(images))
  agreement = {'agreement': float(sums['agreeing'] / count)} if has_teacher else {}
  return {**task.summarize(sums['metrics']), **agreement, 'count': count}


def predict(
    network: Network, images: np.ndarray, *, batch_size: int = 256, shared: bool = False
) -> np.ndarray:
  """Predicts classes in evaluation mode. All processes must call this.

  Args:
    network: Network to evaluate.
    images: [N, H, W, C], uint8 or float in [0, 1].
    batch_size: Images in a batch.
    shared: See `evaluate`.

  Returns:
    The classes with the highest scores, int32 [N], or [N, H, W] in segmentation.
  """
  images = np.asarray(images)
  _check(images, images, None, batch_size)
  rows, network = _process_rows(len(images), shared), parallel.local_copy(network)
  predictions = np.concatenate([
      np.asarray(_batch_predictions(network, batch))[:np.count_nonzero(is_real)]
      for (batch,), is_real in _batches((images[rows],), batch_size)])
  return predictions if shared else parallel.gather_rows(predictions, len(images))


def _process_rows(total: int, shared: bool) -> slice:
  """Rows that this process evaluates."""
  return slice(None) if shared else parallel.process_rows(total)


def _total(parts: np.ndarray) -> np.ndarray:
  """Sums over batches and processes. In float64, because float32 loses digits."""
  return parallel.gather_processes(parts.sum(axis=0)).sum(axis=0)


@jax.jit
def _batch_predictions(network: Network, images: Array) -> Array:
  return jnp.argmax(network(_to_float(images)).logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames='task')
def _batch_sums(
    network: Network, images: Array, labels: Array, targets: Array, is_real: Array, *, task: Task
) -> Metrics:
  """Sums of metrics and agreement over the images of a batch that are not padding."""
  logits = network(_to_float(images)).logits
  if logits.shape[-1] != task.num_classes:
    raise ValueError(f'The network has {logits.shape[-1]} classes, the task {task.num_classes}.')
  # One example at a time: a task's metrics are sums over a batch and cannot skip padding.
  metrics = jax.vmap(
      lambda *example: task.metrics(*jax.tree.map(lambda a: a[None], example)))(logits, labels)
  agreeing = task.reduce((jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32))
  return jax.tree.map(
      lambda a: jnp.where(is_real.reshape(-1, *[1] * (a.ndim - 1)), a, 0).sum(axis=0),
      {'metrics': metrics, 'agreeing': agreeing})


def _to_float(images: Array) -> Array:
  """Converts bytes to [0, 1] on the device: sending bytes is four times faster."""
  return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def _batches(
    arrays: Sequence[np.ndarray], batch_size: int
) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
  """Yields at least one batch, padded with zeros, and which of its rows are real, bool [B]."""
  for start in range(0, max(1, len(arrays[0])), batch_size):
    batch = tuple(array[start:start + batch_size] for array in arrays)
    size = len(batch[0])
    if size < batch_size:
      batch = tuple(
          np.pad(a, [(0, batch_size - size), *[(0, 0)] * (a.ndim - 1)]) for a in batch)
    yield batch, np.arange(batch_size) < size


def _check(images: np.ndarray, labels: np.ndarray, task: Task | None, batch_size: int) -> None:
  """Raises ValueError unless these are images with labels for the task."""
  if images.ndim != 4 or not len(images) or len(labels) != len(images):
    raise ValueError(f'Images must be [N > 0, H, W, C] with N labels, got {images.shape} '
                     f'and {labels.shape}.')
  if images.dtype != np.uint8 and images.dtype.kind != 'f':
    raise ValueError(f'Images must be uint8, or float in [0, 1], got {images.dtype}.')
  if batch_size < 1:
    raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
  if task is not None and labels.ndim == 1 and labels.max() >= task.num_classes:
    raise ValueError(f'Labels must be below {task.num_classes}, got {labels.max()}.')
