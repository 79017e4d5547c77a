"""FastDFKD against the published code's own numbers: losses, generators, moments, images kept.

In float64 over whole trajectories; in float32 one step at a time, since Adam's
first step turns rounding into steps of the other sign.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import HERE, SHARED, golden
from flax import linen as nn
from flax import traverse_util

from dfkd_jax import augment, models, synth, tasks
from dfkd_jax.models import pretrained

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
NUMBERS = dict(
    num_steps=3, generator_lr=3e-3, latent_lr=1e-2, batch_size=8, sample_batch_size=8, capacity=24,
    image_shape=(32, 32, 3), augment=augment.identity)
SCENARIOS = {  # Of fast_scenarios.json; their warm-up counts calls from one.
    'maml_noadv': dict(meta='fomaml', factors=(0.5, 10.0, 0.0), moments_momentum=0.0, adversarial_after=19),
    'maml_adv': dict(meta='fomaml', factors=(0.4, 10.0, 1.1), moments_momentum=0.9, adversarial_after=1),
    'reptile_adv': dict(meta='reptile', factors=(0.4, 1.0, 1.1), moments_momentum=0.9, adversarial_after=0),
    'seq_adv': dict(meta='sequential', factors=(0.4, 10.0, 1.1), moments_momentum=0.9, adversarial_after=1)}
TERMS = {'loss': 'total', 'batch_norm': 'bn', 'one_hot': 'oh', 'adversarial': 'adv'}


def cast(tree):
  """The default float type: under `x64` Linen still gives float32."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), tree)


@functools.cache
def wide_resnet(name):
  module = models.create('wrn16_1', 10)
  return models.bind(module, pretrained.to_variables(golden(name), module, (32, 32, 3)), mean=MEAN, std=STD)


def below(archive, prefix):
  return {key.removeprefix(prefix): value for key, value in archive.items() if key.startswith(prefix)}


def parameters(arrays, generator, latent_shape, start):
  """Of a generator, from arrays in PyTorch's layout; its running moments, which nothing reads, from `start`."""
  running = {key: value for key, value in start.items() if '.running_' in key}
  return cast(pretrained.to_variables({**running, **arrays}, generator, latent_shape)['params'])


def torch_layout(params):
  return pretrained.from_variables({'params': params})


def labels_of(targets):
  return tasks.classification(10)._replace(sample_labels=lambda *_: jnp.asarray(targets, jnp.int32))


def program(make):
  """One compiled call, (state, latents, targets, teacher, student) -> (state, metrics), of which z and y are inputs."""

  def call(state, latents, targets, teacher, student):
    return make(latents, targets).synthesize(state, jax.random.key(0), teacher, student)

  return jax.jit(call)


def check_images(kept, reference):
  """What the buffer holds is floor(255 x), as the published folder of PNGs; x is stored as float32."""
  scaled = 255 * np.asarray(reference, np.float64).transpose(0, 2, 3, 1)
  # Rounding of the stored x, 6e-8, may cross an integer.
  tolerance = np.abs(scaled - np.round(scaled)) < 1e-4
  assert np.abs(kept.astype(int) - np.floor(scaled).astype(int))[~tolerance].max() == 0
  assert np.abs(kept.astype(int) - np.floor(scaled).astype(int)).max() <= 1


