"""Losses against reference values, values by hand, brute force, and at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from dfkd_jax.losses import divergence, inversion
from dfkd_jax.types import Moments

mean = lambda loss: lambda *args: jnp.mean(loss(*args))
GOLDEN = {  # Of logits s, t and labels y, as the reference reduces them.
    'kldiv_T1': mean(lambda s, t, y: divergence.kl(s, t)),
    'kldiv_T5': mean(lambda s, t, y: divergence.kl(s, t, 5.0)),
    'kldiv_T20': mean(lambda s, t, y: divergence.kl(s, t, 20.0)),
    'jsdiv_T1': mean(lambda s, t, y: divergence.js(s, t)),
    'jsdiv_T3': mean(lambda s, t, y: divergence.js(s, t, 3.0)),
    'l1_s_t': mean(lambda s, t, y: divergence.l1(s, t)),
    'cross_entropy_s_y': mean(lambda s, t, y: divergence.cross_entropy(s, y)),
    'onehot_t': mean(lambda s, t, y: inversion.one_hot(t, jnp.argmax(t, -1))),
    'class_balance_t': lambda s, t, y: inversion.balance(t),
    'decision_adv': mean(lambda s, t, y: inversion.adversarial(s, t)),
}
GOLDEN_OF_IMAGES = {'tv': mean(inversion.total_variation), 'l2': inversion.l2}
PRECISIONS = [pytest.param('f32', 5e-6, id='float32'), pytest.param('f64', 1e-9, id='float64')]


def seq(shape, i, s=0.5, o=0.0):
  """The closed formula by which the reference's anchor values fill arrays."""
  return o + s * np.sin(0.37 * np.arange(1, np.prod(shape) + 1) + 0.71 * i).reshape(shape)


def images(*args):
  return jnp.asarray(seq(*args).transpose(0, 2, 3, 1))


