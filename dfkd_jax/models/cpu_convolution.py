"""Convolutions as the CPU backend of XLA runs them fast, gradients and loop bodies included.

XLA's CPU backend rewrites convolutions to its fast kernel only outside of loop
bodies; inside `scan`, `map` or `while` the *gradient* of a convolution, which is no
ordinary NHWC convolution, runs 50 to 150 times slower
(https://github.com/jax-ml/jax/issues/12868). Here gradients are written as ordinary
convolutions or as matrix products. Other backends get the stock form, which they
match to their own kernels. benchmarks/convolution.py has the ratios.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dfkd_jax.types import Array

_NHWC = ('NHWC', 'HWIO', 'NHWC')
_FEW = 4  # Channels up to which a convolution is better a matrix product over its taps.
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
  """Within: what is traced is for this platform ('cpu', 'tpu', ...), whatever JAX's default is.

  For programs that are compiled ahead for a machine that is not there.
  """
  token = _platform.set(platform)
  try:
    yield
  finally:
    _platform.reset(token)


def _for_cpu() -> bool:
  return (_platform.get() or jax.default_backend()) == 'cpu'


def conv_general_dilated(lhs: Array, rhs: Array, window_strides, padding, **kwargs: Any) -> Array:
  """`lax.conv_general_dilated`, or on CPU the same numbers by a faster way.

  Pass it to `nn.Conv(conv_general_dilated=...)`; the arguments are those of
  `lax.conv_general_dilated`. Grouped convolutions other than depthwise ones (a
  group and an output for each channel, no dilation), batch-grouped ones, and
  layouts other than NHWC, HWIO, take the stock form everywhere.
  """
  stock = functools.partial(lax.conv_general_dilated, lhs, rhs, window_strides, padding, **kwargs)
  if not _for_cpu() or lhs.ndim != 4:
    return stock()
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, kwargs.pop('dimension_numbers', None))
  canonical = lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
  groups = kwargs.pop('feature_group_count', 1), kwargs.pop('batch_group_count', 1)
  lhs_dilation = tuple(kwargs.pop('lhs_dilation', None) or (1, 1))
  rhs_dilation = tuple(kwargs.pop('rhs_dilation', None) or (1, 1))
  plain = lhs_dilation == rhs_dilation == (1, 1)
  depthwise = plain and groups == (lhs.shape[3], 1) and rhs.shape[2:] == (1, lhs.shape[3])
  if numbers != canonical or not (groups == (1, 1) or depthwise):
    return stock()
  strides = tuple(window_strides)
  if isinstance(padding, str):
    dilated = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:2], rhs_dilation, strict=True)]
    padding = lax.padtype_to_pads(lhs.shape[1:3], dilated, strides, padding)
  padding = tuple((int(low), int(high)) for low, high in padding)
  precision = kwargs.pop('precision', None)
  preferred = kwargs.pop('preferred_element_type', None)
  if depthwise:
    out = _depthwise(lhs, rhs, strides, padding)
  elif plain and min(rhs.shape[2:]) <= _FEW and min(*padding[0], *padding[1]) >= 0:
    by_taps = _few_inputs if rhs.shape[2] <= _FEW else _few_outputs
    out = by_taps(lhs, rhs, strides, padding, precision)
  else:
    out = _canonical(lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, precision)
  return out if preferred is None else out.astype(preferred)


def _windows(maps: Array, kernel_shape, strides, padding) -> list[tuple[slice, ...]]:
  """Where each tap of a kernel falls on padded maps [B, H, W, ...], in the order of the taps."""
  spans = [maps.shape[axis + 1] + sum(padding[axis]) - kernel_shape[axis] + 1 for axis in range(2)]
  return [
      (slice(None), slice(i, i + spans[0], strides[0]), slice(j, j + spans[1], strides[1]))
      for i in range(kernel_shape[0]) for j in range(kernel_shape[1])]


def _pad(maps: Array, padding, dilation=(1, 1)) -> Array:
  """Zeros around maps [B, H, W, C], and between their pixels; where the padding is negative, less of them."""
  around = [(*edges, apart - 1) for edges, apart in zip(padding, dilation, strict=True)]
  return lax.pad(maps, jnp.zeros((), maps.dtype), ((0, 0, 0), *around, (0, 0, 0)))


def _few_inputs(lhs, rhs, strides, padding, precision):
  """All windows side by side, times the kernel as a matrix."""
  padded = _pad(lhs, padding)
  columns = jnp.concatenate([padded[at] for at in _windows(lhs, rhs.shape, strides, padding)], axis=-1)
  return _matmul(columns, rhs.reshape(-1, rhs.shape[-1]), precision)


def _few_outputs(lhs, rhs, strides, padding, precision):
  """Each pixel times all taps of the kernel, and then the sum over where a tap falls."""
  taps, outputs = rhs.shape[0] * rhs.shape[1], rhs.shape[-1]
  matrix = rhs.reshape(taps, *rhs.shape[2:]).swapaxes(0, 1).reshape(rhs.shape[2], -1)
  products = _matmul(lhs, matrix, precision).reshape(*lhs.shape[:3], taps, outputs)
  padded = jnp.pad(products, ((0, 0), *padding, (0, 0), (0, 0)))
  return sum(padded[(*at, tap)] for tap, at in enumerate(_windows(lhs, rhs.shape, strides, padding)))


def _matmul(maps, matrix, precision):
  """[..., I] times [I, O]: in two dimensions, which XLA's CPU backend gives to its matrix kernel."""
  flat = jnp.matmul(maps.reshape(-1, maps.shape[-1]), matrix, precision=precision)
  return flat.reshape(*maps.shape[:-1], matrix.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(lhs, rhs, strides, padding):
  """Shifted maps times a tap for each channel, and their sum: one pass over memory."""
  padded, taps = _pad(lhs, padding), rhs.reshape(-1, rhs.shape[3])
  return sum(padded[at] * tap for at, tap in zip(_windows(lhs, rhs.shape, strides, padding), taps, strict=True))


def _depthwise_fwd(lhs, rhs, strides, padding):
  return _depthwise(lhs, rhs, strides, padding), (lhs, rhs)


def _depthwise_bwd(strides, padding, saved, cotangent):
  lhs, rhs = saved
  edges = tuple(
      (k - 1 - low, n - (o - 1) * stride - 1 + low) for k, n, o, stride, (low, _) in zip(
          rhs.shape, lhs.shape[1:], cotangent.shape[1:], strides, padding, strict=False))
  dilated = _pad(cotangent, edges, strides)  # As one pass again, this halves the time of what JAX derives.
  padded = _pad(lhs, padding)
  taps = [(padded[at] * cotangent).sum((0, 1, 2)) for at in _windows(lhs, rhs.shape, strides, padding)]
  return _depthwise(dilated, rhs[::-1, ::-1], (1, 1), ((0, 0), (0, 0))), jnp.stack(taps).reshape(rhs.shape)


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)