def check_past(past, means, variances):
  paths = sorted(past)
  np.testing.assert_allclose(np.concatenate([past[path].mean for path in paths]), means, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(np.concatenate([past[path].var for path in paths]), variances, rtol=1e-9, atol=1e-12)


def check_losses(metrics, archive, call, factors, adversarial_after):
  assert set(metrics) == {'loss', *(name for name, factor in factors.items() if factor)}
  for name in metrics:
    # Until it sets in, the term is shown but counts nothing: the total says so.
    if name != 'adversarial' or call > adversarial_after:
      short = TERMS[name]
      np.testing.assert_allclose(metrics[name], archive[f'call{call}/loss_{short}_f64'], rtol=1e-9, atol=1e-12)


def check_parameters(params, archive, call):
  """Every parameter of the generator after the meta step."""
  reference = below(archive, f'call{call}/gen_after_f64/')
  for key, found in torch_layout(params).items():
    np.testing.assert_allclose(found, reference[key], rtol=1e-9, atol=1e-11, err_msg=f'{key} after call {call}')


@pytest.mark.parametrize('name', SCENARIOS)
def test_whole_trajectories(name, x64):
  archive, start = golden(f'fast_{name}'), below(golden('fast_g0'), 'g0/')
  teacher, student = cast(wide_resnet('teacher_wrn16_1')), cast(wide_resnet('student_wrn16_1'))
  generator = models.Generator(image_shape=(32, 32, 3), width=4)
  scenario = dict(SCENARIOS[name])
  factors = dict(zip(('one_hot', 'batch_norm', 'adversarial'), scenario.pop('factors'), strict=True))
  make = lambda latents, targets: synth.create(
      'fast_dfkd', generator=generator, latent_dim=16, task=labels_of(targets), factors=synth.Factors(**factors),
      sample_latents=lambda *_: latents, **scenario, **NUMBERS)
  state = make(None, None).init(jax.random.key(0), teacher).replace(
      meta_params=parameters(start, generator, (16,), start))
  synthesize = program(make)

  for call in (1, 2, 3):
    latents, targets = cast(archive[f'call{call}/z']), archive[f'call{call}/targets']
    state, metrics = synthesize(state, latents, targets, teacher, student)
    check_losses(metrics, archive, call, factors, scenario['adversarial_after'])
    check_parameters(state.meta_params, archive, call)
    if scenario['moments_momentum']:
      check_past(state.past, archive[f'call{call}/mmt_mean_f64'], archive[f'call{call}/mmt_var_f64'])
    slots = slice(8 * (call - 1), 8 * call)
    check_images(np.asarray(state.buffer.images[0, slots]), archive[f'call{call}/best_inputs_f64'])
  assert int(state.step) == 3
  assert synthesize._cache_size() == 1


def test_whole_trajectory_of_the_imagenet_variant(x64):
  archive = golden('fast_imagenet_reptile')
  start = {key: value for key, value in below(archive, 'g0/').items() if not key.startswith('l1.')}  # Never used there.
  teacher, student = cast(wide_resnet('teacher_wrn16_1')), cast(wide_resnet('student_wrn16_1'))
  generator = models.SpatialGenerator(widths=(8, 8, 4, 4, 4))
  numbers = {**NUMBERS, 'generator_lr': 2e-4}
  make = lambda _, targets: synth.create(
      'fast_dfkd', generator=generator, latent_dim=(2, 2, 16), task=labels_of(targets),
      factors=synth.Factors(one_hot=0.1, batch_norm=0.1, adversarial=0.1), meta='reptile', reptile_scale=1.0,
      meta_lr=1e-4, carry_latents=True, keep='last', adversarial_after=0, **numbers)
  latents = cast(archive['z0'].transpose(0, 2, 3, 1))[None]
  state = make(None, None).init(jax.random.key(0), teacher).replace(
      latents=latents, meta_params=parameters(start, generator, (2, 2, 16), start))
  synthesize = program(make)

  for call in (1, 2, 3):
    state, metrics = synthesize(state, None, archive['targets'][call - 1], teacher, student)
    for name, column in zip(TERMS, archive[f'call{call}/loss_f64'].T, strict=True):
      np.testing.assert_allclose(metrics[name], column, rtol=1e-9, atol=1e-12)
    expected = archive[f'call{call}/z_after_f64'].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(state.latents[0], expected, rtol=1e-9, atol=1e-11)
    check_parameters(state.meta_params, archive, call)
    check_images(np.asarray(state.buffer.images[0, 8 * (call - 1):8 * call]), archive[f'call{call}/inputs_last_f64'])


def test_losses_and_gradients_step_by_step_in_float32():
  """Each of the 36 inner steps from the published code's own weights; the factors are traced, so one program serves."""
  start = below(golden('fast_g0'), 'g0/')
  teacher, student = wide_resnet('teacher_wrn16_1'), wide_resnet('student_wrn16_1')
  generator = models.Generator(image_shape=(32, 32, 3), width=4)

  @jax.jit
  def step(state, latents, targets, factors):
    method = synth.create(
        'fast_dfkd', generator=generator, latent_dim=16, task=labels_of(targets), factors=synth.Factors(*factors),
        sample_latents=lambda *_: latents, adversarial_after=0, **{**NUMBERS, 'num_steps': 1})
    state, metrics = method.synthesize(state, jax.random.key(0), teacher, student)
    # Adam's first moment after one update of a fresh state is (1 - b1) times the meta-gradient.
    return metrics['loss'][0], jax.tree.map(lambda mu: mu / 0.5, optax.tree_utils.tree_get(state.meta_opt_state, 'mu'))

  fresh = synth.create(
      'fast_dfkd', generator=generator, latent_dim=16, task=labels_of(np.zeros(8)), factors=synth.Factors(one_hot=1.0),
      **NUMBERS).init(jax.random.key(0), teacher)
  distances = []
  for name, scenario in SCENARIOS.items():
    archive = golden(f'fast_{name}')
    for call in (1, 2, 3):
      past, momentum = past_before(archive, call, fresh.past), scenario['moments_momentum']
      one_hot, batch_norm, adversarial = scenario['factors']
      factors = (one_hot, batch_norm, adversarial * (call > scenario['adversarial_after']))
      for index in range(3):
        at = f'call{call}/it{index}'
        # Momentum sets in after the first call; step 0 turns it off.
        state = fresh.replace(
            step=jnp.int32(call - 1 if momentum else 0), past=past,
            meta_params=parameters(parameters_before(archive, call, index, start), generator, (16,), start))
        loss, grads = step(
            state, archive[f'{at}/z'], archive[f'call{call}/targets'], tuple(np.float32(f) for f in factors))
        np.testing.assert_allclose(loss, archive[f'call{call}/loss_total_f64'][index], rtol=5e-6)
        found = torch_layout(grads)
        for key, value in below(archive, f'{at}/grads/').items():
          distances.append(np.linalg.norm(found[key] - value) / np.linalg.norm(value))
  assert len(distances) > 400
  assert np.median(distances) < 1e-5
  assert np.quantile(distances, 0.95) < 3e-3
  assert max(distances) < 3e-2  # ReLU kinks.
  assert step._cache_size() == 1


def parameters_before(archive, call, index, start):
  """Of the copy at an inner step; at the first it is the generator as the last call left it."""
  if index:
    return below(archive, f'call{call}/it{index}/params/')
  return below(archive, f'call{call - 1}/gen_after_f64/') if call > 1 else start


def past_before(archive, call, like):
  """The moments that a call starts from, cut into layers."""
  if call == 1 or f'call{call - 1}/mmt_mean_f64' not in archive:
    return like
  paths, past = sorted(like), {}
  ends = np.cumsum([like[path].mean.size for path in paths])[:-1]
  parts = (np.split(archive[f'call{call - 1}/mmt_{moment}_f64'].astype(np.float32), ends) for moment in ('mean', 'var'))
  for path, mean, var in zip(paths, *parts, strict=True):
    past[path] = like[path]._replace(mean=jnp.asarray(mean), var=jnp.asarray(var))
  return past


class Plain(nn.Module):
  """A user's own network of stock layers; nothing of the library is in it."""

  widths: tuple[int, int]
  num_classes: int = 4

  @nn.compact
  def __call__(self, x, train: bool = False):
    for i, (width, strides) in enumerate(zip(self.widths, (1, 2), strict=True), 1):
      x = nn.Conv(width, (3, 3), strides, padding=1, use_bias=False, name=f'conv{i}')(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, epsilon=1e-5, name=f'bn{i}')(x))
    return nn.Dense(self.num_classes, name='fc')(x.mean((1, 2)))


