"""Notices a wrong mean or std of a teacher, by the input of its first batch norm.

Published teachers expect [0, 1], [-1, 1], 0..255 or standardized images, and files of weights do
not say which. The running moments of the first batch norm do: they are of its input in training.
So its input is measured under the configured mean and std, and under usual others. The order of
channels cannot be told this way: most first layers have the same moments for RGB and BGR.

Of public teachers, the right mean and std give a distance of 0.01 to 0.16 on real images and up to
0.5 on drawn ones. Wrong ones that cost more than two points give from 1.4 to more than 20,000;
docs/own_teacher.md has a table.

The right mean and std give up to 0.5 if images are of one scene, and up to 0.6 for images of
another data set, such as enlarged CIFAR-10 in ResNet-50. Uniform noise gives 1.5: it is too rough.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.network import Network
from dfkd_jax.types import Array, Moments

# Distances from which on the mean and std look wrong: on real images, and on drawn ones.
FAR, FAR_DRAWN = 1.0, 5.0
NEARER = 4.0  # Ratio of distances from which on another mean and std fit better.
TIED = 0.1  # Difference of distances that tells nothing; the first candidate wins.
DEAD = 1e-6  # Running variance of channels that are ignored, relative to the mean over channels.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GREY_MEAN, _GREY_STD = (0.449,), (0.226,)  # The same, averaged over channels.
_BYTE = 1 / 255


class Scale(NamedTuple):
  """A mean and std of images in [0, 1]; one number for all channels, or one each."""

  name: str
  mean: tuple[float, ...]
  std: tuple[float, ...]


def check(network: Network, images: np.ndarray | None, number: int,
          image_shape: tuple[int, int, int]) -> str | None:
  """Returns a note if the network's mean and std look wrong and others fit better, else None.

  Args:
    images: Real images [N, H, W, C], uint8 or float in [0, 1]. `number` of them are used, evenly
      spaced. None: `number` images of `image_shape` are drawn, which tell less.
  """
  has_real = images is not None
  if has_real:
    images = images[np.linspace(0, len(images) - 1, min(number, len(images))).astype(int)]
    images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
  else:
    images = draw_images(number, image_shape)
  path = find_first_batch_norm(network, images)
  if path is None:
    return None
  own, running = Scale('', network.mean, network.std), jax.device_get(network.running()[path])
  moments = measure(network, images, path, own)
  own_distance = distance(moments, running)
  if own_distance < (FAR if has_real else FAR_DRAWN):
    return None
  scales = list_scales(network, images.shape[-1])
  if has_real:
    mean, std = (tuple(numbers.tolist()) for numbers in (images.mean((0, 1, 2)),
                                                         images.std((0, 1, 2))))
    scales.append(Scale('the mean and std of the images themselves', mean, std))
  distances = [distance(measure(network, images, path, scale), running) for scale in scales]
  if not min(distances) < own_distance / NEARER:
    return None
  nearest = next(i for i, value in enumerate(distances) if value <= min(distances) + TIED)
  return _format_note(path, moments, running, scales[nearest],
                      (own_distance, distances[nearest]), has_real)


def _format_note(path: str, moments: Moments, running: Moments, scale: Scale,
                 distances: tuple[float, float], has_real: bool) -> str:
  """Formats the note; `distances` are the network's own and the one of `scale`."""
  alive = _alive(running)
  deviation = np.median(np.sqrt(moments.var[alive] / running.var[alive]))
  verb = 'would fit' if distances[1] < FAR else 'would come nearer'
  flags = (f"--config.teacher.{name}='{_format_tuple(getattr(scale, name))}'"
           for name in ('mean', 'std'))
  drawn = '' if has_real else ' (measured on drawn images, as there are no real ones at hand)'
  return (f'the input of batch norm {path!r} has a standard deviation {deviation:.3g}x its '
          f'running one: mean and std of the teacher look wrong{drawn}; {scale.name} {verb} '
          f'(distance {distances[1]:.2g} instead of {distances[0]:.2g}): {" ".join(flags)}')


def measure(network: Network, images: Array, path: str, scale: Scale) -> Moments:
  """Measures the input of one batch norm for images [B, H, W, C], with another mean and std."""
  mean, std = (np.broadcast_to(np.float32(numbers), images.shape[-1])
               for numbers in (scale.mean, scale.std))
  return jax.device_get(_moments(network, images, mean, std, path))


@functools.partial(jax.jit, static_argnames='path')
def _moments(network: Network, images: Array, mean: Array, std: Array, path: str) -> Moments:
  """Compiled once for all means and stds [C]. XLA leaves out the layers after the batch norm."""
  return network.replace(mean=mean, std=std)(images).moments[path]


