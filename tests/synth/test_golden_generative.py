"""DAFL, ZSKT, DFQ and DFAD against the published code's own numbers, in float64.

One difference is on purpose: PyTorch's running variance is of unbiased variances,
ours of biased ones, by which batches are normalised.
"""

import functools

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from conftest import golden
from golden_networks import below, cast, torch_layout

from dfkd_jax import models, synth, tasks, weights
from dfkd_jax.synth import generators
from dfkd_jax.synth.objective import Adversary

METHODS = ('zskt', 'dfad', 'dfq', 'dafl')
TERMS = {'loss': 'total', 'batch_norm': 'bn', 'one_hot': 'oh', 'adversarial': 'adv(-criterion)',
         'balance': 'balance', 'activation': 'act'}
GENERATOR = models.Generator(image_shape=(32, 32, 3), width=4)


def method(name, generator, latents, num_classes=10, **changes):
  """With its own factors and adversary."""
  return synth.create(name, **{
      'generator': generator, 'image_shape': generator.image_shape,
      'task': tasks.classification(num_classes), 'latent_dim': latents.shape[-1],
      'batch_size': len(latents), 'sample_batch_size': len(latents),
      'sample_latents': lambda *_: latents, 'sample_by': 'batch', **changes})


def default(name, argument):
  return synth.defaults(name)[argument]


@functools.cache
def program(divergence):
  """Compile one call for all methods with this adversary.

  Their factors are inputs, so the call computes every term.
  """
  adversary = default('dfad' if divergence == 'l1' else 'dfq', 'adversary')
  assert adversary == Adversary(divergence, 1.0, masked=False)

  def call(state, latents, factors, teacher, student):
    made = method('dfq', GENERATOR, latents, factors=synth.Factors(**factors), adversary=adversary)
    return made.synthesize(state, jax.random.key(0), teacher, student)

  return jax.jit(call)


def unbiased(running, size, batches, start=1.0):
  """PyTorch's running variance [C] after some batches, of ours; `size` is B h w of each batch."""
  left = 0.9**batches * start
  return left + size / (size - 1) * (running - left)


@functools.cache
def runs(name):
  """The states after no, one and two calls, and the metrics of each call."""
  archive, start = golden('generative'), below(golden('fast_g0'), 'g0/')
  teacher, student = (
      cast(golden_networks.wide_resnet(f'{which}_wrn16_1')) for which in ('teacher', 'student'))
  latents, synthesize = cast(archive['z']), program('l1' if name == 'dfad' else 'kl')
  factors = {term: jnp.asarray(getattr(default(name, 'factors'), term), float)
             for term in TERMS if term != 'loss'}
  state = toys.jit(method(name, GENERATOR, latents[0]).init)(jax.random.key(0), teacher)
  variables = cast(weights.to_variables(start, GENERATOR, (16,)))
  states, metrics = [
      state.replace(params=variables['params'], batch_stats=variables['batch_stats'])], []
  for index in range(2):
    state, found = synthesize(states[-1], latents[index], factors, teacher, student)
    states.append(state)
    metrics.append(found)
  assert synthesize._cache_size() == 1
  return states, metrics


@pytest.mark.parametrize('name', METHODS)
def test_losses(name, x64):
  archive, (_, metrics) = golden('generative'), runs(name)
  columns = list(archive['loss_columns'])
  for found, row in zip(metrics, archive[f'{name}/loss_f64'], strict=True):
    assert set(found) == set(TERMS)
    for term, value in found.items():
      if (name, term) == ('dafl', 'adversarial'):
        continue  # There it is not computed.
      np.testing.assert_allclose(value, [row[columns.index(TERMS[term])]], rtol=1e-9, err_msg=term)