def sequence(shape, index, scale, offset=0.0):
  j = np.arange(1, np.prod(shape) + 1)
  return (offset + scale * np.sin(0.37 * j + 0.71 * index)).reshape(shape)


def filled(module, shape, layers, base):
  """Variables by the closed formula, which counts in PyTorch's layout."""
  shapes = traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape))))
  order = [('params', layer, leaf) for layer in layers for leaf in ('kernel', 'scale', 'bias')]
  flat = {}
  for i, path in enumerate(path for path in order if path in shapes):
    shape = shapes[path].shape
    if path[-1] == 'kernel':
      values = sequence((shape[-1], shape[-2], *shape[:-2]), base + i, 0.5)
      flat[path] = np.moveaxis(values, (0, 1), (-1, -2))
    else:
      flat[path] = sequence(shape, base + i, *((0.1, 1.0) if path[-1] == 'scale' else (0.5,)))
  normed = [layer for layer in layers if ('batch_stats', layer, 'mean') in shapes]
  for r, layer in enumerate(normed):
    size = shapes['batch_stats', layer, 'mean'].shape
    flat['batch_stats', layer, 'mean'] = sequence(size, base + 20 + r, 0.2)
    flat['batch_stats', layer, 'var'] = sequence(size, base + 30 + r, 0.3, 1.0)
  assert set(flat) == set(shapes)
  return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat))


