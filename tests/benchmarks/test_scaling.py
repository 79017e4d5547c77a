"""What devices say to each other: counted as compiled, and no more than batch norms need."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs
import toys
from flax import linen as nn
from jax import lax

from dfkd_jax import models, parallel
from dfkd_jax.models import layers

spec = importlib.util.spec_from_file_location(
    'benchmark_of_scaling', toy_runs.ROOT / 'benchmarks' / 'scaling.py')
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)
ONE, SPREAD = parallel.REPLICATED, parallel.SPREAD


def text_of(function, *inputs, results=SPREAD):
  """The compiled program of four devices."""
  program = parallel.each_device(function, parallel.make_mesh(4), (SPREAD,) * len(inputs), results)
  return toys.jit(program).lower(*inputs).compile().as_text()


def test_a_loop_counts_as_often_as_it_turns():
  def function(x, y, *, axis):
    step = lambda carry, _: (jnp.sin(lax.psum(carry, axis)), None)
    x, _ = lax.scan(step, x, length=5)
    nested = lambda carry, _: (lax.scan(step, carry, length=3)[0] + 1, None)
    y, _ = lax.scan(nested, y, length=2)
    return x.sum() + lax.all_gather(y, axis).sum()

  found = scaling.traffic(text_of(function, jnp.zeros((4, 7)), jnp.zeros((8, 3)), results=ONE))
  assert found['all-reduce'] == (5 + 6, 5 * 7 * 4 + 6 * 2 * 3 * 4, 5 + 6)
  assert found['all-gather'].count == 1
  assert found['all-gather'].num_bytes == 8 * 3 * 4


def test_what_does_not_wait_for_another_goes_with_it():
  text = """HloModule toy
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[6], y: bf16[5,2]) -> f32[6] {
  %x = f32[6]{0} parameter(0)
  %y = bf16[5,2]{1,0} parameter(1)
  %first = f32[6]{0} all-reduce(%x), channel_id=1, to_apply=%sum
  %beside = bf16[5,2]{1,0} all-reduce(%y), channel_id=2, to_apply=%sum
  %twice = f32[6]{0} multiply(%first, %first)
  ROOT %second = f32[6]{0} all-reduce(%twice), channel_id=3, to_apply=%sum
}
"""
  assert scaling.traffic(text) == {'all-reduce': (3, 24 + 20 + 24, 2)}


def test_seconds_are_latencies_and_a_ring():
  link = scaling.Link(flops=1.0, inner=100.0, outer=10.0, group=4, latencies=(0.5, 2.0))
  found = {'one': {'all-reduce': scaling.Traffic(3, 80, 2)},
           'other': {'all-reduce': scaling.Traffic(1, 20, 1)}}
  assert scaling.seconds_of(found, link, 4) == pytest.approx((1.5, 2 * 3 / 4 * 100 / 100))
  assert scaling.seconds_of(found, link, 8) == pytest.approx((6.0, 2 * 7 / 8 * 100 / 10))


class Normalised(nn.Module):
  """Two batch norms, one after the other."""

  @nn.compact
  def __call__(self, x, train=False):
    for _ in range(2):
      x = nn.relu(layers.BatchNorm(use_running_average=not train)(nn.Conv(5, (1, 1))(x)))
    return x.mean((1, 2))


def test_batch_norms_wait_once_each_way():
  network = models.create_network(Normalised(), jax.random.key(0), (3, 2, 4))

  def step(images, *, axis):
    def loss(params):
      outputs, moved = network.replace(params=params).forward(images, train=True, axis=axis)
      return jnp.square(outputs.logits).sum(), moved

    grads, moved = jax.grad(loss, has_aux=True)(network.params)
    return parallel.pmean(grads, axis), moved

  found = scaling.traffic(text_of(step, jnp.ones((8, 3, 2, 4)), results=ONE))
  assert found.keys() == {'all-reduce'}
  assert found['all-reduce'].in_turn == 2 + 2 + 1  # Forwards, backwards, gradients.


@pytest.mark.parametrize('settled', [False, True])
def test_a_batch_norm_over_devices_is_one_over_the_batch(settled):
  """Values, gradients and running moments agree.

  With running moments that fit, they agree also for inputs far from 0.
  """
  draw = np.random.default_rng(0)
  centre = 300.0 if settled else 2.0
  images = jnp.asarray(centre + draw.normal(size=(8, 3, 2, 4)), jnp.float32)
  module = layers.BatchNorm(use_running_average=False)
  variables = module.init(jax.random.key(0), images)
  if settled:
    variables['batch_stats']['mean'] = jnp.full(4, 299.5)

  def run(images, *, axis):
    def loss(images):
      with layers.capture_moments(axis):
        found, moved = module.apply(variables, images, mutable=['batch_stats'])
      return (found ** 3).sum(), (found, moved['batch_stats'])

    gradient, (found, moved) = jax.grad(loss, has_aux=True)(images)
    return gradient, found, moved

  results = [
      parallel.each_device(
          run, parallel.make_mesh(size), (SPREAD,), (SPREAD, SPREAD, ONE))(images)
      for size in (4, 1)]
  (gradient, found, moved), (other_gradient, wanted, other_moved) = jax.device_get(results)
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  assert np.abs(other_gradient).max() > 0.5
  np.testing.assert_allclose(gradient, other_gradient, atol=1e-3)
  np.testing.assert_allclose(moved['mean'], other_moved['mean'], rtol=1e-6)
  np.testing.assert_allclose(moved['var'], other_moved['var'], rtol=1e-5)
  exact = np.asarray(images, np.float64).reshape(-1, 4)
  np.testing.assert_allclose(
      moved['mean'], 0.9 * variables['batch_stats']['mean'] + 0.1 * exact.mean(0), rtol=1e-6)
  np.testing.assert_allclose(moved['var'], 0.9 + 0.1 * exact.var(0), rtol=1e-5)


@pytest.mark.parametrize('name', ['configs/cifar10.py:fast_dfkd', 'configs/imagenet.py:small'])
def test_operations_of_a_round_are_more_than_those_of_the_student(name):
  """Of generators of either kind; the published numbers of steps and images."""
  config = scaling.cli.load(name)
  section = config.distill
  student_alone = section.steps_per_round * section.batch_size * 3e8
  assert scaling.flops_of_round(config) > student_alone


def test_operations_of_a_round_at_imagenets_scale():
  """Without synthesis, the networks' published 4.1 and 1.8 GMAC; with it, the README's numbers."""
  config = scaling.cli.load('configs/imagenet.py')
  assert scaling.flops_of_round(config) == pytest.approx(3.355e15, rel=0.005)
  student = config.distill.steps_per_round * config.distill.batch_size * 2 * (4.1e9 + 3 * 1.8e9)
  config.method.num_steps = 0
  assert scaling.flops_of_round(config) == pytest.approx(student, rel=0.05)


def test_a_round_runs_a_program_once_a_call():
  config = scaling.cli.load('configs/imagenet.py')
  found = scaling.of_round({'all-reduce': scaling.Traffic(3, 80, 2)}, config)
  assert config.distill.calls_per_round == 10
  assert found == {'all-reduce': scaling.Traffic(30, 800, 20)}
