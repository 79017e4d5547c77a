"""Convolutions that are fast on XLA's CPU backend, also in gradients and in loop bodies.

XLA's CPU backend rewrites convolutions to its fast kernel only outside of loop bodies. Inside
`scan`, `map` or `while`, the *gradient* of a convolution is no ordinary NHWC convolution, and
runs 50 to 150 times slower (https://github.com/jax-ml/jax/issues/12868). This module writes
gradients as ordinary convolutions or as matrix products. Other backends get the stock form, which
they match to their own kernels. benchmarks/convolution.py measures the ratios.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dfkd_jax.types import Array

_NHWC = ('NHWC', 'HWIO', 'NHWC')
_FEW = 4  # Up to so many channels, a matrix product over the taps beats a convolution.
_ONES = (1, 1)
_NO_PADDING = ((0, 0), (0, 0))


def conv_general_dilated(lhs: Array, rhs: Array, window_strides, padding, **kwargs: Any) -> Array:
  """Computes `lax.conv_general_dilated`, on CPU by a faster algorithm, for `nn.Conv`.

  These take the stock form everywhere: grouped convolutions other than depthwise ones (one group
  and one output per channel, no dilation), batch-grouped ones, and layouts other than NHWC, HWIO.
  """
  stock = functools.partial(lax.conv_general_dilated, lhs, rhs, window_strides, padding, **kwargs)
  if jax.default_backend() != 'cpu' or lhs.ndim != 4:
    return stock()
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, kwargs.get('dimension_numbers'))
  canonical = lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
  groups = kwargs.get('feature_group_count', 1), kwargs.get('batch_group_count', 1)
  lhs_dilation = tuple(kwargs.get('lhs_dilation') or _ONES)
  rhs_dilation = tuple(kwargs.get('rhs_dilation') or _ONES)
  is_plain = lhs_dilation == rhs_dilation == _ONES
  is_depthwise = is_plain and groups == (lhs.shape[3], 1) and rhs.shape[2:] == (1, lhs.shape[3])
  if numbers != canonical or not (groups == _ONES or is_depthwise):
    return stock()
  strides = tuple(window_strides)
  if isinstance(padding, str):
    dilated = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:2], rhs_dilation, strict=True)]
    padding = lax.padtype_to_pads(lhs.shape[1:3], dilated, strides, padding)
  padding = tuple((int(low), int(high)) for low, high in padding)
  precision, preferred = kwargs.get('precision'), kwargs.get('preferred_element_type')
  if is_depthwise:
    out = _depthwise(lhs, rhs, strides, padding)
  elif not is_plain or min(rhs.shape[2:]) > _FEW or min(*padding[0], *padding[1]) < 0:
    out = _canonical(lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, precision)
  elif rhs.shape[2] <= _FEW:
    columns = jnp.concatenate(_shifted(lhs, rhs.shape, strides, padding), axis=-1)
    out = _matmul(columns, rhs.reshape(-1, rhs.shape[3]), precision)
  else:
    out = _few_outputs(lhs, rhs, strides, padding, precision)
  return out if preferred is None else out.astype(preferred)


def _pad(maps: Array, padding, dilation=_ONES) -> Array:
  """Pads and dilates maps [B, H, W, C] by zeros. Negative padding crops."""
  edges = [(*edge, step - 1) for edge, step in zip(padding, dilation, strict=True)]
  return lax.pad(maps, jnp.zeros((), maps.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def _windows(padded: Array, kernel_shape, strides) -> list[tuple[slice, ...]]:
  """Slices of padded maps [B, H, W, ...] that each tap of a kernel sees, in tap order."""
  height, width = (padded.shape[axis + 1] - kernel_shape[axis] + 1 for axis in range(2))
  return [
      (slice(None), slice(i, i + height, strides[0]), slice(j, j + width, strides[1]))
      for i in range(kernel_shape[0]) for j in range(kernel_shape[1])]


def _shifted(maps: Array, kernel_shape, strides, padding) -> list[Array]:
  """Maps [B, h, w, C] that each tap of a kernel sees, in tap order."""
  padded = _pad(maps, padding)
  return [padded[window] for window in _windows(padded, kernel_shape, strides)]


def _few_outputs(lhs, rhs, strides, padding, precision):
  """Multiplies each pixel by all taps of the kernel, then sums over the positions of the taps."""
  taps, outputs = rhs.shape[0] * rhs.shape[1], rhs.shape[3]
  matrix = rhs.reshape(taps, *rhs.shape[2:]).swapaxes(0, 1).reshape(rhs.shape[2], -1)
  products = _matmul(lhs, matrix, precision).reshape(*lhs.shape[:3], taps, outputs)
  padded = jnp.pad(products, ((0, 0), *padding, (0, 0), (0, 0)))
  windows = _windows(padded, rhs.shape, strides)
  return sum(padded[(*window, tap)] for tap, window in enumerate(windows))


def _matmul(maps, matrix, precision):
  """[..., I] times [I, O], in two dimensions, so that XLA's CPU backend uses its matrix kernel."""
  flat = jnp.matmul(maps.reshape(-1, maps.shape[-1]), matrix, precision=precision)
  return flat.reshape(*maps.shape[:-1], matrix.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(lhs, rhs, strides, padding):
  """Sums shifted maps times one tap per channel, in one pass over memory."""
  shifted = _shifted(lhs, rhs.shape, strides, padding)
  return sum(maps * tap for maps, tap in zip(shifted, rhs.reshape(-1, rhs.shape[3]), strict=True))


def _depthwise_bwd(strides, padding, saved, cotangent):
  lhs, rhs = saved
  edges = tuple(
      (k - 1 - low, n - (o - 1) * stride - 1 + low) for k, n, o, stride, (low, _) in zip(
          rhs.shape, lhs.shape[1:], cotangent.shape[1:], strides, padding, strict=False))
  dilated = _pad(cotangent, edges, strides)  # One pass again: half the time of JAX's derivative.
  taps = [(maps * cotangent).sum((0, 1, 2)) for maps in _shifted(lhs, rhs.shape, strides, padding)]
  lhs_grad = _depthwise(dilated, rhs[::-1, ::-1], _ONES, _NO_PADDING)
  return lhs_grad, jnp.stack(taps).reshape(rhs.shape)


_depthwise.defvjp(
    lambda lhs, rhs, *static: (_depthwise(lhs, rhs, *static), (lhs, rhs)), _depthwise_bwd)


def _plain(lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, precision):
  return lax.conv_general_dilated(
      lhs, rhs, strides, padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
      dimension_numbers=_NHWC, precision=precision)


_canonical = jax.custom_vjp(_plain, nondiff_argnums=(2, 3, 4, 5, 6))


def _canonical_bwd(strides, padding, lhs_dilation, rhs_dilation, precision, saved, cotangent):
  lhs, rhs = saved
  dilate = lambda n, d: (n - 1) * d + 1
  extents = [  # Per axis: kernel, input and output after their dilations, low padding.
      (dilate(rhs.shape[i], rhs_dilation[i]), dilate(lhs.shape[i + 1], lhs_dilation[i]),
       dilate(cotangent.shape[i + 1], strides[i]), padding[i][0]) for i in range(2)]
  lhs_padding = tuple((k - 1 - low, n - o + low) for k, n, o, low in extents)
  lhs_grad = _canonical(cotangent, rhs[::-1, ::-1].swapaxes(2, 3), lhs_dilation, lhs_padding,
                        strides, rhs_dilation, precision)
  if lhs_dilation != _ONES or rhs_dilation != _ONES:
    rhs_padding = tuple((low, o - n + k - 1 - low) for k, n, o, low in extents)
    rhs_grad = _canonical(lhs.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), rhs_dilation,
                          rhs_padding, lhs_dilation, strides, precision)
    return lhs_grad, rhs_grad.transpose(1, 2, 0, 3)
  # Faster in whole networks than a convolution with a kernel of the maps' size.
  return lhs_grad, _rhs_grad(lhs, rhs.shape, cotangent, strides, padding, precision)