@pytest.mark.parametrize('meta', ['fomaml', 'reptile', 'sequential'])
def test_the_run_whose_weights_are_a_formula(meta, x64):
  name = 'golden/fastdfkd_float64.json'
  path = SHARED / name if (SHARED / name).exists() else HERE / name
  calls = json.loads(path.read_text())[meta]
  bind = lambda widths, base: models.bind(
      Plain(widths), filled(Plain(widths), (8, 8, 3), ('conv1', 'bn1', 'conv2', 'bn2', 'fc'), base),
      mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
  teacher, student = bind((6, 8), 0), bind((4, 5), 6)
  generator = models.Generator(image_shape=(8, 8, 3), width=2)
  blocks = ['l1_0'] + [f'conv_blocks_{i}' for i in (0, 2, 3, 6, 7, 9)]
  numbers = {**NUMBERS, 'generator_lr': 2e-3, 'batch_size': 6, 'image_shape': (8, 8, 3)}
  make = lambda latents, targets: synth.create(
      'fast_dfkd', generator=generator, latent_dim=4, task=labels_of(targets)._replace(num_classes=4), meta=meta,
      factors=synth.Factors(one_hot=0.5, batch_norm=10.0, adversarial=1.3), moments_momentum=0.9, adversarial_after=0,
      sample_latents=lambda *_: latents, **numbers)
  params = filled(generator, (4,), blocks, 3)['params']
  state = make(None, None).init(jax.random.key(0), teacher).replace(meta_params=params)
  synthesize = program(make)

  for index, reference in enumerate(calls):
    before = state.meta_params
    latents = jnp.asarray(sequence((6, 4), 50 + index, 1.0))
    state, metrics = synthesize(state, latents, np.array([0, 0, 1, 1, 2, 3]), teacher, student)
    for term, short in TERMS.items():
      np.testing.assert_allclose(metrics[term], [step[short] for step in reference['iters']], rtol=1e-9)
    found = torch_layout(state.meta_params)
    for key, numbers_of in reference['gen'].items():
      np.testing.assert_allclose(
          [found[key].sum(), np.linalg.norm(found[key]), found[key].ravel()[0]],
          [numbers_of[of] for of in ('sum', 'l2', 'first')], rtol=1e-9, err_msg=f'{key} after call {index + 1}')
    check_past(state.past, *(np.concatenate([layer[of] for layer in reference['mmt']]) for of in ('mean', 'var')))
    kept = np.asarray(state.buffer.images[0, 6 * index])
    np.testing.assert_array_equal(kept[0, 0], np.floor(255 * np.array(reference['image0_pixels'])))
    if index == 0 and meta != 'sequential':  # The first step of Adam, whatever the gradient's size.
      moved = jax.tree.map(lambda new, old: np.abs(new - old), state.meta_params, before)
      np.testing.assert_allclose(np.concatenate([m.ravel() for m in jax.tree.leaves(moved)]), 6e-3, rtol=1e-3)
