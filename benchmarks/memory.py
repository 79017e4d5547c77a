r"""Prints memory and FLOPs of a round's two programs at ImageNet's size, as XLA reports them.

python benchmarks/memory.py --batch_size 100 400 --dtype float32 bfloat16

The programs are one call of FastDFKD's synthesis and the student's steps. They are compiled from
shapes and never run, for each batch size and dtype, with and without recomputation in teacher,
student and generator.

--platform=tpu compiles for a topology of TPUs and needs no TPU (pip install 'jax[tpu]'). Each
program takes minutes. Use it for accelerators. --platform=cpu compiles for this machine, where
convolutions have temporaries of their own, recomputation is merged away and bfloat16 is computed
in float32. --platform=stock is CPU without our convolutions. XLA counts the body of a loop once,
so FLOPs are of one step.
"""

import argparse
import contextlib
import functools
import itertools
import os
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from dfkd_jax import augment, distill, models, synth, tasks
from dfkd_jax.types import PyTree

SHAPE, CLASSES, LATENT = (224, 224, 3), 1000, 256
COLUMNS = ('program', 'batch', 'dtype', 'remat', 'arguments', 'outputs', 'temporaries', 'peak',
           'GFLOP an image')


def place(platform: str, topology: str) -> jax.sharding.Sharding:
  """Returns the device that programs are compiled for."""
  if platform != 'tpu':
    return jax.sharding.SingleDeviceSharding(jax.devices('cpu')[0])
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # For machines outside of Google Cloud.
  from jax.experimental import topologies

  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  return jax.sharding.SingleDeviceSharding(devices[0])


def programs(pair: str, batch_size: int, dtype, remat: bool, num_steps: int) -> dict[str, tuple]:
  """Returns by name: a function, shapes of its arguments, and which arguments are donated."""
  shapes, options = functools.partial(jax.eval_shape, key=jax.random.key(0)), dict(dtype=dtype)
  # Only the networks for ImageNet and their generator support recomputation.
  networks = options | (dict(remat=remat) if 'imagenet' in pair else {})
  teacher, student = (
      shapes(lambda key, name=name: models.create_network(
          models.create(name, CLASSES, **networks), key, SHAPE))
      for name in pair.split('-'))
  generator = models.SpatialGenerator(remat=remat, **options)
  synthesizer = synth.create(
      'fast_dfkd', generator=generator, image_shape=SHAPE, task=tasks.classification(CLASSES),
      factors=synth.Factors(one_hot=0.1, batch_norm=0.1, adversarial=0.1), meta='reptile',
      carry_latents=True, keep='last', num_steps=num_steps,
      latent_dim=generator.latent_shape(SHAPE, LATENT), batch_size=batch_size,
      sample_batch_size=batch_size, capacity=2 * batch_size, task_map='vmap',
      augment=augment.resized_crop_and_flip, adversarial_after=0)
  state = jax.eval_shape(synthesizer.init, jax.random.key(0), teacher)
  tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
  learner = jax.eval_shape(functools.partial(distill.init, tx=tx), student)
  steps = functools.partial(
      distill.distill, synthesizer=synthesizer, tx=tx, num_steps=num_steps,
      augment=augment.resized_crop_and_flip)
  key = shapes(lambda key: key)
  return {
      'synthesis': (
          lambda *inputs: synthesizer.synthesize(*inputs), (state, key, teacher, student), (0,)),
      'student': (lambda *inputs: steps(*inputs), (learner, state, key, teacher), (0, 1))}


def compile_program(
    function, shapes: PyTree, donated: tuple[int, ...], sharding: jax.sharding.Sharding,
    stock: bool
):
  """Compiles a function for a device, with JAX's stock convolutions or with the library's."""
  patch = mock.patch.object(jax, 'default_backend', return_value='tpu')
  with patch if stock else contextlib.nullcontext():
    jitted = jax.jit(
        function, in_shardings=sharding, out_shardings=sharding, donate_argnums=donated)
    return jitted.lower(*shapes).compile()


def row(program, batch_size: int) -> list[str]:
  """Formats sizes in GB, and GFLOP an image."""
  sizes, costs = program.memory_analysis(), program.cost_analysis() or {}
  costs = costs[0] if isinstance(costs, list) else costs
  held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  numbers = (sizes.argument_size_in_bytes, sizes.output_size_in_bytes, sizes.temp_size_in_bytes,
             held + sizes.temp_size_in_bytes)
  flops = costs.get('flops', float('nan')) / batch_size
  return [*(f'{number / 1e9:.2f}' for number in numbers), f'{flops / 1e9:.1f}']


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pair', default='resnet50_imagenet-resnet18_imagenet')
  parser.add_argument('--batch_size', type=int, nargs='+', default=[100, 400])
  parser.add_argument('--dtype', nargs='+', default=['float32', 'bfloat16'])
  parser.add_argument('--remat', type=int, nargs='+', default=[0, 1])
  parser.add_argument('--num_steps', type=int, default=5)
  parser.add_argument('--platform', choices=('tpu', 'cpu', 'stock'), default='cpu')
  parser.add_argument('--topology', default='v5p:2x2x1', help='TPUs; compiles for the first')
  options = parser.parse_args()
  sharding = place(options.platform, options.topology)
  print(f'{options.pair}, {options.platform}, GB:\n\n'
        f'| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}')
  settings = itertools.product(options.batch_size, options.dtype, options.remat)
  for batch_size, dtype, remat in settings:
    functions = programs(
        options.pair, batch_size, jnp.dtype(dtype), bool(remat), options.num_steps)
    for name, (function, shapes, donated) in functions.items():
      try:
        program = compile_program(function, shapes, donated, sharding, options.platform != 'cpu')
        cells = row(program, batch_size)
      except jax.errors.JaxRuntimeError as error:  # Out of memory.
        cells = [str(error).splitlines()[0]]
      cells = [name, str(batch_size), dtype, 'yes' if remat else 'no', *cells]
      print('|', ' | '.join(cells), '|', flush=True)


if __name__ == '__main__':
  main()