def _rhs_grad(lhs, shape, cotangent, strides, padding, precision):
  """Gradient of a kernel, as matrix products."""
  matmul = functools.partial(jnp.matmul, precision=precision)
  if strides == _ONES and max(shape[:2]) > 2:
    # The concatenated windows make one product, wide enough for XLA's matrix kernel.
    edges = tuple(
        (k - 1 - low, k - 1 - high) for k, (low, high) in zip(shape, padding, strict=False))
    columns = jnp.concatenate(_shifted(cotangent, shape, strides, edges), axis=-1)
    taps = matmul(lhs.reshape(-1, shape[2]).T, columns.reshape(-1, columns.shape[-1]))
    return taps.reshape(shape[2], *shape[:2], shape[3])[:, ::-1, ::-1].transpose(1, 2, 0, 3)
  flat = cotangent.reshape(-1, shape[3])
  shifted = _shifted(lhs, shape, strides, padding)
  return jnp.stack([matmul(maps.reshape(-1, shape[2]).T, flat) for maps in shifted]).reshape(shape)


_canonical.defvjp(
    lambda lhs, rhs, *static: (_canonical(lhs, rhs, *static), (lhs, rhs)), _canonical_bwd)


def upsampled_conv(inputs: Array, kernel: Array) -> Array:
  """Convolves maps [B, H, W, I], upsampled by two, with [3, 3, I, O] to [B, 2H, 2W, O].

  Upsamples to the nearest pixel, and pads by one, without computing the upsampled maps. Each of
  the four pixels that stem from one pixel sees a 2x2 neighbourhood of the small maps, and taps on
  the same pixel add up. This takes 4 products instead of 9, in one convolution with four times the
  outputs. The sums are the same, in another order.
  """

  def fold(taps):
    even = jnp.stack([taps[0], taps[1] + taps[2]])
    return even, jnp.stack([taps[0] + taps[1], taps[2]])

  return _conv_to_double(inputs, kernel, fold)


