"""Self-check of imported weights: sound moments, and the logits of images drawn from a seed."""

import json
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from dfkd_jax.messages import safe_name
from dfkd_jax.models.network import Network
from dfkd_jax.types import Array
from dfkd_jax.weights.formats.safetensors import read_metadata
from dfkd_jax.weights.reading import split_entry

_NUM_IMAGES, _NUM_LOGITS = 3, 16


class Probe(NamedTuple):
  """Some logits of a network, for images that anyone can draw again from a seed."""

  seed: int
  image_shape: tuple[int, ...]  # [H, W, C]
  logits: tuple[tuple[float, ...], ...]  # [3, at most 16]: 3 images, logits evenly spaced.
  tolerance: float  # Largest allowed absolute difference of a logit.


def make_probe(network: Network, image_shape: tuple[int, ...], *, seed: int = 0,
               tolerance: float = 0.02) -> Probe:
  """Computes the probe of a network, with a tolerance in standard deviations of the logits."""
  logits = _select(np.asarray(_forward(network, probe_images(seed, image_shape))))
  rounded = tuple(tuple(float(f'{value:.7g}') for value in row) for row in logits)
  return Probe(seed, tuple(image_shape), rounded, float(f'{tolerance * logits.std():.3g}'))


def read_probe(path: str | os.PathLike[str]) -> Probe | None:
  """Reads the probe of a safetensors file; None if it has none, or for other formats."""
  path, _ = split_entry(path)
  try:
    text = read_metadata(path)['probe']
  except (OSError, ValueError, KeyError):  # A folder, another format, or no probe.
    return None
  try:
    fields = json.loads(text)
    logits = tuple(tuple(map(float, row)) for row in fields['logits'])
    image_shape = tuple(map(int, fields['image_shape']))
    return Probe(int(fields['seed']), image_shape, logits, float(fields['tolerance']))
  except Exception as error:  # Damaged JSON may raise anything.
    raise ValueError(
        f'The probe in the metadata of {path} is damaged: {safe_name(text)!r}.') from error


def check_network(network: Network, image_shape: tuple[int, ...], expected: Probe | None = None, *,
                  moments: bool = True) -> dict[str, Any]:
  """Checks that weights are sound, as far as that is possible without data.

  Returns plain data. `probe_difference` is the largest difference to the probe, or None. Raises
  ValueError if values, variances, moments or logits are not sound, or the probe differs.

  Args:
    image_shape: [H, W, C] of the data set.
    expected: From `read_probe`. Ignored for other image shapes, and for less than float32.
    moments: Whether running moments must look trained.
  """
  variances = _check_variables(network, moments)
  dtype = getattr(network.module, 'dtype', None) or jnp.float32
  if expected and (expected.image_shape != tuple(image_shape) or jnp.finfo(dtype).bits < 32):
    expected = None
  images = probe_images(expected.seed if expected else 0, image_shape)
  logits = np.asarray(_forward(network, images))
  num_classes, shape = getattr(network.module, 'num_classes', None), logits.shape
  if len(shape) < 2 or shape[0] != _NUM_IMAGES or num_classes not in (None, shape[-1]):
    raise ValueError(f'The logits of {_NUM_IMAGES} images have the shape {shape}, must be '
                     f'({_NUM_IMAGES}, ..., {num_classes or "classes"}).')
  if count := (~np.isfinite(logits)).sum():
    raise ValueError(f'{count} of {logits.size} logits of the probe are not finite.')
  if (logits == logits[:1]).all():
    raise ValueError(f'The logits are the same for {_NUM_IMAGES} different images: the weights do '
                     'not compute anything.')
  return {'min_variance': float(variances.min()) if variances.size else None,
          'zero_variances': int((variances == 0).sum()), 'logits_std': float(logits.std()),
          'probe_difference': _compare(logits, expected) if expected else None}


def probe_images(seed: int, image_shape: tuple[int, ...]) -> np.ndarray:
  """Draws patches of 4x4 pixels: [3, H, W, C] float32 in [0, 1], equal on all machines."""
  height, width, channels = image_shape
  rng = np.random.RandomState(seed)  # NumPy guarantees that its numbers never change.
  patches = rng.randint(0, 256, (_NUM_IMAGES, -(-height // 4), -(-width // 4), channels))
  return (patches.repeat(4, 1).repeat(4, 2)[:, :height, :width] / 255).astype(np.float32)


def _check_variables(network: Network, trained: bool) -> np.ndarray:
  """Checks all variables. Returns all running variances, in one vector."""
  variables = {'params': network.params, 'batch_stats': network.batch_stats}
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    if count := (~np.isfinite(np.asarray(leaf, np.float64))).sum():
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(f'{name} holds {count} values that are not finite.')
  moments = network.running()
  for path, norm in moments.items() if trained else ():
    if count := int((norm.var < 0).sum()):
      raise ValueError(f'batch_stats/{path}/var holds {count} negative variances, '
                       f'down to {float(norm.var.min()):.3g}.')
  is_initial = [(norm.mean == 0).all() and (norm.var == 1).all() for norm in moments.values()]
  if trained and moments and all(is_initial):
    raise ValueError(f'The running moments of all {len(moments)} batch norms are 0 and 1, as '
                     'before any training: the weights come without them.')
  return np.concatenate([np.zeros(0), *(np.asarray(n.var).ravel() for n in moments.values())])


@jax.jit
def _forward(network: Network, images: Array) -> Array:
  with jax.default_matmul_precision('highest'):
    return network(images).logits.astype(jnp.float32)


def _select(logits: np.ndarray) -> np.ndarray:
  """Selects at most 16 logits of each image: [3, ..., K] -> [3, at most 16]."""
  flat = logits.reshape(len(logits), -1)
  last = flat.shape[1] - 1
  return flat[:, np.linspace(0, last, min(_NUM_LOGITS, last + 1)).astype(int)]


def _compare(logits: np.ndarray, probe: Probe) -> float:
  """The largest difference of the logits to those in a probe."""
  logits, expected = _select(logits), np.asarray(probe.logits)
  if logits.shape != expected.shape:
    raise ValueError(f'The probe in the file has logits of the shape {expected.shape}, the network '
                     f'{logits.shape}.')
  difference = float(np.abs(logits - expected).max())
  if not difference <= probe.tolerance:
    raise ValueError(
        f'The logits of the probe are off by {difference:.3g}, more than {probe.tolerance:.3g}: '
        'the preprocessing (mean, std, order of channels) or an option of the architecture does '
        'not fit the weights.')
  return difference
