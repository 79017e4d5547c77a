"""How good a network is on real images, and how often it says what its teacher says."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import parallel
from dfkd_jax.models.network import Network
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, Metrics

_IN_FLIGHT = 4  # Batches sent ahead: else all images of a large set would queue on the device.


def evaluate(
    network: Network,
    dataset: Sequence[np.ndarray],
    *,
    task: Task,
    batch_size: int = 256,
    teacher: Network | None = None,
    teacher_predictions: np.ndarray | None = None,
    shared: bool = False,
) -> dict[str, float]:
  """The task's metrics over all images, each once.

  One program is compiled for a task, a kind of network and a batch size, and
  reused by later calls; the last batch is padded. Of several processes all must
  call this: each looks at its share of the images, and all get the result of all.

  Args:
    network: To be judged, in evaluation mode.
    dataset: Images [N, H, W, C], uint8 or float in [0, 1], and labels [N] or,
      in segmentation, [N, H, W]; further items are not looked at.
    task: What labels mean.
    batch_size: Images at a time.
    teacher: Whose answers `agreement` counts.
    teacher_predictions: Instead, these answers: what `predict(teacher, images)`
      gave. Compute them once for a run.
    shared: Of several processes each has other images than the others, N of them,
      and looks at them all; else all have the same.

  Returns:
    What `task.summarize` says, such as `top1`, `top5` (of fewer than five
    classes: of all) in [0, 1] and `cross_entropy` in nats; `agreement`, the
    share of equal answers, if there is a teacher; and `count`, how many images.

  Raises:
    ValueError: If the arrays do not fit each other, the task or the network.
  """
  images, labels = np.asarray(dataset[0]), np.asarray(dataset[1]).astype(np.int32)
  _check(images, labels, task, batch_size)
  answers = teacher_predictions
  if answers is None and teacher is not None:
    answers = predict(teacher, images, batch_size=batch_size, shared=shared)
  if answers is not None and np.shape(answers) != labels.shape:
    raise ValueError(f'teacher_predictions must be {labels.shape} as the labels, got {np.shape(answers)}.')
  given = labels if answers is None else np.asarray(answers, np.int32)
  rows, network, sums = _rows(len(images), shared), parallel.local_copy(network), []
  for arrays, real in _batches((images[rows], labels[rows], given[rows]), batch_size):
    sums.append(_sums(network, *arrays, real, task=task))
    jax.block_until_ready(sums[-_IN_FLIGHT:][0])
  # In float64: a sum of float32 over a large set loses digits.
  of_all = lambda *parts: parallel.gather_processes(np.sum(np.asarray(parts, np.float64), axis=0)).sum(axis=0)
  total = jax.tree.map(of_all, *jax.device_get(sums))
  count = parallel.gather_processes(np.int64(len(images))).sum() if shared else len(images)
  agreement = {} if answers is None else {'agreement': float(total['agreeing'] / count)}
  return {**task.summarize(total['metrics']), **agreement, 'count': float(count)}


def predict(network: Network, images: np.ndarray, *, batch_size: int = 256, shared: bool = False) -> np.ndarray:
  """A network's answers, in evaluation mode. Of several processes all must call this, as with `evaluate`.

  Args:
    network: To be asked.
    images: [N, H, W, C], uint8 or float in [0, 1].
    batch_size: Images at a time.
    shared: As there.

  Returns:
    The class with the highest score, [N] int32, in segmentation [N, H, W].
  """
  images = np.asarray(images)
  _check(images, images, None, batch_size)
  rows, network = _rows(len(images), shared), parallel.local_copy(network)
  parts = [
      np.asarray(_answers(network, batch))[:np.count_nonzero(real)]
      for (batch,), real in _batches((images[rows],), batch_size)]
  answers = np.concatenate(parts)
  return answers if shared else parallel.gather_rows(answers, len(images))


def _rows(total: int, shared: bool) -> slice:
  """Of the images at hand, those that this process looks at."""
  return slice(None) if shared else parallel.process_rows(total)


@jax.jit
def _answers(network: Network, images: Array) -> Array:
  return jnp.argmax(network(_floats(images)).logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames='task')
def _sums(network: Network, images: Array, labels: Array, given: Array, real: Array, *, task: Task) -> Metrics:
  """Sums over the real images of one padded batch."""
  logits = network(_floats(images)).logits
  if logits.shape[-1] != task.num_classes:
    raise ValueError(f'The network has {logits.shape[-1]} classes, but the task {task.num_classes}.')
  # One example at a time, since a task's metrics are sums over a batch and know of no padding.
  metrics = jax.vmap(lambda *example: task.metrics(*jax.tree.map(lambda a: a[None], example)))(logits, labels)
  agreeing = task.reduce((jnp.argmax(logits, axis=-1) == given).astype(jnp.float32))
  return jax.tree.map(
      lambda each: jnp.where(real.reshape(-1, *[1] * (each.ndim - 1)), each, 0).sum(axis=0),
      {'metrics': metrics, 'agreeing': agreeing})


def _floats(images: Array) -> Array:
  """To [0, 1], on the device: bytes are a quarter to send."""
  return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def _batches(arrays: Sequence[np.ndarray], batch_size: int) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
  """Slices of the same size, at least one, the last one filled up with zeros, and which of its rows are real."""
  for start in range(0, max(1, len(arrays[0])), batch_size):
    slices = [array[start:start + batch_size] for array in arrays]
    lack = batch_size - len(slices[0])
    padded = tuple(np.pad(part, [(0, lack)] + [(0, 0)] * (part.ndim - 1)) if lack else part for part in slices)
    yield padded, np.arange(batch_size) < batch_size - lack


def _check(images: np.ndarray, labels: np.ndarray, task: Task | None, batch_size: int) -> None:
  """Raises ValueError if these are no images with labels for the task."""
  if images.ndim != 4 or not len(images) or len(labels) != len(images):
    raise ValueError(f'Images must be [N, H, W, C] with N > 0 labels, got {images.shape} and {labels.shape}.')
  if images.dtype != np.uint8 and images.dtype.kind != 'f':
    raise ValueError(f'Images must be uint8, or float in [0, 1], got {images.dtype}.')
  if batch_size < 1:
    raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
  if task is not None and labels.ndim == 1 and labels.max() >= task.num_classes:
    raise ValueError(f'Labels must be below {task.num_classes}, got {labels.max()}.')