def assert_close(actual, expected, tolerance):
  """Relative to the largest entry, since gradients hold cancellations."""
  np.testing.assert_allclose(
      actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(('suffix', 'tolerance'), PRECISIONS)
@pytest.mark.parametrize('name', GOLDEN)
def test_matches_reference(name, suffix, tolerance):
  g = golden('losses')
  with jax.enable_x64(suffix == 'f64'):
    s, t = (jnp.asarray(g[k], float) for k in 'st')
    value, grads = jax.jit(jax.value_and_grad(GOLDEN[name], (0, 1)))(s, t, jnp.asarray(g['y']))
    assert_close(value, g[f'{name}/value_{suffix}'], tolerance)
    for grad, of in zip(grads, 'st', strict=True):
      assert_close(grad, g[f'{name}/grad_{of}_{suffix}'], tolerance)


@pytest.mark.parametrize(('suffix', 'tolerance'), PRECISIONS)
@pytest.mark.parametrize('name', GOLDEN_OF_IMAGES)
def test_image_priors_match_reference(name, suffix, tolerance):
  g = golden('losses')
  with jax.enable_x64(suffix == 'f64'):
    inputs = jnp.asarray(g['img'].transpose(0, 2, 3, 1), float)
    value, grad = jax.jit(jax.value_and_grad(GOLDEN_OF_IMAGES[name]))(inputs)
    assert_close(value, g[f'{name}/value_{suffix}'], tolerance)
    assert_close(grad.transpose(0, 3, 1, 2), g[f'{name}/grad_img_{suffix}'], tolerance)


def test_elementwise_reference_of_kl_and_of_the_mask(x64):
  g = golden('losses')
  s, t = jnp.asarray(g['s'], float), jnp.asarray(g['t'], float)
  np.testing.assert_allclose(divergence.kl(s, t), g['kldiv_none_T1/value_f64'].sum(-1), rtol=1e-9)
  np.testing.assert_array_equal(divergence.agreement(s, t), g['decision_adv/mask'] > 0)
  np.testing.assert_array_equal(inversion.adversarial(s, t) < 0, g['decision_adv/mask'] > 0)


ANCHORS = [  # Of a and b, [3, 5]; to nine digits.
    (mean(divergence.kl), 0.087702751),
    (lambda a, b: divergence.kl(a, b, 20.0).mean(), 0.113630260),
    (divergence.kl, [0.132321362, 0.114988192, 0.015798700]),
    (lambda a, b: divergence.js(a, b, 3.0).mean(), 0.003007634),
    (mean(divergence.l1), 0.888176908),
    (lambda a, b: divergence.cross_entropy(a, jnp.array([0, 3, 4])).mean(), 1.650920037),
    (lambda a, b: inversion.one_hot(a, a.argmax(-1)).mean(), 0.915514443),
    (lambda a, b: inversion.balance(a), -1.593076775),
    (lambda a, b: inversion.activation(a).mean(), -1.308984795),
]


def test_anchor_values(x64):
  a, b = seq((3, 5), 1, 2), seq((3, 5), 2, 2)
  values = jax.jit(lambda a, b: [loss(a, b) for loss, _ in ANCHORS])(a, b)
  for value, (_, expected) in zip(values, ANCHORS, strict=True):
    np.testing.assert_allclose(value, expected, atol=6e-10)
  total_variation = jax.jit(inversion.total_variation)(images((2, 3, 4, 4), 3, 1))
  np.testing.assert_allclose(total_variation.mean(), 2.913669787, atol=6e-10)


def test_anchor_values_of_batch_norm(x64):
  moments = lambda x: {'bn': Moments(x.mean((0, 1, 2)), x.var((0, 1, 2)))}
  running = {'bn': Moments(jnp.asarray(seq(3, 4, 0.2)), jnp.asarray(seq(3, 5, 0.3, 1)))}
  first, second = moments(images((2, 3, 4, 4), 6, 1)), moments(images((2, 3, 4, 4), 7, 1.5))
  np.testing.assert_allclose(inversion.batch_norm(first, running), 0.574225252, atol=6e-10)
  mixed = inversion.mix(second, first, 0.9)
  np.testing.assert_allclose(inversion.batch_norm(mixed, running), 0.480496948, atol=6e-10)


def test_batch_norm_with_history_matches_reference(x64):
  g, teacher = golden('bn_loss'), golden('teacher_wrn16_1')
  cuts = np.cumsum(g['bn_channels'])[:-1]
  split = lambda mean, var: {
      str(name): Moments(jnp.asarray(m), jnp.asarray(v))
      for name, m, v in zip(g['bn_names'], np.split(mean, cuts), np.split(var, cuts), strict=True)}
  by_layer, mix = jax.jit(inversion.batch_norm_by_layer), jax.jit(inversion.mix)
  running = {
      str(name): Moments(
          *(jnp.asarray(teacher[f'{name}.running_{part}'], float) for part in ('mean', 'var')))
      for name in g['bn_names']}
  past, past_flat = None, None
  for i in range(3):
    flat = np.stack([g[f'mmt0.9/state_{part}_f64'][i] for part in ('mean', 'var')])
    batch = split(*(flat if i == 0 else (flat - 0.9 * past_flat) / (1 - 0.9)))
    plain = by_layer(batch, running)
    np.testing.assert_allclose(
        [plain[str(n)] for n in g['bn_names']], g['mmt0/r_feature_f64'][i], rtol=1e-9)
    mixed = batch if past is None else mix(batch, past, 0.9)
    np.testing.assert_allclose(
        sum(by_layer(mixed, running).values()), g['mmt0.9/loss_bn_f64'][i], rtol=1e-9)
    past, past_flat = mixed, flat


shapes = st.sampled_from([(5,), (3, 7), (2, 3, 4)])
seeds = st.integers(0, 2**31)
temperatures = st.sampled_from([0.5, 1.0, 3.0, 20.0])


@jax.jit
def all_divergences(s, t, labels, temperature):
  return {
      'kl': divergence.kl(s, t, temperature),
      'js': divergence.js(s, t, temperature),
      'l1': divergence.l1(s, t),
      'l2': divergence.l2(s, t),
      'cross_entropy': divergence.cross_entropy(s, labels),
      'adversarial': inversion.adversarial(s, t, temperature=temperature),
  }


@settings(max_examples=30, deadline=None)
@given(shapes, seeds, temperatures)
def test_divergences_equal_brute_force_on_any_leading_axes(shape, seed, temperature):
  s, t = 3 * np.random.default_rng(seed).standard_normal((2, *shape))
  labels = np.random.default_rng(seed).integers(0, shape[-1], shape[:-1])
  with jax.enable_x64(True):
    ours = all_divergences(s, t, jnp.asarray(labels), temperature)
  p, q = (special.softmax(v / temperature, -1) for v in (t, s))
  clamp = lambda v: np.clip(v, 0.01, 0.99)
  m, cp, cq = clamp((p + q) / 2), clamp(p), clamp(q)
  kl = np.empty(shape[:-1])
  for place in np.ndindex(shape[:-1]):
    kl[place] = temperature**2 * stats.entropy(p[place], q[place])
  expected = {
      'kl': kl,
      'js': 0.5 * special.rel_entr(m, cp).sum(-1) + 0.5 * special.rel_entr(m, cq).sum(-1),
      'l1': np.abs(s - t).mean(-1),
      'l2': ((s - t) ** 2).mean(-1),
      'cross_entropy': -np.take_along_axis(
          special.log_softmax(s, -1), labels[..., None], -1)[..., 0],
      'adversarial': np.where(s.argmax(-1) == t.argmax(-1), -kl, 0),
  }
  assert ours.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(ours[name], value, rtol=1e-8, atol=1e-11, err_msg=name)


def test_kl_at_high_temperature_is_half_the_squared_centred_difference(x64):
  s, t = 0.1 * np.random.default_rng(0).standard_normal((2, 4, 7))
  centred = (s - t) - (s - t).mean(-1, keepdims=True)
  np.testing.assert_allclose(divergence.kl(s, t, 1e3), (centred**2).sum(-1) / 14, rtol=1e-3)
  np.testing.assert_allclose(divergence.kl(t + 5, t, 20.0), 0, atol=1e-10)


def test_cross_entropy_ignores_only_what_it_is_told_to():
  logits = jnp.asarray(seq((2, 3, 5), 1, 2), jnp.float32)
  labels = jnp.array([[0, 255, 4], [255, 2, 1]], jnp.uint8)
  def total(logits):
    losses = divergence.cross_entropy(logits, labels, 255)
    return losses.sum(), losses
  (_, losses), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
  known = np.asarray(labels) != 255
  expected = -special.log_softmax(logits, -1)[known][range(4), np.asarray(labels)[known]]
  np.testing.assert_allclose(losses[known], expected, rtol=1e-5)
  np.testing.assert_array_equal(losses[~known], 0)
  np.testing.assert_array_equal(np.abs(grad).sum(-1) > 0, known)


@pytest.mark.parametrize('ignore', [None, 255])
def test_cross_entropy_of_a_label_out_of_range_is_nan(ignore):
  losses = jax.jit(divergence.cross_entropy, static_argnums=2)(
      jnp.zeros((4, 5)), jnp.array([-1, 5, 254, 4]), ignore)
  np.testing.assert_array_equal(np.isnan(losses), [True, True, True, False])


def test_adversarial_by_hand_for_each_divergence():
  # The first row agrees.
  s, t = jnp.array([[2.0, 0, 1], [0, 3, 1]]), jnp.array([[4.0, 1, 1], [5, 0, 0]])
  for name, measure in {
      'kl': divergence.kl, 'js': divergence.js, 'l1': lambda a, b, _: divergence.l1(a, b)}.items():
    full = measure(s, t, 3.0)
    call = lambda masked, n=name: inversion.adversarial(
        s, t, masked=masked, divergence=n, temperature=3.0)
    np.testing.assert_allclose(call(False), -full, rtol=1e-6)
    np.testing.assert_allclose(call(True), [-full[0], 0], rtol=1e-6)
  full = np.abs(np.array(s) - np.array(t)).mean(1)
  log_l1 = lambda masked: inversion.adversarial(s, t, masked=masked, divergence='log_l1')
  np.testing.assert_allclose(log_l1(False), [-np.log(1 + full.mean())] * 2, rtol=1e-6)
  np.testing.assert_allclose(log_l1(True), [-np.log(1 + full[0] / 2)] * 2, rtol=1e-6)
  with pytest.raises(ValueError, match=r"divergence is 'wasserstein', must be one of \('kl'"):
    inversion.adversarial(s, t, divergence='wasserstein')


def test_adversarial_vanishes_for_a_student_that_is_the_teacher_only():
  s, t = jnp.asarray(seq((6, 5), 1, 2), jnp.float32), jnp.asarray(seq((6, 5), 4, 2), jnp.float32)
  total = lambda x, other: inversion.adversarial(x + other, t + x, masked=False).sum()
  assert np.abs(jax.grad(total)(jnp.zeros_like(t), t)).max() < 1e-6
  assert np.abs(jax.grad(total)(jnp.zeros_like(t), s)).max() > 1e-2
  through = jax.grad(lambda s, t: inversion.adversarial(s, t).sum(), (0, 1))(s, s * 1.5)
  assert all(np.abs(grad).max() > 1e-2 for grad in through)


def test_balance_is_lowest_for_an_even_batch():
  balance, sure = jax.jit(inversion.balance), 1e4 * np.eye(5, dtype=np.float32)
  np.testing.assert_allclose(balance(sure), -np.log(5), rtol=1e-6)
  np.testing.assert_allclose(balance(sure[:1]), 0, atol=1e-6)
  np.testing.assert_allclose(balance(sure[:2].reshape(1, 2, 1, 5)), -np.log(2), rtol=1e-6)
  s = seq((3, 4, 5), 1, 2)
  p = special.softmax(s / 3, -1).reshape(-1, 5).mean(0)
  np.testing.assert_allclose(
      balance(jnp.asarray(s, jnp.float32), 3.0), (p * np.log(p)).sum(), rtol=1e-5)


def test_total_variation_by_hand():
  # Right 0; below and diagonals 1 each.
  ramp = np.broadcast_to(np.arange(5.0)[:, None, None], (5, 4, 3))
  np.testing.assert_allclose(jax.jit(inversion.total_variation)(np.stack([ramp, 2 * ramp])), [3, 6])


def test_activation_is_minus_the_mean_size_of_each_example():
  np.testing.assert_allclose(
      inversion.activation(jnp.array([[1.0, -3], [0, 5], [0, 0]])), [-2, -2.5, 0])


def layers(seed):
  rng = np.random.default_rng(seed)
  draw = lambda size: Moments(
      *(jnp.asarray(rng.standard_normal(size), jnp.float32) for _ in range(2)))
  return {'stem/bn': draw(3), 'block/bn': draw(7)}


def test_batch_norm_is_zero_and_smooth_where_the_moments_are_equal():
  running = layers(0)
  value, grad = jax.jit(jax.value_and_grad(inversion.batch_norm))(running, running)
  assert value == 0
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(grad))