def distance(moments: Moments, running: Moments) -> float:
  """Median over channels of the symmetric divergence of two normal distributions.

  With the means m, n and variances v, w of a channel, KL(N(m, v), N(n, w)) + KL(N(n, w), N(m, v))
  = ((v + (m - n)^2) / w + (w + (m - n)^2) / v) / 2 - 1. It does not change if a channel is scaled.
  A wrong deviation by r gives about r^2 / 2, or 1 / (2 r^2). The median ignores channels that
  depend on the kind of images, such as those for colours. Channels without variance are left out.
  """
  alive = _alive(running)
  mean, var, other_mean, other_var = (
      np.asarray(values, np.float64)[alive] for values in (*moments, *running))
  var = np.maximum(var, 1e-12 * other_var)
  squared = np.square(mean - other_mean)
  divergence = ((var + squared) / other_var + (other_var + squared) / var) / 2 - 1
  if not alive.any():
    return 0.0
  return float(np.nan_to_num(np.median(divergence), nan=np.inf))


def _alive(running: Moments) -> np.ndarray:
  return np.asarray(running.var) > DEAD * np.mean(running.var)


def list_scales(network: Network, channels: int) -> list[Scale]:
  """Lists other means and stds: the network's own with slips by 255, then the usual ones."""
  own_mean, own_std = network.mean, network.std
  times = lambda values, factor: tuple(float(value) * factor for value in values)
  scales = [Scale('the same mean with the std times 255', own_mean, times(own_std, 255)),
            Scale('the same mean with the std divided by 255', own_mean, times(own_std, _BYTE))]
  if max(own_mean) > 1:  # stated for bytes
    mean = times(own_mean, _BYTE)
    scales += [Scale('mean and std divided by 255', mean, times(own_std, _BYTE)),
               Scale('the mean divided by 255, with the same std,', mean, own_std)]
  mean, std = (_IMAGENET_MEAN, _IMAGENET_STD) if channels == 3 else (_GREY_MEAN, _GREY_STD)
  return [*scales,
          Scale("ImageNet's mean and std", mean, std),
          Scale('images in [-1, 1]', (0.5,), (0.5,)),
          Scale('images in [0, 1]', (0.0,), (1.0,)),
          Scale("images in 0..255 minus ImageNet's mean (often with teacher.bgr)", mean, (_BYTE,)),
          Scale('images in 0..255', (0.0,), (_BYTE,)),
          Scale("ImageNet's mean, with its std times 255,", mean, times(std, 255))]


def find_first_batch_norm(network: Network, images: Array) -> str | None:
  """Returns the path of the first batch norm in the forward pass, as in `Outputs.moments`."""
  paths = []

  def record(next_fun, args, kwargs, context):
    if isinstance(context.module, nn.BatchNorm) and context.method_name == '__call__':
      paths.append(context.module.path)
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(record):
    # A new function, as JAX does not call one again that it has traced before.
    captured = jax.eval_shape(lambda images: network(images).moments, images)
  running = network.running()
  if not paths:
    return None
  path = layers.join_path(paths[0])
  path = path if path in captured else f'{path}/0'  # where nn.scan stacks layers
  return path if path in captured and path in running else None


def draw_images(number: int, image_shape: tuple[int, int, int]) -> np.ndarray:
  """Draws smooth images [B, H, W, C] in [0, 1], float32, with statistics as of photos.

  The amplitudes of their spectrum fall as 1 / f (Field 1987, https://doi.org/10.1364/JOSAA.4.002379),
  and they are mostly grey. The mean is about 0.45, the standard deviation about 0.25.
  """
  height, width, channels = image_shape
  frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
  amplitudes = 1 / np.maximum(frequencies, 1 / max(height, width))
  draw = np.random.default_rng(0)

  def draw_noise(channels: int) -> np.ndarray:
    white = np.fft.rfft2(draw.standard_normal((number, channels, height, width)))
    noise = np.fft.irfft2(white * amplitudes, (height, width))
    return np.moveaxis(noise / noise.std(), 1, -1)

  images = draw_noise(1) + 0.3 * draw_noise(channels)
  return np.clip(0.45 + 0.25 * images, 0, 1).astype(np.float32)


def _format_tuple(values: Sequence[float]) -> str:
  """Formats numbers as a tuple for a flag."""
  return f'({", ".join(f"{value:.4g}" for value in values)}{"," * (len(values) == 1)})'
