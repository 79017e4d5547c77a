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


def evaluate(
    network: Network, dataset: Sequence[np.ndarray], *, task: Task, batch_size: int = 256,
    teacher: Network | None = None, teacher_predictions: np.ndarray | None = None,
    shared: bool = False) -> dict[str, float]:
  """Computes the task's metrics over all images. Raises a ValueError if arrays do not fit.

  All processes must call this. Each evaluates its share of the images, and all return the metrics
  of all images.

  Args:
    dataset: Images [N, H, W, C], uint8 or float in [0, 1], and labels int [N], or [N, H, W] in
      segmentation. Further items are ignored.
    teacher: Network to compute `agreement` with.
    teacher_predictions: Result of `predict(teacher, images)`, to compute only once for a run.
    shared: If True, each process has N images of its own. If False, all have the same images.

  Returns:
    The result of `task.summarize`, such as `top1` and `top5` in [0, 1] (with fewer than five
    classes, `top5` is 1) and `cross_entropy` in nats. Also `count`, the number of images, and
    with a teacher `agreement`, the fraction of equal predictions.
  """
  images, labels = np.asarray(dataset[0]), np.asarray(dataset[1]).astype(np.int32)
  _check(images, labels, task)
  if teacher_predictions is None and teacher is not None:
    teacher_predictions = predict(teacher, images, batch_size=batch_size, shared=shared)
  has_teacher = teacher_predictions is not None
  targets = np.asarray(teacher_predictions, np.int32) if has_teacher else labels
  if targets.shape != labels.shape:
    raise ValueError(f'teacher_predictions must be {labels.shape}, got {targets.shape}.')
  network, sums = parallel.local_copy(network), []
  for arrays, is_real in _batches((images, labels, targets), batch_size, shared):
    sums.append(_batch_sums(network, *arrays, is_real, task=task))
    jax.block_until_ready(sums[-4:][0])  # at most four batches queue on the device

  def total(*parts):  # In float64, because float32 loses digits.
    return parallel.gather_processes(np.asarray(parts, np.float64).sum(axis=0)).sum(axis=0)

  metrics, agreeing, count = jax.tree.map(total, *jax.device_get(sums))
  agreement = {'agreement': float(agreeing / count)} if has_teacher else {}
  return {**task.summarize(metrics), **agreement, 'count': float(count)}


def predict(network: Network, images: np.ndarray, *, batch_size: int = 256,
            shared: bool = False) -> np.ndarray:
  """Predicts classes in evaluation mode, int32 [N], or [N, H, W] in segmentation.

  All processes must call this. The arguments are as for `evaluate`.
  """
  images = np.asarray(images)
  _check(images, images)
  network = parallel.local_copy(network)
  predictions = np.concatenate([
      np.asarray(_batch_predictions(network, batch))[:np.count_nonzero(is_real)]
      for (batch,), is_real in _batches((images,), batch_size, shared)])
  return predictions if shared else parallel.gather_rows(predictions, len(images))


@jax.jit
def _batch_predictions(network: Network, images: Array) -> Array:
  return jnp.argmax(network(_to_float(images)).logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames='task')
def _batch_sums(
    network: Network, images: Array, labels: Array, targets: Array, is_real: Array, *,
    task: Task) -> tuple[Metrics, Array, Array]:
  """Sums metrics, agreement and number of a batch's images that are not padding."""
  logits = network(_to_float(images)).logits
  if logits.shape[-1] != task.num_classes:
    raise ValueError(f'The network has {logits.shape[-1]} classes, the task {task.num_classes}.')
  # One example at a time: a task's metrics are sums over a batch and cannot skip padding.
  metrics = jax.vmap(lambda x, label: task.metrics(x[None], label[None]))(logits, labels)
  agreeing = task.reduce((jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32))
  return jax.tree.map(
      lambda a: jnp.where(is_real.reshape(-1, *[1] * (a.ndim - 1)), a, 0).sum(axis=0),
      (metrics, agreeing, is_real))


def _to_float(images: Array) -> Array:
  """Converts bytes to [0, 1] on the device: sending bytes is four times faster."""
  return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def _batches(arrays: Sequence[np.ndarray], batch_size: int, shared: bool) -> Iterator[tuple]:
  """Yields batches of this process, padded with zeros, and which of their rows are real [B]."""
  rows = slice(None) if shared else parallel.process_rows(len(arrays[0]))
  arrays = [array[rows] for array in arrays]
  for start in range(0, max(1, len(arrays[0])), batch_size):
    batch = tuple(array[start:start + batch_size] for array in arrays)
    size = len(batch[0])
    if size < batch_size:
      batch = tuple(np.pad(a, [(0, batch_size - size), *[(0, 0)] * (a.ndim - 1)]) for a in batch)
    yield batch, np.arange(batch_size) < size


def _check(images: np.ndarray, labels: np.ndarray, task: Task | None = None) -> None:
  if images.ndim != 4 or not len(images) or len(labels) != len(images):
    raise ValueError(
        f'Images must be [N > 0, H, W, C] with N labels, got {images.shape} and {labels.shape}.')
  if images.dtype != np.uint8 and images.dtype.kind != 'f':
    raise ValueError(f'Images must be uint8, or float in [0, 1], got {images.dtype}.')
  if task is not None and labels.ndim == 1 and labels.max() >= task.num_classes:
    raise ValueError(f'Labels must be below {task.num_classes}, got {labels.max()}.')