def test_batch_norm_doubles_with_the_deviation_and_has_unit_gradients():
  running, deviation = layers(0), layers(1)
  at = lambda scale: jax.tree.map(lambda r, d: r + scale * d, running, deviation)
  np.testing.assert_allclose(
      inversion.batch_norm(at(2.0), running), 2 * inversion.batch_norm(at(1.0), running), rtol=1e-5)
  for leaf in jax.tree.leaves(jax.grad(inversion.batch_norm)(at(1.0), running)):
    np.testing.assert_allclose(np.linalg.norm(leaf), 1, rtol=1e-5)


def test_relative_batch_norm_by_hand():
  running = {'bn': Moments(jnp.array([1.0, -2.0, 0.5]), jnp.array([4.0, 9.0, 12.0]))}
  moments = {'bn': Moments(jnp.array([1.0, 1.0, 4.5]), jnp.array([4.0, 12.0, 8.0]))}
  # Means are off by (0, 3, 4) in units of sqrt(4 + 9 + 12), variances by (0, 3, -4) in units of
  # |(4, 9, 12)|.
  np.testing.assert_allclose(
      inversion.relative_batch_norm(moments, running), 5 / 5 + 5 / np.sqrt(241), rtol=1e-6)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=2), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_relative_batch_norm_does_not_depend_on_the_scale_of_a_layer(scales, seed):
  draw = np.random.default_rng(seed)
  make = lambda: {name: Moments(draw.normal(size=size), draw.uniform(0.1, 2, size))
                  for name, size in (('stem', 3), ('block/bn', 5))}
  moments, running = make(), make()
  scaled = lambda layers: {name: Moments(s * layers[name].mean, s * s * layers[name].var)
                          for name, s in zip(layers, scales, strict=True)}
  np.testing.assert_allclose(
      inversion.relative_batch_norm(scaled(moments), scaled(running)),
      inversion.relative_batch_norm(moments, running),
      rtol=1e-4)