def _plain(lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, precision):
  return lax.conv_general_dilated(
      lhs, rhs, strides, padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
      dimension_numbers=_NHWC, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _canonical(lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, precision):
  return _plain(lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, precision)


def _canonical_fwd(lhs, rhs, *static):
  return _canonical(lhs, rhs, *static), (lhs, rhs)


def _canonical_bwd(strides, padding, lhs_dilation, rhs_dilation, precision, saved, cotangent):
  lhs, rhs = saved
  dilate = lambda n, d: (n - 1) * d + 1
  extents = [  # Per axis: kernel, input and output after their dilations, low padding.
      (dilate(rhs.shape[i], rhs_dilation[i]), dilate(lhs.shape[i + 1], lhs_dilation[i]),
       dilate(cotangent.shape[i + 1], strides[i]), padding[i][0]) for i in range(2)]
  lhs_grad = _canonical(
      cotangent, rhs[::-1, ::-1].swapaxes(2, 3), lhs_dilation,
      tuple((k - 1 - low, n - o + low) for k, n, o, low in extents), strides, rhs_dilation, precision)
  if lhs_dilation != (1, 1) or rhs_dilation != (1, 1):
    rhs_grad = _canonical(
        lhs.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), rhs_dilation,
        tuple((low, o - n + k - 1 - low) for k, n, o, low in extents), lhs_dilation, strides, precision)
    return lhs_grad, rhs_grad.transpose(1, 2, 0, 3)
  # In whole networks faster than a convolution with a kernel of the maps' size, if not for every shape alone.
  return lhs_grad, _rhs_grad(lhs, rhs.shape, cotangent, strides, padding, precision)


