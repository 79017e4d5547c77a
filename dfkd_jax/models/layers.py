"""What the models are built of: convolutions fast in loops, batch norms with taps, initialisers."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import lax

from dfkd_jax import parallel
from dfkd_jax.types import Array, Moments, PyTree

_TAP = 'batch_norm_input'  # A name that no submodule has: sow shares their namespace.
_NHWC = ('NHWC', 'HWIO', 'NHWC')


def conv_general_dilated(lhs: Array, rhs: Array, window_strides, padding, **kwargs: Any) -> Array:
  """`lax.conv_general_dilated`, or on CPU the same with loop-safe gradients.

  XLA's CPU backend rewrites convolutions to its fast kernel only outside of
  loop bodies; inside `scan`, `map` or `while` the *gradient* of a convolution,
  which is no ordinary NHWC convolution, runs 50 to 150 times slower
  (https://github.com/jax-ml/jax/issues/12868). Here both gradients are written
  as ordinary convolutions. Other backends match the stock form to their own
  kernels and get that one.

  Pass it to `nn.Conv(conv_general_dilated=...)`; the arguments are those of
  `lax.conv_general_dilated`. Grouped and batch-grouped convolutions, and
  layouts other than NHWC, HWIO, take the stock form everywhere.
  """
  stock = functools.partial(lax.conv_general_dilated, lhs, rhs, window_strides, padding, **kwargs)
  if jax.default_backend() != 'cpu' or lhs.ndim != 4:
    return stock()
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, kwargs.pop('dimension_numbers', None))
  canonical = lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
  groups = kwargs.pop('feature_group_count', 1), kwargs.pop('batch_group_count', 1)
  if numbers != canonical or groups != (1, 1):
    return stock()
  lhs_dilation = tuple(kwargs.pop('lhs_dilation', None) or (1, 1))
  rhs_dilation = tuple(kwargs.pop('rhs_dilation', None) or (1, 1))
  if isinstance(padding, str):
    dilated = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:2], rhs_dilation, strict=True)]
    padding = lax.padtype_to_pads(lhs.shape[1:3], dilated, window_strides, padding)
  padding = tuple((int(low), int(high)) for low, high in padding)
  precision = kwargs.pop('precision', None)
  preferred = kwargs.pop('preferred_element_type', None)
  out = _canonical(lhs, rhs, tuple(window_strides), padding, lhs_dilation, rhs_dilation, precision)
  return out if preferred is None else out.astype(preferred)


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
  rhs_grad = _canonical(
      lhs.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), rhs_dilation,
      tuple((low, o - n + k - 1 - low) for k, n, o, low in extents), lhs_dilation, strides, precision)
  return lhs_grad, rhs_grad.transpose(1, 2, 0, 3)


_canonical.defvjp(_canonical_fwd, _canonical_bwd)

Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5, use_fast_variance=False)

uniform_fan_in = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # PyTorch's default.
he_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # arXiv:1502.01852, equation 14.


def uniform_bias(fan_in: int) -> nn.initializers.Initializer:
  """Initialiser of a bias as PyTorch has it: uniform within 1 / sqrt(fan_in) of 0."""
  bound = 1 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def dense(features: int, fan_in: int, **kwargs: Any) -> nn.Dense:
  """A dense layer that starts as PyTorch's does; `kwargs` are those of `nn.Dense`."""
  return nn.Dense(features, **{'kernel_init': uniform_fan_in, 'bias_init': uniform_bias(fan_in), **kwargs})


def at_least_float32(x: Array) -> Array:
  """The same numbers, in float32 where they were in less."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pool_features(module: nn.Module, x: Array) -> Array:
  """Mean of maps [B, h, w, D] over their pixels, [B, D]; sown by `module` as `features`."""
  x = at_least_float32(x).mean((1, 2))
  module.sow('intermediates', 'features', x)
  return x


def is_batch_norm(module: nn.Module) -> bool:
  """Whether this is a batch normalisation whose input we match."""
  return isinstance(module, nn.BatchNorm)


@contextlib.contextmanager
def tapped(axis: str | None = None) -> Iterator[None]:
  """Within: every `nn.BatchNorm` sows the moments of its input, and may span devices.

  An interceptor does it, so that an unmodified Linen module of the user's works.
  What is sown into `intermediates` is [C]-sized and at least float32; no
  activation is kept.

  Args:
    axis: Name of a mapped axis whose devices share one batch; the moments, and
      those by which a batch norm in training normalises, are averaged over it.
  """

  def tap(next_fun, args, kwargs, context):
    module = context.module
    if not is_batch_norm(module) or context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    if not module.is_initializing() and module.is_mutable_collection('intermediates'):
      module.sow('intermediates', _TAP, moments_of(args[0] if args else kwargs['x'], axis))
    if axis is not None and module.axis_name is None:
      object.__setattr__(module, 'axis_name', axis)  # Lives as long as this `apply`.
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(tap):
    yield


def moments_of(inputs: Array, axis: str | None = None) -> Moments:
  """Mean and biased variance over all but the last axis, at least in float32."""
  inputs = at_least_float32(inputs)
  axes = tuple(range(inputs.ndim - 1))
  mean = parallel.pmean(inputs.mean(axes), axis)
  # Two passes: E[x^2] - E[x]^2 cancels where the mean is large beside the spread.
  return Moments(mean, parallel.pmean(jnp.square(inputs - mean).mean(axes), axis))


def moments_by_path(intermediates: PyTree) -> dict[str, Moments]:
  """What `tapped` sowed, by path of the batch norm ('block1/bn2'); sorted."""
  flat = traverse_util.flatten_dict(dict(intermediates), is_leaf=lambda _, v: not isinstance(v, dict))
  return {
      '/'.join(path[:-1]): sown[0]
      for path, sown in sorted(flat.items()) if path[-1] == _TAP}
