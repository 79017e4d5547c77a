"""Building blocks of the models: convolutions, batch norms with captured inputs, initializers."""

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dfkd_jax import parallel
from dfkd_jax.models.cpu_convolution import conv_general_dilated, upsampled_conv
from dfkd_jax.types import Array, Moments, PyTree

_CAPTURE = 'batch_norm_input'  # No submodule may have this name: `sow` shares their namespace.
Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5, use_fast_variance=False)
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # PyTorch's default.
normal_inits = {'kernel_init': nn.initializers.normal(0.01), 'bias_init': nn.initializers.zeros}
he_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # arXiv:1502.01852, eq. 14.


class Capture(NamedTuple):
  """The input of one batch norm. nn.scan and nn.vmap stack their layers along further axes."""

  moments: Moments  # [C]
  pooled: Array  # [B, C], mean over the pixels of each image.
  marker: Array  # [0], so that its shape tells where layers are stacked.


class UpsampledConv(nn.Module):
  """Equals `Conv(features, (3, 3), padding=1, use_bias=False)` after nearest upsampling by two."""

  features: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param('kernel', uniform_fan_in, (3, 3, x.shape[-1], self.features))
    dtype = nn.dtypes.canonicalize_dtype(x, kernel, dtype=self.dtype)
    return upsampled_conv(x.astype(dtype), kernel)