def test_relative_batch_norm_is_smooth_where_the_moments_are_equal_or_all_zero():
  for size in (0.0, 1.0):
    running = {'bn': Moments(jnp.full(3, size), jnp.full(3, size))}
    value, grad = jax.jit(jax.value_and_grad(inversion.relative_batch_norm))(running, running)
    assert value == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


def test_batch_norm_by_layer_sums_to_the_whole():
  running, moments = layers(0), layers(1)
  parts = inversion.batch_norm_by_layer(moments, running)
  assert parts.keys() == running.keys()
  deviation = np.asarray(moments['stem/bn']) - np.asarray(running['stem/bn'])
  np.testing.assert_allclose(parts['stem/bn'], np.linalg.norm(deviation, axis=1).sum(), rtol=1e-6)
  np.testing.assert_allclose(sum(parts.values()), inversion.batch_norm(moments, running), rtol=1e-6)


def test_batch_norm_names_what_does_not_match():
  running = layers(0)
  with pytest.raises(
      ValueError,
      match='network without BatchNorm: batch_norm or student_batch_norm has nothing to'):
    inversion.batch_norm({}, {})
  with pytest.raises(ValueError, match="'block/bn' is among the second moments only"):
    inversion.batch_norm({'stem/bn': running['stem/bn']}, running)
  with pytest.raises(ValueError, match="'block/bn' is among the first moments only"):
    inversion.mix(running, {'stem/bn': running['stem/bn']}, 0.9)


