"""What was imported, and whether it computes what it should: a card of a network, and a numeric self-check."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from dfkd_jax.messages import RefusedError, first_line, safe_name
from dfkd_jax.models.network import Network
from dfkd_jax.types import Array
from dfkd_jax.weights.reading import parts, read_metadata, split_entry

_IMAGES, _NUMBERS = 3, 16  # Of a probe: images, and logits kept of each.


class Card(NamedTuple):
  """What a network is, as plain data; `_asdict()` is JSON."""

  source: str
  sha256: str  # Of the weights' files, as `digest` gives it; of the variables, where there are none.
  num_classes: int | None  # None where the module does not say.
  num_params: int
  batch_norms: int
  channels: int  # Of all batch norms together.
  dtype: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  bgr: bool
  resize: Any

  def lines(self) -> list[str]:
    """For a reader."""
    order = 'BGR, ' if self.bgr else ''
    resized = f', resized to {self.resize}' if self.resize else ''
    return [
        f'weights     {self.source} (SHA-256 {self.sha256[:16]})',
        f'network     {self.num_params:,} parameters in {self.dtype}, {self.num_classes or "unknown"} classes',
        f'batch norm  {self.batch_norms} layers with {self.channels:,} channels',
        f'images      {order}mean {_short(self.mean)}, std {_short(self.std)}{resized}']


class Probe(NamedTuple):
  """Some logits of a network for images that anyone can make again."""

  seed: int
  image_shape: tuple[int, ...]  # [H, W, C]
  logits: tuple[tuple[float, ...], ...]  # For each image, at most 16, evenly spaced among all.
  tolerance: float  # How far each may be off.

  def to_json(self) -> str:
    """For the metadata of a file, under 'probe'."""
    return json.dumps(self._asdict())


def describe(
    network: Network, source: str | os.PathLike[str] | None, path: str | os.PathLike[str] | None = None
) -> Card:
  """The card of a network.

  Args:
    network: With its weights.
    source: What the user calls them; None: they are from no file.
    path: Where they lie, if `source` is no path.
  """
  moments = network.running().values()
  return Card(
      source='variables in memory' if source is None else os.fspath(source),
      sha256=_of_variables(network) if source is None else digest(split_entry(source if path is None else path)[0]),
      num_classes=getattr(network.module, 'num_classes', None), num_params=network.num_params(),
      batch_norms=len(moments), channels=sum(int(of.mean.size) for of in moments),
      dtype=', '.join(sorted({leaf.dtype.name for leaf in jax.tree.leaves(network.params)})),
      mean=tuple(map(float, network.mean)), std=tuple(map(float, network.std)),
      bgr=bool(getattr(network, 'bgr', False)), resize=getattr(network, 'resize', None))


def make_probe(network: Network, image_shape: tuple[int, ...], *, seed: int = 0, tolerance: float = 0.02) -> Probe:
  """What a file of these weights is to carry.

  Args:
    network: With its preprocessing.
    image_shape: [H, W, C].
    seed: Of the images.
    tolerance: As a share of the logits' standard deviation.
  """
  logits = _kept(_logits(network, probe_images(seed, image_shape)))
  rounded = tuple(tuple(float(f'{value:.7g}') for value in row) for row in logits)
  return Probe(seed, tuple(image_shape), rounded, float(f'{tolerance * logits.std():.3g}'))


def stored_probe(path: str | os.PathLike[str]) -> Probe | None:
  """The probe that a safetensors file carries; None if it has none, or the file is of another format.

  Raises:
    ValueError: It carries something else under that name.
  """
  path, _ = split_entry(path)
  try:
    text = None if path.is_dir() else read_metadata(path).get('probe')
  except ValueError:
    return None
  if text is None:
    return None
  try:
    found = json.loads(text)
    probe = Probe(int(found['seed']), tuple(map(int, found['image_shape'])),
                  tuple(tuple(map(float, row)) for row in found['logits']), float(found['tolerance']))
    if np.asarray(probe.logits).ndim != 2 or len(probe.image_shape) != 3 or not 0 <= probe.seed < 2**32:
      raise ValueError('other shapes')
  except Exception as error:  # Of JSON that is nested too deep, or of a number that is none, too.
    raise ValueError(f'The probe in the metadata of {path} is damaged: {safe_name(text)!r}.') from error
  return probe


def check(
    network: Network, image_shape: tuple[int, ...], expected: Probe | None = None, *, moments: bool = True
) -> dict[str, Any]:
  """Whether weights are in order, as far as it shows without data.

  Args:
    network: With its weights and preprocessing.
    image_shape: [H, W, C] of the data set's.
    expected: As `stored_probe` gives it; of other image shapes, or where the module computes in less than the float32
      of the probe, it is left out.
    moments: Whether running moments must be such as training leaves them.

  Returns:
    Plain data: the smallest running variance, how many are 0, the logits' standard deviation, and how far the probe's
    are off (None where none was compared).

  Raises:
    ValueError: In one line, what is wrong: numbers that are not finite, negative variances, moments as `init` leaves
      them, logits of another shape or the same for all images, or another probe.
  """
  variances = _checked_moments(network, moments)
  rounded = getattr(network.module, 'dtype', None) is not None and jnp.finfo(network.module.dtype).bits < 32
  same = expected is not None and tuple(expected.image_shape) == tuple(image_shape) and not rounded
  compared = expected if same else None
  logits = _logits(network, probe_images(compared.seed if compared else 0, image_shape))
  _check_logits(logits, getattr(network.module, 'num_classes', None))
  return {
      'min_variance': float(variances.min()) if variances.size else None,
      'zero_variances': int((variances == 0).sum()),
      'logits_std': float(logits.std()),
      'probe_difference': _difference(_kept(logits), compared) if compared else None}


def probe_images(seed: int, image_shape: tuple[int, ...]) -> np.ndarray:
  """Patches of 4 x 4 pixels of drawn colours: [3, H, W, C] float32 in [0, 1], the same everywhere."""
  height, width, channels = image_shape
  draw = np.random.RandomState(seed)  # Whose numbers no later NumPy may change.
  patches = draw.randint(0, 256, (_IMAGES, -(-height // 4), -(-width // 4), channels))
  return (patches.repeat(4, 1).repeat(4, 2)[:, :height, :width] / 255).astype(np.float32)


def _checked_moments(network: Network, trained: bool) -> np.ndarray:
  """All running variances, in one vector; such as training leaves them, if that is asked for."""
  for path, leaf in jax.tree_util.tree_leaves_with_path({'params': network.params, 'batch_stats': network.batch_stats}):
    if not (bad := np.isfinite(np.asarray(leaf, np.float64))).all():
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(f'{name} holds {(~bad).sum()} values that are not finite.')
  moments = {path: (np.asarray(of.mean), np.asarray(of.var)) for path, of in network.running().items()}
  for path, (_, var) in moments.items():
    if trained and (var < 0).any():
      raise ValueError(f'batch_stats/{path}/var holds {(var < 0).sum()} negative variances, down to {var.min():.3g}.')
  if trained and moments and all((mean == 0).all() and (var == 1).all() for mean, var in moments.values()):
    raise ValueError(f'The running moments of all {len(moments)} batch norms are 0 and 1, as before any training: '
                     'the weights come without them.')
  return np.concatenate([var.ravel() for _, var in moments.values()] or [np.zeros(0)])


def _logits(network: Network, images: np.ndarray) -> np.ndarray:
  with jax.default_matmul_precision('highest'):
    logits = jax.jit(_forward)(network, jnp.asarray(images))
  return np.asarray(logits, np.float32)


def _forward(network: Network, images: Array) -> Array:
  return network(images).logits


def _check_logits(logits: np.ndarray, num_classes: int | None) -> None:
  if logits.ndim < 2 or logits.shape[0] != _IMAGES or num_classes not in (None, logits.shape[-1]):
    raise ValueError(f'The logits of {_IMAGES} images have the shape {logits.shape}, must be '
                     f'({_IMAGES}, ..., {num_classes or "classes"}).')
  if not np.isfinite(logits).all():
    raise ValueError(f'{(~np.isfinite(logits)).sum()} of {logits.size} logits of the probe are not finite.')
  if (logits == logits[:1]).all():
    raise ValueError(f'The logits are the same for {_IMAGES} different images: the weights do not compute anything.')


def _kept(logits: np.ndarray) -> np.ndarray:
  """[3, at most 16] of logits [3, ..., K]."""
  flat = logits.reshape(len(logits), -1)
  return flat[:, np.linspace(0, flat.shape[1] - 1, min(_NUMBERS, flat.shape[1])).astype(int)]


def _difference(logits: np.ndarray, expected: Probe) -> float:
  wanted = np.asarray(expected.logits)
  if logits.shape != wanted.shape:
    raise ValueError(f'The probe in the file has logits of the shape {wanted.shape}, the network of {logits.shape}.')
  difference = float(np.abs(logits - wanted).max())
  if not difference <= expected.tolerance:
    raise ValueError(
        f'The logits of the probe are off by {difference:.3g}, may be by {expected.tolerance:.3g}: the preprocessing '
        '(mean, std, order of channels) or an option of the architecture is not what the weights are for.')
  return difference


def digest(path: pathlib.Path) -> str:
  """SHA-256 of the weights that lie at a path, whatever else lies beside them.

  Of a file, as sha256sum gives it. Of a model.json, over the names and digests of it and of the shards that it names,
  in order, and the same for its folder; of a folder with model.safetensors or pytorch_model.bin, over that one; of a
  folder of Orbax, over all files in it.

  Raises:
    OSError: If there is no such file.
    ValueError: If a model.json is damaged, of another kind, or lacks a shard.
  """
  try:
    folder, names = parts(path)
  except RefusedError as error:
    raise ValueError(f'Refused to read {path}: it {first_line(error)}.') from None
  if names == [path.name] and not path.is_dir():
    return _of_file(path)
  return hashlib.sha256(''.join(f'{_of_file(folder / name)}  {name}\n' for name in names).encode()).hexdigest()


def digest_of(arrays: Mapping[str, np.ndarray]) -> str:
  """SHA-256 over the names, dtypes, shapes and bytes of arrays, in their order."""
  found = hashlib.sha256()
  for name, array in arrays.items():
    found.update(f'{name} {array.dtype} {array.shape}'.encode())
    found.update(array.tobytes())
  return found.hexdigest()


def _of_variables(network: Network) -> str:
  leaves = jax.tree_util.tree_leaves_with_path({'params': network.params, 'batch_stats': network.batch_stats})
  return digest_of({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


def _of_file(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _short(numbers: tuple[float, ...]) -> str:
  return f'({", ".join(f"{number:.4g}" for number in numbers)})'
