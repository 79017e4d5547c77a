"""Times gradients of convolutions inside a scan: XLA's convolution against ours.

python benchmarks/convolution.py

On CPU, XLA's convolution is 10 to 150 times slower in a loop body, and its depthwise form also
outside. On other platforms both columns are the same program.
"""

import json
import time

import jax
import jax.numpy as jnp
from jax import lax

from dfkd_jax import report
from dfkd_jax.models import cpu_convolution

_NUMBERS = ('NHWC', 'HWIO', 'NHWC')
CASES = {  # images [B, H, W, C], outputs, stride
    'one channel in': ((64, 28, 28, 1), 16, 1),
    'colour in': ((64, 32, 32, 3), 16, 1),
    'middle': ((64, 16, 16, 32), 32, 1),
    'stride two': ((64, 32, 32, 16), 32, 2),
    'colour out': ((64, 32, 32, 32), 3, 1),
}
DEPTHWISE = {  # Layers of a MobileNetV2 for 224 pixels: images [B, H, W, C], stride
    'depthwise': ((2, 56, 56, 96), 1),
    'depthwise, large': ((2, 112, 112, 32), 1),
    'depthwise, stride two': ((2, 56, 56, 96), 2),
}


def stock(images, kernel, stride):
  return lax.conv_general_dilated(
      images, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=_NUMBERS,
      feature_group_count=images.shape[-1] // kernel.shape[2])


def ours(images, kernel, stride):
  return cpu_convolution.conv_general_dilated(
      images, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=_NUMBERS,
      feature_group_count=images.shape[-1] // kernel.shape[2])


def upsampled(images, kernel, stride):
  del stride
  return stock(jnp.repeat(jnp.repeat(images, 2, 1), 2, 2), kernel, 1)


def folded(images, kernel, stride):
  del stride
  return cpu_convolution.upsampled_conv(images, kernel)


def seconds_per_step(
    convolve, images, kernel, stride, *, loop: bool, steps: int = 4, repeats: int = 3
) -> float:
  """Returns the least seconds of a forward and a backward pass, in a scan or unrolled."""

  @jax.jit
  def program(images, kernel):
    def step(carry, _):
      loss = lambda images, kernel: jnp.square(convolve(images, kernel, stride)).sum()
      grads = jax.grad(loss, (0, 1))(images + carry * 1e-9, kernel)
      return carry + sum(grad.mean() for grad in grads), None

    return lax.scan(step, 0.0, None, length=steps, unroll=1 if loop else steps)[0]

  jax.block_until_ready(program(images, kernel))
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(program(images, kernel))
    times.append(time.perf_counter() - began)
  return min(times) / steps


def main() -> None:
  print('| case | stock, in a scan, ms | stock, unrolled, ms | ours, in a scan, ms '
        '| stock / ours in a scan |')
  print('|---|---|---|---|---|')
  rows = [(name, stock, ours, shape, (shape[-1], outputs), stride)
          for name, (shape, outputs, stride) in CASES.items()]
  rows.append(('after upsampling', upsampled, folded, (64, 14, 14, 32), (32, 16), 1))
  rows += [(name, stock, ours, shape, (1, shape[-1]), stride)
           for name, (shape, stride) in DEPTHWISE.items()]
  for name, slow, fast, shape, channels, stride in rows:
    images = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, *channels))
    looped, unrolled, mine = (
        1e3 * seconds_per_step(convolve, images, kernel, stride, loop=loop)
        for convolve, loop in ((slow, True), (slow, False), (fast, True)))
    print(f'| {name} | {looped:.1f} | {unrolled:.1f} | {mine:.1f} | {looped / mine:.1f} |',
          flush=True)
  print(json.dumps(report.device()))


if __name__ == '__main__':
  main()