def _rhs_grad(lhs, shape, cotangent, strides, padding, precision):
  """The gradient of a kernel, as products of matrices."""
  if strides == (1, 1):  # All windows of the cotangent side by side: one product, wide enough for the matrix kernel.
    edges = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(shape, padding, strict=False))
    padded = _pad(cotangent, edges)
    columns = jnp.concatenate([padded[at] for at in _windows(cotangent, shape, strides, edges)], axis=-1)
    taps = jnp.matmul(lhs.reshape(-1, shape[2]).T, columns.reshape(-1, columns.shape[-1]), precision=precision)
    return taps.reshape(shape[2], *shape[:2], shape[3])[:, ::-1, ::-1].transpose(1, 2, 0, 3)
  padded = _pad(lhs, padding)
  flat = cotangent.reshape(-1, shape[3])
  windows = [padded[at].reshape(-1, shape[2]).T for at in _windows(lhs, shape, strides, padding)]
  return jnp.stack([jnp.matmul(window, flat, precision=precision) for window in windows]).reshape(shape)


_canonical.defvjp(_canonical_fwd, _canonical_bwd)


def upsampled_conv(inputs: Array, kernel: Array) -> Array:
  """A 3x3 convolution (padding 1) of maps after nearest upsampling by two, without the upsampling.

  Each of the four pixels that come of one sees a 2x2 neighbourhood in the small
  maps, and taps that fall on the same pixel add up: 4 products where the plain form
  has 9, in one convolution with four times the outputs. The same sums in another order.

  Args:
    inputs: [B, H, W, I].
    kernel: [3, 3, I, O].

  Returns:
    [B, 2H, 2W, O].
  """
  batch, height, width, _ = inputs.shape
  outputs = kernel.shape[-1]
  folded = jnp.concatenate(
      [columns.swapaxes(0, 1) for rows in _fold(kernel) for columns in _fold(rows.swapaxes(0, 1))], axis=-1)
  # Taps add up in the kernel's own type, which may be wider.
  maps = _valid(jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0))), folded.astype(inputs.dtype))

  def pixel(p: int, q: int) -> Array:
    first = (2 * p + q) * outputs
    return maps[:, p:p + height, q:q + width, first:first + outputs]

  # Two pixels side by side are neighbours in memory: no transpose is needed.
  rows = [jnp.concatenate([pixel(p, 0), pixel(p, 1)], -1).reshape(batch, height, 1, -1) for p in range(2)]
  return jnp.concatenate(rows, axis=2).reshape(batch, 2 * height, 2 * width, outputs)


def _fold(kernel: Array) -> tuple[Array, Array]:
  """Taps [3, ...] along an axis, for the even and the odd one of two upsampled pixels: each [2, ...]."""
  return jnp.stack([kernel[0], kernel[1] + kernel[2]]), jnp.stack([kernel[0] + kernel[1], kernel[2]])


@jax.custom_vjp
def _valid_by_products(lhs, rhs):
  return _plain(lhs, rhs, (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), None)


def _valid_fwd(lhs, rhs):
  return _valid_by_products(lhs, rhs), (lhs, rhs)


def _valid_bwd(saved, cotangent):
  lhs, rhs = saved
  edges = tuple((k - 1, k - 1) for k in rhs.shape[:2])
  lhs_grad = _canonical(cotangent, rhs[::-1, ::-1].swapaxes(2, 3), (1, 1), edges, (1, 1), (1, 1), None)
  # For a kernel this small a product for each tap beats the convolution with a kernel of the maps' size.
  flat = cotangent.reshape(-1, cotangent.shape[-1])
  windows = _windows(lhs, rhs.shape, (1, 1), ((0, 0), (0, 0)))
  taps = [lhs[at].reshape(flat.shape[0], -1).T @ flat for at in windows]
  return lhs_grad, jnp.stack(taps).reshape(rhs.shape)


_valid_by_products.defvjp(_valid_fwd, _valid_bwd)


def _valid(lhs: Array, rhs: Array) -> Array:
  if _for_cpu():
    return _valid_by_products(lhs, rhs)
  return _plain(lhs, rhs, (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), None)