@pytest.mark.parametrize('name', METHODS)
def test_gradients_of_the_second_step(name, x64):
  """From Adam's first moments: mu_2 = (mu_1 + g_2) / 2."""
  reference, (states, _) = below(golden('generative'), f'{name}/grad_it1_f64/'), runs(name)
  first, second = (optax.tree_utils.tree_get(state.opt_state, 'mu') for state in states[1:])
  found = torch_layout(jax.tree.map(lambda old, new: 2 * new - old, first, second))
  assert set(found) == set(reference)
  for key, value in reference.items():  # Stored as float32.
    np.testing.assert_allclose(
        found[key], value, rtol=1e-6, atol=1e-6 * np.abs(value).max(), err_msg=key)


@pytest.mark.parametrize('name', METHODS)
def test_images_and_samples(name, x64):
  archive, (states, _) = golden('generative'), runs(name)
  images = generators.render(GENERATOR, states[1].params, cast(archive['z'][1]))
  # Stored as float32.
  np.testing.assert_allclose(
      images.transpose(0, 3, 1, 2), archive[f'{name}/synthetic_f64'], rtol=1e-6)
  sampled = method(name, GENERATOR, cast(archive['z_sample'])).sample(
      states[2], jax.random.key(0)).images
  normalised = (sampled - np.array(golden_networks.MEAN)) / np.array(golden_networks.STD)
  np.testing.assert_allclose(
      normalised.transpose(0, 3, 1, 2), archive[f'{name}/sample_f64'], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', METHODS)
def test_the_generator_after(name, x64):
  archive, (states, _) = golden('generative'), runs(name)
  reference = below(archive, f'{name}/gen_after_f64/')
  for key, found in torch_layout(states[2].params).items():
    np.testing.assert_allclose(found, reference[key], rtol=1e-9, atol=1e-11, err_msg=key)
  # There the running moments moved once more, in sampling.
  variables = {'params': states[2].params, 'batch_stats': states[2].batch_stats}
  _, moved = GENERATOR.apply(
      variables, cast(archive['z_sample']), train=True, mutable=['batch_stats'])
  for layer, size in (
      ('conv_blocks_0', 8 * 8 * 8), ('conv_blocks_3', 8 * 16 * 16), ('conv_blocks_7', 8 * 32 * 32)):
    stats, key = moved['batch_stats'][layer], layer.replace('blocks_', 'blocks.')
    np.testing.assert_allclose(
        stats['mean'], reference[f'{key}.running_mean'], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(
        unbiased(stats['var'], size, 3), reference[f'{key}.running_var'], rtol=1e-9, err_msg=key)


@pytest.mark.parametrize('name', METHODS)
def test_the_run_whose_weights_are_a_formula(name, x64):
  reference = golden_networks.formula_reference()[name]
  teacher, student = (
      golden_networks.formula_network((6, 8), 0), golden_networks.formula_network((4, 5), 6))
  generator = models.Generator(image_shape=(8, 8, 3), width=2)
  start = golden_networks.filled(generator, (4,), golden_networks.BLOCKS, 3)
  latents = [jnp.asarray(golden_networks.sequence((6, 4), 49 + index, 1.0)) for index in (1, 2)]
  state = toys.jit(method(name, generator, latents[0], 4).init)(
      jax.random.key(0), teacher).replace(**start)
  synthesize = toys.jit(lambda state, z: method(name, generator, z, 4).synthesize(
      state, jax.random.key(0), teacher, student))
  for of_call, total in zip(latents, reference['total'], strict=True):
    state, metrics = synthesize(state, of_call)
    np.testing.assert_allclose(metrics['loss'], [total], rtol=1e-9)
  golden_networks.check_formula(state.params, reference['gen'])
  stats, var = state.batch_stats['conv_blocks_0'], start['batch_stats']['conv_blocks_0']['var']
  np.testing.assert_allclose(stats['mean'], reference['bn_running_mean0'], rtol=1e-9)
  np.testing.assert_allclose(
      unbiased(stats['var'], 6 * 2 * 2, 2, var), reference['bn_running_var0'], rtol=1e-9)
