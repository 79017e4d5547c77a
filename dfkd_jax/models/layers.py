"""What the models are built of: convolutions fast in loops, batch norms with taps, initialisers."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from dfkd_jax import parallel
from dfkd_jax.models.cpu_convolution import conv_general_dilated, upsampled_conv
from dfkd_jax.types import Array, Moments, PyTree

_TAP = 'batch_norm_input'  # Names that no submodule has: sow shares their namespace.
_POOLED = 'batch_norm_input_pooled'
Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5, use_fast_variance=False)
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # PyTorch's default.
he_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # arXiv:1502.01852, equation 14.


class UpsampledConv(nn.Module):
  """`Conv(features, (3, 3), padding=1, use_bias=False)` of maps after nearest upsampling by two.

  Attributes:
    features: O.
    kernel_init: Of the kernel [3, 3, I, O].
    dtype: Of the computation; None for that of parameters and inputs.
  """

  features: int
  kernel_init: nn.initializers.Initializer = uniform_fan_in
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, H, W, I] to [B, 2H, 2W, O]."""
    kernel = self.param('kernel', self.kernel_init, (3, 3, x.shape[-1], self.features))
    dtype = nn.dtypes.canonicalize_dtype(x, kernel, dtype=self.dtype)
    return upsampled_conv(x.astype(dtype), kernel)


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


def remat_if(module: nn.Module, run: Callable[[Array], Array], x: Array, remat: bool) -> Array:
  """`run(x)`; if `remat`, the backward pass computes it anew, and of what lies within keeps only x.

  Args:
    module: That which calls it; what `run` makes are its submodules, with the same paths either way.
    run: From maps to maps; whatever it sows comes out as without.
    x: Maps.
    remat: Whether to trade time for memory.
  """
  return nn.remat(lambda _, x: run(x))(module, x) if remat else run(x)


def is_batch_norm(module: nn.Module) -> bool:
  """Whether this is a batch normalisation whose input we match."""
  return isinstance(module, nn.BatchNorm)


@contextlib.contextmanager
def capture_moments(axis: str | None = None) -> Iterator[None]:
  """Within: every `nn.BatchNorm` sows the moments of its input, and may span devices.

  An interceptor does it, so that an unmodified Linen module of the user's works.
  What is sown into `intermediates` is [C]-sized and at least float32; no
  activation is kept. Means over the pixels of each image, [B, C], are sown
  too, and cost nothing where a compiled program does not use them.

  Args:
    axis: Name of a mapped axis whose devices share one batch; the moments, and
      those by which a batch norm in training normalises, are averaged over it.
  """

  def tap(next_fun, args, kwargs, context):
    module = context.module
    if not is_batch_norm(module) or context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    if not module.is_initializing() and module.is_mutable_collection('intermediates'):
      inputs, shift = args[0] if args else kwargs['x'], module.get_variable('batch_stats', 'mean')
      module.sow('intermediates', _TAP, moments_of(inputs, axis, shift))
      module.sow('intermediates', _POOLED, at_least_float32(inputs).mean(tuple(range(1, inputs.ndim - 1))))
    if axis is None or module.axis_name is not None:
      return next_fun(*args, **kwargs)
    object.__setattr__(module, 'axis_name', axis)  # Lives as long as this `apply`.
    return _spanning(next_fun, module, *args, **kwargs)

  with nn.intercept_methods(tap):
    yield


def _spanning(next_fun: Callable[..., Array], module: nn.BatchNorm, x: Array, *args: Any, **kwargs: Any) -> Array:
  """A batch norm over devices which, in training, waits for them once forwards and once backwards, not twice each.

  Mean and mean square are then sent together, of the inputs less the running mean: their normalised values are the
  same, and nothing cancels out where that is near the mean, see `moments_of`.
  """
  evaluates = nn.merge_param(
      'use_running_average', module.use_running_average, args[0] if args else kwargs.get('use_running_average'))
  shift = module.get_variable('batch_stats', 'mean')
  if evaluates or shift is None or not module.is_mutable_collection('batch_stats'):
    return next_fun(x, *args, **kwargs)
  object.__setattr__(module, 'use_fast_variance', True)
  normalised = next_fun(at_least_float32(x) - jax.lax.stop_gradient(shift), *args, **kwargs)
  # What it has learnt is the mean less the shift.
  moved = module.get_variable('batch_stats', 'mean') + (1 - module.momentum) * shift
  module.put_variable('batch_stats', 'mean', moved)
  return normalised


def moments_of(inputs: Array, axis: str | None = None, shift: Array | None = None) -> Moments:
  """Mean and biased variance over all but the last axis, at least in float32.

  With a shift s [C] both come of one pass, which keeps no activation alive: var = E[(x - s)^2] - E[x - s]^2,
  without cancellation as long as s is nearer to the mean than a few hundred times the spread.

  Args:
    inputs: [..., C].
    axis: The mapped axis of devices that share the batch, if any.
    shift: A guess of the mean, such as the running one; None takes the mean itself, in a pass of its own.
  """
  inputs = at_least_float32(inputs)
  axes = tuple(range(inputs.ndim - 1))
  shift = jax.lax.stop_gradient(parallel.pmean(inputs.mean(axes), axis) if shift is None else shift)
  centred = inputs - shift
  mean, square = parallel.pmean((centred.mean(axes), jnp.square(centred).mean(axes)), axis)
  return Moments(mean + shift, jnp.maximum(square - jnp.square(mean), 0))


def moments_by_path(intermediates: PyTree) -> dict[str, Moments]:
  """What `tapped` sowed, by path of the batch norm ('block1/bn2'); sorted."""
  return _by_path(intermediates, _TAP)


def pooled_by_path(intermediates: PyTree) -> dict[str, Array]:
  """[B, C] means over pixels that `tapped` sowed, by the same paths."""
  return _by_path(intermediates, _POOLED)


def _by_path(intermediates: PyTree, name: str) -> dict[str, Any]:
  flat = traverse_util.flatten_dict(dict(intermediates), is_leaf=lambda _, v: not isinstance(v, dict))
  return {'/'.join(path[:-1]): sown[0] for path, sown in sorted(flat.items()) if path[-1] == name}
