"""A generator that translates drawings of shapes that occlude each other."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array

# The 16 numbers of a shape.
_SIZE, _ASPECT, _ANGLE, _X, _Y, _KIND, _BRIGHTNESS = range(7)
_COLOR, _SLOPE_X, _SLOPE_Y = 7, 10, 11  # A colour has up to three.
_TEXTURES, _DIRECTION, _FREQUENCY = slice(12, 14), 14, 15
_NUMBERS = 16


class ShapesGenerator(nn.Module):
  """Latents [B, K, 16] to images in (0, 1): K shapes, drawn one over the other, then translated.

  Opaque shapes of many sizes that occlude each other, "dead leaves", have much of the statistics
  of natural images (Lee et al., Occlusion Models for Natural Images, IJCV 2001), and networks learn
  from such drawings (Baradad et al., Learning to See by Looking at Noise, arXiv:2106.05963). Here a
  small U-shaped network gives a drawing the colours and textures that the teacher expects. Each
  image has a layout of its own, where a dense layer of latents tends to a few. The combination is
  ours. Latents get no gradient.
  """

  image_shape: tuple[int, int, int] = (96, 128, 3)  # (H, W, C).
  width: int = 32  # Channels of the inner convolutions; the outer ones have half as many.
  dtype: Any = None
  first_layers: ClassVar[tuple[str, ...]] = ('conv0', 'bn0')

  def latent_shape(
      self, image_shape: tuple[int, int, int], latent_dim: int) -> tuple[int, int]:
    """Shape (K, 16) of the latents of one image (H, W, C), for K = `latent_dim` shapes.

    Raises ValueError for more than three channels.
    """
    if image_shape[-1] > 3:
      raise ValueError(f'This generator makes images of 1 to 3 channels, not {image_shape[-1]}.')
    return latent_dim, _NUMBERS

  @nn.compact
  def __call__(self, latents: Array, train: bool = True) -> Array:
    height, width, channels = self.image_shape
    size = height + -height % 4, width + -width % 4  # Halved twice.
    drawing = jax.lax.stop_gradient(draw(latents, (*size, channels)))
    inner, outer = self.width, self.width // 2
    whole = self._block(drawing, outer, 0, train)
    half = self._block(whole, inner, 1, train, strides=2)
    x = self._block(half, inner, 2, train, strides=2)
    for index in (3, 4):
      x += self._block(x, inner, index, train)
    x = self._block(x, inner, 5, train, upsamples=True) + half
    x = self._block(x, outer, 6, train, upsamples=True) + whole
    change = layers.Conv(channels, (3, 3), padding=1, kernel_init=layers.uniform_fan_in,
                         dtype=self.dtype, name='conv7')(x)
    gain = self.param('gain', nn.initializers.ones, (channels,))
    images = nn.sigmoid(layers.at_least_float32(gain * drawing + change))
    return images[:, :height, :width]

  def _block(self, x, width, index, train, strides=1, upsamples=False):
    options = {'dtype': self.dtype, 'name': f'conv{index}'}
    conv = layers.UpsampledConv(width, **options) if upsamples else layers.Conv(
        width, (3, 3), strides, padding=1, use_bias=False, kernel_init=layers.uniform_fan_in,
        **options)
    norm = layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name=f'bn{index}')
    return nn.leaky_relu(norm(conv(x)), 0.2)


def draw(latents: Array, image_shape: tuple[int, int, int]) -> Array:
  """Draws K shapes of numbers from N(0, 1), [B, K, 16], one over the other, to [B, H, W, C].

  The first shapes are the largest, and lie behind; size falls with the place k as k^-0.6. Half of
  them are ellipses, half rectangles; 60 % are upright. Each has a colour, a slope of brightness,
  and some of two textures of the image. Values have a mean near 0 and a variance near 1.

  A shape's 16 numbers: size, aspect, angle, centre (x, y), kind, brightness, colour (3), slope of
  brightness (2), strength of the textures (2), direction and frequency of its wave in them.
  """
  height, width, channels = image_shape
  uniform = jax.scipy.special.ndtr(latents)
  y, x = jnp.arange(height) / height, jnp.arange(width) / height
  textures = _textures(uniform, x, y)

  def add(drawing, shape):
    z, u, k = shape  # [B, 16], [B, 16], []
    pixels = lambda values: values[:, None, None]
    size = 0.7 * (k + 1)**-0.6 * 2**(0.5 * z[:, _SIZE])
    aspect = jnp.exp(0.4 * z[:, _ASPECT])
    angle = jnp.where(u[:, _ANGLE] < 0.6, 0, jnp.pi * u[:, _ANGLE] / 0.4)
    dx = x - pixels((1.2 * u[:, _X] - 0.1) * width / height)
    dy = y[:, None] - pixels(1.2 * u[:, _Y] - 0.1)
    cos, sin = pixels(jnp.cos(angle)), pixels(jnp.sin(angle))
    a = (dx * cos + dy * sin) / pixels(size * aspect)
    b = (dy * cos - dx * sin) / pixels(size / aspect)
    corners, round_ = jnp.maximum(abs(a), abs(b)), jnp.hypot(a, b)
    distance = jnp.where(pixels(z[:, _KIND]) > 0, corners, round_)
    mask = jnp.clip((1 - distance) * pixels(size) * height + 0.5, 0, 1)  # Edges of a pixel.
    strength = pixels(0.2 * z[:, _TEXTURES] * abs(z[:, _TEXTURES]))  # Most shapes are nearly plain.
    brightness = 0.3 * (pixels(z[:, _SLOPE_X]) * a + pixels(z[:, _SLOPE_Y]) * b)
    brightness += strength[..., 0] * textures[0] + strength[..., 1] * textures[1]
    color = 0.9 * z[:, _BRIGHTNESS, None] + 0.35 * z[:, _COLOR:_COLOR + channels]
    filled = pixels(color) + jnp.clip(brightness, -2, 2)[..., None]
    return drawing + mask[..., None] * (filled - drawing), None

  blank = jnp.zeros((len(latents), *image_shape), latents.dtype)
  shapes = latents.swapaxes(0, 1), uniform.swapaxes(0, 1), jnp.arange(latents.shape[1])
  return jax.lax.scan(add, blank, shapes)[0]


def _textures(uniform, x, y):
  """A coarse and a fine texture [B, H, W]: sums of plane waves, one of each shape."""
  direction = 2 * jnp.pi * uniform[..., _DIRECTION]
  phase = (14 * jnp.pi * uniform[..., _X])[..., None]
  textures = []
  for low, high in ((1.0, 3.5), (3.5, 5.5)):  # Powers of two: waves on the height of the image.
    frequency = 2 * jnp.pi * 2**(low + (high - low) * uniform[..., _FREQUENCY])
    on_x = (frequency * jnp.cos(direction))[..., None] * x + phase
    on_y = (frequency * jnp.sin(direction))[..., None] * y
    # cos(a + b) = cos a cos b - sin a sin b: a product of matrices, not K maps.
    texture = jnp.einsum('bkh,bkw->bhw', jnp.cos(on_y), jnp.cos(on_x))
    texture -= jnp.einsum('bkh,bkw->bhw', jnp.sin(on_y), jnp.sin(on_x))
    textures.append(texture / math.sqrt(uniform.shape[1] / 2))
  return textures