def transposed_conv(inputs: Array, kernel: Array) -> Array:
  """Computes a transposed convolution of stride 2, [B, H, W, I] to [B, 2H, 2W, O].

  The kernel is [2, 2, O, I], or [4, 4, O, I] with a padding of 1, as in PyTorch.
  """
  kernel = kernel.swapaxes(2, 3)
  if kernel.shape[0] == 4:
    fold = lambda taps: (jnp.stack([taps[3], taps[1]]), jnp.stack([taps[2], taps[0]]))
    return _conv_to_double(inputs, kernel, fold)
  (batch, height, width, channels), outputs = inputs.shape, kernel.shape[-1]
  matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
  pixels = _matmul(inputs, matrix, None).reshape(batch, height, width, 2, 2 * outputs)
  return pixels.swapaxes(2, 3).reshape(batch, 2 * height, 2 * width, outputs)


def _conv_to_double(inputs: Array, kernel: Array, fold) -> Array:
  """Convolves to maps of twice the size; `fold` maps taps along an axis to those of two pixels.

  `fold` takes [k, ...] to two of [2, ...]: the taps of the even and of the odd one of two pixels.
  """
  (batch, height, width, _), outputs = inputs.shape, kernel.shape[-1]
  kernels = [
      columns.swapaxes(0, 1) for rows in fold(kernel) for columns in fold(rows.swapaxes(0, 1))]
  # Taps add up in the kernel's own dtype, which may be wider.
  folded = jnp.concatenate(kernels, axis=-1).astype(inputs.dtype)
  conv = _canonical if jax.default_backend() == 'cpu' else _plain
  padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
  maps = conv(padded, folded, _ONES, _NO_PADDING, _ONES, _ONES, None)

  def pixel(p, q):
    first = (2 * p + q) * outputs
    return maps[:, p:p + height, q:q + width, first:first + outputs]

  # Two pixels side by side are neighbours in memory: no transpose is needed.
  rows = [jnp.concatenate([pixel(p, 0), pixel(p, 1)], -1).reshape(batch, height, 1, -1)
          for p in range(2)]
  return jnp.concatenate(rows, axis=2).reshape(batch, 2 * height, 2 * width, outputs)