def test_mix_passes_only_the_share_of_the_batch_to_its_gradient():
  batch, past = layers(0), layers(1)
  total = lambda batch, past, m: sum(
      leaf.sum() for leaf in jax.tree.leaves(inversion.mix(batch, past, m)))
  grads = jax.jit(jax.grad(total, (0, 1)))(batch, past, 0.9)
  for leaf in jax.tree.leaves(grads[0]):
    np.testing.assert_allclose(leaf, 0.1, rtol=1e-6)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads[1]))
  for new, old in zip(
      *map(jax.tree.leaves, (inversion.mix(batch, past, jnp.array(0.0)), batch)), strict=True):
    np.testing.assert_array_equal(new, old)
  still = inversion.mix(past, past, 0.9)  # Without change, the history is the batch.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), still, past)


HUGE = jnp.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 1e4]])
EDGES = {
    'equal': (jnp.asarray(seq((3, 4), 1), jnp.float32),) * 2,
    'zero': (jnp.zeros((3, 4)), jnp.zeros((3, 4))),
    'huge, agreeing': (HUGE, HUGE),
    'huge, opposed': (HUGE, -HUGE),
}
TERMS = {
    'kl': divergence.kl,
    'kl20': lambda s, t: divergence.kl(s, t, 20.0),
    'js': divergence.js,
    'l1': divergence.l1,
    'l2': divergence.l2,
    'cross_entropy': lambda s, t: divergence.cross_entropy(s, jnp.array([0, 1, 2])),
    'adversarial': inversion.adversarial,
    'balance': lambda s, t: inversion.balance(s),
    'balance of one': lambda s, t: inversion.balance(s[:1]),
    'activation': lambda s, t: inversion.activation(s),
    'l2 of images': lambda s, t: inversion.l2(s),
    'total_variation': lambda s, t: inversion.total_variation(s[None, ..., None]),
}


