"""Maps [B, h, w, C] that a teacher keeps for the backward pass: as few as possible."""

import importlib.util
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import toy_runs

from dfkd_jax import models, synth, tasks
from dfkd_jax.models import cpu_convolution
from dfkd_jax.synth import objective

BATCH, IMAGE, CLASSES = 11, (32, 48, 3), 5


def kept(stage_sizes, remat, **factors):
  """Returns the shapes of maps kept between the passes, floats and booleans; computes nothing.

  Traces for accelerators: on CPU a convolution keeps its input, until the compiler removes it.
  """
  module = models.ImageNetResNet(CLASSES, stage_sizes, bottleneck=True, width=4, remat=remat)
  teacher = jax.eval_shape(lambda key: models.create_network(module, key, IMAGE), jax.random.key(0))
  factors, labels = synth.Factors(**factors), jnp.zeros(BATCH, jnp.int32)

  def between(images, teacher):
    def loss(images):
      outputs = teacher(images)
      terms = objective.terms(factors, outputs, images, labels, teacher=teacher,
                              reduce=tasks.classification(CLASSES).reduce)
      return objective.total(terms, factors)[0]
    return jax.vjp(loss, images)[1]

  with mock.patch.object(jax, 'default_backend', return_value='tpu'):
    images = jax.ShapeDtypeStruct((BATCH, *IMAGE), jnp.float32)
    leaves = jax.tree.leaves(jax.eval_shape(between, images, teacher))
  maps = [leaf for leaf in leaves if leaf.ndim == 4 and leaf.shape[0] == BATCH]
  assert len(teacher.running()) == 1 + 3 * sum(stage_sizes) + len(stage_sizes)
  return [[leaf.shape for leaf in maps if (leaf.dtype == bool) == boolean]
          for boolean in (False, True)]


@pytest.mark.parametrize('stage_sizes', [(2, 1), (3, 2)])
def test_the_moments_term_keeps_one_map_for_each_batch_norm(stage_sizes):
  """Any gradient also keeps the signs of each ReLU, zeros, which are free, and the pool's input.

  The moments do not depend on the last block's sum, its ReLU, and later layers.
  """
  blocks, stages = sum(stage_sizes), len(stage_sizes)
  norms, relus = 1 + 3 * blocks + stages, 1 + 3 * blocks
  maps, signs = kept(stage_sizes, remat=False, one_hot=1.0)
  assert (len(maps), len(signs)) == (relus + 1, relus)
  maps, signs = kept(stage_sizes, remat=False, batch_norm=1.0)
  assert (len(maps), len(signs)) == (relus - 1 + 1 + norms, relus - 1)


@pytest.mark.parametrize('stage_sizes', [(2, 1), (3, 2)])
def test_recomputation_keeps_the_inputs_of_blocks_alone(stage_sizes):
  """And maps of the stem: of its batch norm, ReLU and pool."""
  maps, signs = kept(stage_sizes, remat=True, one_hot=1.0, batch_norm=1.0)
  first, second = stage_sizes
  stem, inputs = [(BATCH, 16, 24, 4)] * 3, [(BATCH, 8, 12, 4)]
  inputs += [(BATCH, 8, 12, 16)] * first + [(BATCH, 4, 6, 32)] * (second - 1)
  assert sorted(maps) == sorted(stem + inputs)
  assert signs == [(BATCH, 16, 24, 4)]


def test_programs_may_be_traced_for_another_machine():
  """On CPU a convolution of few channels is a product of matrices, elsewhere a convolution."""

  def loss(maps, kernel):
    return jnp.square(cpu_convolution.conv_general_dilated(
        maps, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))).sum()

  def gradient():
    arguments = jnp.ones((2, 6, 7, 3)), jnp.ones((3, 3, 3, 5))
    new_function = lambda *inputs: loss(*inputs)  # So that JAX traces again.
    return jax.jit(jax.grad(new_function)).lower(*arguments).as_text()

  with mock.patch.object(jax, 'default_backend', return_value='gpu'):
    stock = gradient()
  with mock.patch.object(jax, 'default_backend', return_value='cpu'):
    ours = gradient()
  assert 'stablehlo.convolution' in stock
  assert 'stablehlo.convolution' not in ours


def test_the_program_does_not_depend_on_the_machine_that_traces_it():
  spec = importlib.util.spec_from_file_location(
      'benchmark_of_memory', toy_runs.ROOT / 'benchmarks' / 'memory.py')
  benchmark = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(benchmark)
  with mock.patch.object(benchmark.synth, 'create', wraps=synth.create) as create:
    benchmark.programs('resnet8-resnet8', 2, jnp.float32, False, 1)
  assert create.call_args.kwargs['task_map'] == 'vmap'
