"""FastDFKD against the published code's own numbers: losses, generators, moments, images kept.

In float64 over whole trajectories; in float32 one step at a time, since Adam's
first step turns rounding into steps of the other sign.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import golden
from golden_networks import (
  BLOCKS,
  below,
  cast,
  check_formula,
  check_images,
  filled,
  formula_network,
  formula_reference,
  labels_of,
  parameters,
  program,
  sequence,
  torch_layout,
  wide_resnet,
)

from dfkd_jax import augment, models, synth

NUMBERS = dict(
    num_steps=3, generator_lr=3e-3, latent_lr=1e-2, batch_size=8, sample_batch_size=8, capacity=24,
    image_shape=(32, 32, 3), augment=augment.identity)
SCENARIOS = {  # Of fast_scenarios.json; their warm-up counts calls from one.
    'maml_noadv': dict(
        meta='fomaml', factors=(0.5, 10.0, 0.0), moments_momentum=0.0, adversarial_after=19),
    'maml_adv': dict(
        meta='fomaml', factors=(0.4, 10.0, 1.1), moments_momentum=0.9, adversarial_after=1),
    'reptile_adv': dict(
        meta='reptile', factors=(0.4, 1.0, 1.1), moments_momentum=0.9, adversarial_after=0),
    'seq_adv': dict(
        meta='sequential', factors=(0.4, 10.0, 1.1), moments_momentum=0.9, adversarial_after=1)}
TERMS = {'loss': 'total', 'batch_norm': 'bn', 'one_hot': 'oh', 'adversarial': 'adv'}


def check_past(past, means, variances):
  paths = sorted(past)
  np.testing.assert_allclose(
      np.concatenate([past[path].mean for path in paths]), means, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(
      np.concatenate([past[path].var for path in paths]), variances, rtol=1e-9, atol=1e-12)


def check_losses(metrics, archive, call, factors, adversarial_after):
  assert set(metrics) == {'loss', *(name for name, factor in factors.items() if factor)}
  for name in metrics:
    # Until it sets in, the term is shown but counts nothing: the total says so.
    if name != 'adversarial' or call > adversarial_after:
      short = TERMS[name]
      np.testing.assert_allclose(
          metrics[name], archive[f'call{call}/loss_{short}_f64'], rtol=1e-9, atol=1e-12)


def check_parameters(params, archive, call):
  """Every parameter of the generator after the meta step."""
  reference = below(archive, f'call{call}/gen_after_f64/')
  for key, found in torch_layout(params).items():
    np.testing.assert_allclose(
        found, reference[key], rtol=1e-9, atol=1e-11, err_msg=f'{key} after call {call}')


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name == 'maml_adv' else pytest.mark.exhaustive)
    for name in SCENARIOS])
def test_whole_trajectories(name, x64):
  archive, start = golden(f'fast_{name}'), below(golden('fast_g0'), 'g0/')
  teacher, student = cast(wide_resnet('teacher_wrn16_1')), cast(wide_resnet('student_wrn16_1'))
  generator = models.Generator(image_shape=(32, 32, 3), width=4)
  scenario = dict(SCENARIOS[name])
  factors = dict(zip(
      ('one_hot', 'batch_norm', 'adversarial'), scenario.pop('factors'), strict=True))
  make = lambda latents, targets: synth.create(
      'fast_dfkd', generator=generator, latent_dim=16, task=labels_of(targets),
      factors=synth.Factors(**factors), sample_latents=lambda *_: latents, **scenario, **NUMBERS)
  state = make(None, None).init(jax.random.key(0), teacher).replace(
      meta_params=parameters(start, generator, (16,), start))
  synthesize = program(make)

  for call in (1, 2, 3):
    latents, targets = cast(archive[f'call{call}/z']), archive[f'call{call}/targets']
    state, metrics = synthesize(state, latents, targets, teacher, student)
    check_losses(metrics, archive, call, factors, scenario['adversarial_after'])
    check_parameters(state.meta_params, archive, call)
    if scenario['moments_momentum']:
      check_past(state.past, archive[f'call{call}/mmt_mean_f64'],
                 archive[f'call{call}/mmt_var_f64'])
    slots = slice(8 * (call - 1), 8 * call)
    check_images(np.asarray(state.buffer.images[0, slots]), archive[f'call{call}/best_inputs_f64'])
  assert int(state.step) == 3
  assert synthesize._cache_size() == 1


def test_whole_trajectory_of_the_imagenet_variant(x64):
  archive = golden('fast_imagenet_reptile')
  # The variant never uses layer l1.
  start = {key: value for key, value in below(archive, 'g0/').items() if not key.startswith('l1.')}
  teacher, student = cast(wide_resnet('teacher_wrn16_1')), cast(wide_resnet('student_wrn16_1'))
  generator = models.SpatialGenerator(widths=(8, 8, 4, 4, 4))
  numbers = {**NUMBERS, 'generator_lr': 2e-4}
  make = lambda _, targets: synth.create(
      'fast_dfkd', generator=generator, latent_dim=(2, 2, 16), task=labels_of(targets),
      factors=synth.Factors(one_hot=0.1, batch_norm=0.1, adversarial=0.1), meta='reptile',
      reptile_scale=1.0, meta_lr=1e-4, carry_latents=True, keep='last', adversarial_after=0,
      **numbers)
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
    check_images(np.asarray(state.buffer.images[0, 8 * (call - 1):8 * call]),
                 archive[f'call{call}/inputs_last_f64'])


def test_losses_and_gradients_step_by_step_in_float32():
  """Each of the 36 inner steps from the published weights; one program, as factors are traced."""
  start = below(golden('fast_g0'), 'g0/')
  teacher, student = wide_resnet('teacher_wrn16_1'), wide_resnet('student_wrn16_1')
  generator = models.Generator(image_shape=(32, 32, 3), width=4)

  @jax.jit
  def step(state, latents, targets, factors):
    method = synth.create(
        'fast_dfkd', generator=generator, latent_dim=16, task=labels_of(targets),
        factors=synth.Factors(*factors), sample_latents=lambda *_: latents, adversarial_after=0,
        **{**NUMBERS, 'num_steps': 1})
    state, metrics = method.synthesize(state, jax.random.key(0), teacher, student)
    # Adam's first moment after one update of a fresh state is (1 - b1) times the meta-gradient.
    return metrics['loss'][0], jax.tree.map(
        lambda mu: mu / 0.5, optax.tree_utils.tree_get(state.meta_opt_state, 'mu'))

  fresh = synth.create(
      'fast_dfkd', generator=generator, latent_dim=16, task=labels_of(np.zeros(8)),
      factors=synth.Factors(one_hot=1.0), **NUMBERS).init(jax.random.key(0), teacher)
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
            meta_params=parameters(
                parameters_before(archive, call, index, start), generator, (16,), start))
        loss, grads = step(
            state, archive[f'{at}/z'], archive[f'call{call}/targets'],
            tuple(np.float32(f) for f in factors))
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
  parts = (np.split(archive[f'call{call - 1}/mmt_{moment}_f64'].astype(np.float32), ends)
           for moment in ('mean', 'var'))
  for path, mean, var in zip(paths, *parts, strict=True):
    past[path] = like[path]._replace(mean=jnp.asarray(mean), var=jnp.asarray(var))
  return past


@pytest.mark.parametrize('meta', ['fomaml', 'reptile', 'sequential'])
def test_the_run_whose_weights_are_a_formula(meta, x64):
  calls = formula_reference()[meta]
  teacher, student = formula_network((6, 8), 0), formula_network((4, 5), 6)
  generator = models.Generator(image_shape=(8, 8, 3), width=2)
  numbers = {**NUMBERS, 'generator_lr': 2e-3, 'batch_size': 6, 'image_shape': (8, 8, 3)}
  make = lambda latents, targets: synth.create(
      'fast_dfkd', generator=generator, latent_dim=4,
      task=labels_of(targets)._replace(num_classes=4), meta=meta,
      factors=synth.Factors(one_hot=0.5, batch_norm=10.0, adversarial=1.3), moments_momentum=0.9,
      adversarial_after=0, sample_latents=lambda *_: latents, **numbers)
  params = filled(generator, (4,), BLOCKS, 3)['params']
  state = make(None, None).init(jax.random.key(0), teacher).replace(meta_params=params)
  synthesize = program(make)

  for index, reference in enumerate(calls):
    before = state.meta_params
    latents = jnp.asarray(sequence((6, 4), 50 + index, 1.0))
    state, metrics = synthesize(state, latents, np.array([0, 0, 1, 1, 2, 3]), teacher, student)
    for term, short in TERMS.items():
      np.testing.assert_allclose(
          metrics[term], [step[short] for step in reference['iters']], rtol=1e-9)
    check_formula(state.meta_params, reference['gen'], f'after call {index + 1}')
    check_past(state.past, *(
        np.concatenate([layer[of] for layer in reference['mmt']]) for of in ('mean', 'var')))
    kept = np.asarray(state.buffer.images[0, 6 * index])
    np.testing.assert_array_equal(kept[0, 0], np.floor(255 * np.array(reference['image0_pixels'])))
    if index == 0 and meta != 'sequential':  # The first step of Adam, whatever the gradient's size.
      moved = jax.tree.map(lambda new, old: np.abs(new - old), state.meta_params, before)
      np.testing.assert_allclose(
          np.concatenate([m.ravel() for m in jax.tree.leaves(moved)]), 6e-3, rtol=1e-3)