def conv_norm(module: nn.Module, x: Array, width: int, size: int, strides: int = 1, *, train: bool,
              names: tuple[str, str], use_bias: bool = False, padding: str | int | None = None,
              rate: int = 1, kernel_init: nn.initializers.Initializer = he_fan_out,
              **options: Any) -> Array:
  """Applies a convolution and its batch norm to maps: [B, H, W, I] to [B, H', W', width].

  Both are submodules of `module`, called `names`, with its dtype, epsilon and momentum. The kernel
  is dilated by `rate`, and the padding is `rate * (size // 2)` by default. Further options are
  passed to `nn.Conv`.
  """
  conv = Conv(
      width, (size, size), strides, rate * (size // 2) if padding is None else padding,
      kernel_dilation=rate, use_bias=use_bias, kernel_init=kernel_init, dtype=module.dtype,
      name=names[0], **options)
  norm = BatchNorm(use_running_average=not train, epsilon=getattr(module, 'epsilon', 1e-5),
                   momentum=getattr(module, 'momentum', 0.9), dtype=module.dtype, name=names[1])
  return norm(conv(x))


def uniform_bias(fan_in: int) -> nn.initializers.Initializer:
  """PyTorch's initializer of biases: uniform within 1 / sqrt(fan_in) of 0."""
  bound = 1 / math.sqrt(fan_in)
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def dense(features: int, fan_in: int, **kwargs: Any) -> nn.Dense:
  """Makes a dense layer with PyTorch's initializers; `kwargs` are passed to `nn.Dense`."""
  inits = {'kernel_init': uniform_fan_in, 'bias_init': uniform_bias(fan_in)}
  return nn.Dense(features, **inits | kwargs)


def classify(module: nn.Module, x: Array, **inits: Any) -> Array:
  """Averages maps [B, h, w, D] over pixels, and applies the head of the module to them."""
  return apply_head(module, at_least_float32(x).mean((1, 2)), **inits)


def apply_head(module: nn.Module, x: Array, **inits: Any) -> Array:
  """Sows features [B, D] and maps them to logits by a dense layer, called `module.head`.

  If `module.head_width` is not None, a hidden layer of that width and a ReLU come before it. Its
  initializer is He's (arXiv:1502.01852); `inits` are for the last layer.
  """
  module.sow('intermediates', 'features', x)
  if module.head_width is not None:
    x = nn.relu(nn.Dense(module.head_width, kernel_init=nn.initializers.he_normal(),
                         name=head_layers(module)[0])(x))
  return dense(module.num_classes, x.shape[-1], name=module.head, **inits)(x)


def head_layers(module: nn.Module) -> tuple[str, ...]:
  """Names of the dense layers of a module's head, in order: the hidden one if any, and the last.

  Empty if the module does not name its last dense layer, by an attribute `head`.
  """
  name = getattr(module, 'head', None)
  if not isinstance(name, str):
    return ()
  return (name,) if getattr(module, 'head_width', None) is None else (f'{name}_hidden', name)


def apply_block(module: nn.Module, run: Callable[[Array], Array], x: Array) -> Array:
  """Returns `run(x)`. If `module.remat`, the backward pass recomputes it and keeps only x.

  Submodules that `run` creates in `module`, and values that it sows, are the same either way.
  """
  return nn.remat(lambda _, x: run(x))(module, x) if getattr(module, 'remat', False) else run(x)


def apply_stages(module: nn.Module, stages: Iterable, x: Array, train: bool) -> Array:
  """Calls the functions of each stage to make blocks, applies these and sows maps `stage_<i>`."""
  for i, blocks in enumerate(stages, 1):
    for make_block in blocks:
      x = apply_block(module, lambda x, make_block=make_block: make_block()(x, train), x)
    module.sow('intermediates', f'stage_{i}', x)
  return x


def at_least_float32(x: Array) -> Array:
  """Casts to float32, unless the dtype is at least as precise."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@contextlib.contextmanager
def capture_moments(axis: str | None = None) -> Iterator[None]:
  """Within this context, every `nn.BatchNorm` sows the moments of its input.

  This is a method interceptor, so a user's own Linen module works unmodified. The moments are
  sown into `intermediates` as [C] vectors of at least float32; no activation is kept. The means
  over the pixels of each image, [B, C], are sown too; programs that do not use them drop them.
  Devices along the mapped `axis` share one batch: moments are averaged over them, and batch norms
  in training normalize by these averages.
  """

  def intercept(next_fun, args, kwargs, context):
    norm = context.module
    if not isinstance(norm, nn.BatchNorm) or context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    if not norm.is_initializing() and norm.is_mutable_collection('intermediates'):
      inputs = jnp.moveaxis(args[0] if args else kwargs['x'], norm.axis, -1)
      moments = moments_of(inputs, axis, norm.get_variable('batch_stats', 'mean'))
      pooled = at_least_float32(inputs).mean(tuple(range(1, inputs.ndim - 1)))
      norm.sow('intermediates', _CAPTURE, Capture(moments, pooled, jnp.zeros(0)))
    if axis is None or norm.axis_name is not None:
      return next_fun(*args, **kwargs)
    object.__setattr__(norm, 'axis_name', axis)  # The instance lives as long as this `apply`.
    return _normalize_over_devices(next_fun, norm, *args, **kwargs)

  with nn.intercept_methods(intercept):
    yield


def _normalize_over_devices(next_fun, norm, x, *args, **kwargs):
  """Applies a batch norm that, in training, waits for other devices once each way, not twice.

  Mean and mean square are sent together, of the inputs minus the running mean. This does not
  change the normalized values, and avoids cancellation (see `moments_of`).
  """
  evaluates = nn.merge_param('use_running_average', norm.use_running_average,
                             args[0] if args else kwargs.get('use_running_average'))
  shift = norm.get_variable('batch_stats', 'mean')
  if evaluates or shift is None or not norm.is_mutable_collection('batch_stats'):
    return next_fun(x, *args, **kwargs)
  object.__setattr__(norm, 'use_fast_variance', True)
  along_axis = shift.reshape(-1, *[1] * (x.ndim - 1 - norm.axis % x.ndim))
  shifted = at_least_float32(x) - jax.lax.stop_gradient(along_axis)
  normalized = next_fun(shifted, *args, **kwargs)
  # The batch norm has learnt the mean minus the shift.
  moved = norm.get_variable('batch_stats', 'mean') + (1 - norm.momentum) * shift
  norm.put_variable('batch_stats', 'mean', moved)
  return normalized


def moments_of(inputs: Array, axis: str | None = None, shift: Array | None = None) -> Moments:
  """Mean and biased variance [C] of inputs [..., C] on all devices of `axis`, at least float32.

  With an estimate s [C] of the mean as `shift`, such as the running mean, one pass gives both and
  keeps no activation alive: var = E[(x - s)^2] - E[x - s]^2. This does not cancel while s is nearer
  to the mean than a few hundred standard deviations. None computes the mean in its own pass.
  """
  inputs = at_least_float32(inputs)
  axes = tuple(range(inputs.ndim - 1))
  shift = parallel.pmean(inputs.mean(axes), axis) if shift is None else shift
  shift = jax.lax.stop_gradient(shift)
  centred = inputs - shift
  mean, square = parallel.pmean((centred.mean(axes), jnp.square(centred).mean(axes)), axis)
  return Moments(mean + shift, jnp.maximum(square - jnp.square(mean), 0))


def captures_by_path(intermediates: PyTree) -> dict[str, Capture]:
  """Inputs that `capture_moments` sowed, by path of the batch norm, such as 'block1/bn2'.

  Layers that nn.scan or nn.vmap stacks along their first axis are told apart by a number:
  'blocks/bn/0', 'blocks/bn/1'. The second call of one batch norm is 'bn/call 2'.
  """
  layers = {}
  for (*path, name), calls in traverse_util.flatten_dict(dict(intermediates)).items():
    for number, capture in enumerate(calls if name == _CAPTURE else (), 1):
      parts = path if number == 1 else [*path, f'call {number}']
      *stacked, size = capture.marker.shape  # The size is 0 unless layers are stacked behind it.
      layers |= _unstack(parts, capture, () if size else stacked)
  return dict(sorted(layers.items()))


def running_by_path(batch_stats: PyTree) -> dict[str, Moments]:
  """Running moments of all normalizations, by the paths of `captures_by_path`.

  A normalization is any module with names in `batch_stats` that contain 'mean' and 'var'.
  """
  norms = defaultdict(dict)
  for (*path, name), value in traverse_util.flatten_dict(dict(batch_stats)).items():
    norms[tuple(path)] |= {moment: value for moment in Moments._fields if moment in name}
  layers = {}
  for path, moments in norms.items():
    if len(moments) == 2:
      layers |= _unstack(path, Moments(**moments), moments['mean'].shape[:-1])
  return dict(sorted(layers.items()))


def _unstack(path: Sequence[str], tree: PyTree, shape: Sequence[int]) -> dict[str, PyTree]:
  """One tree for each index into the leading axes `shape`, by path; the tree itself if ()."""
  entries = {}
  for index in np.ndindex(*shape):
    name = join_path((*path, *map(str, index)))
    entries[name] = jax.tree.map(lambda leaf, at=index: leaf[at] if at else leaf, tree)
  return entries


def join_path(parts: Iterable[str]) -> str:
  """Joins names with slashes. Slashes in names are escaped as in JSON pointers (RFC 6901)."""
  return '/'.join(part.replace('~', '~0').replace('/', '~1') for part in parts)