@pytest.mark.parametrize('name', TERMS)
def test_values_and_gradients_are_finite_at_the_edges(name):
  total = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(TERMS[name](*a)), (0, 1)))
  for edge, logits in EDGES.items():
    value, grads = total(*logits)
    assert np.isfinite(value), edge
    assert all(np.isfinite(grad).all() for grad in grads), edge


def unit(rng, *shape):
  rows = rng.standard_normal(shape)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def brute_contrast(local, global_, bank_local, bank_global, temperature, valid):
  """The slots that are valid, one after another, as if no others existed."""
  rows = np.concatenate([local, bank_local[valid]])
  columns = np.concatenate([global_, bank_global[valid]])
  losses = -np.diag(special.log_softmax(rows @ columns.T / temperature, axis=1))
  size = len(local)
  return losses[:size].mean() + (losses[size:].mean() if valid.any() else 0)


contrast_and_grads = jax.jit(jax.value_and_grad(inversion.contrast, (0, 1, 2, 3)))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(1, 6, 5), (4, 3, 2)]), seeds, st.floats(0, 1))
def test_contrast_equals_brute_force_for_any_filling(sizes, seed, share):
  size, slots, dim = sizes
  rng = np.random.default_rng(seed)
  views = [unit(rng, n, dim) for n in (size, size, slots, slots)]
  valid = rng.random(slots) < share
  with jax.enable_x64(True):
    args = [jnp.asarray(v) for v in views]
    value, grads = contrast_and_grads(*args, 0.2, jnp.asarray(valid))
  grads = [np.asarray(grad) for grad in grads]
  np.testing.assert_allclose(value, brute_contrast(*views, 0.2, valid), rtol=1e-9)
  assert (grads[1] == 0).all()  # Global views are constants.
  assert (grads[3] == 0).all()
  assert (grads[2][~valid] == 0).all()
  assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize('filling', ['empty', 'full', 'no slots'])
def test_contrast_is_finite_however_full_the_bank_is(filling):
  rng = np.random.default_rng(0)
  slots = 0 if filling == 'no slots' else 6
  args = [jnp.asarray(unit(rng, n, 4), jnp.float32) for n in (3, 3, slots, slots)]
  valid = jnp.full(slots, filling == 'full')
  value, grad = jax.jit(jax.value_and_grad(inversion.contrast))(*args, 0.1, valid)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()
  np.testing.assert_allclose(
      value, brute_contrast(*map(np.asarray, args), 0.1, np.asarray(valid)), rtol=1e-5)


def test_contrast_is_least_where_views_match():
  eye, bank, valid = np.eye(5, dtype=np.float32), np.zeros((2, 5), np.float32), np.zeros(2, bool)
  loss = jax.jit(inversion.contrast)
  assert loss(eye, eye, bank, bank, 0.1, valid) < 1e-3
  assert loss(eye, np.roll(eye, 1, axis=0), bank, bank, 0.1, valid) > 5
