"""CMI's bank and head: what they hold, draw and learn, by hand."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from cmi_toys import CONTRAST, cmi, count, features_of, no_rows, projected
from hypothesis import strategies as st
from method_runs import Noting, largest_difference, run

from dfkd_jax.synth import Factors, contrast, replay
from dfkd_jax.synth.methods import cmi as method_file


@hypothesis.settings(derandomize=True, deadline=None, max_examples=6)
@hypothesis.given(st.sampled_from([1, 4, 7]), st.data())
def test_rows_are_live_and_drawn_without_replacement(capacity, data):
  size, number = data.draw(st.integers(0, capacity)), data.draw(st.integers(1, capacity))
  slots, live = contrast.random_rows(
      jax.random.key(data.draw(st.integers(0, 99))), jnp.int32(size), capacity, number)
  assert slots.shape == live.shape == (number,)
  assert len(set(slots.tolist())) == number
  np.testing.assert_array_equal(live, slots < size)
  assert int(live.sum()) == min(size, number)


def test_every_live_row_is_drawn_equally_often():
  draw = jax.vmap(lambda key: contrast.random_rows(key, jnp.int32(5), 8, 2))
  slots, live = jax.jit(draw)(jax.random.split(jax.random.key(0), 2000))
  assert live.all()
  # A binomial count of 2,000 with chance 2/5 has the standard deviation 22.
  np.testing.assert_allclose(np.bincount(slots.ravel(), minlength=8)[:5], 800, atol=90)


def test_only_live_rows_count_in_the_contrast():
  """One step by hand: five of nine rows are live, so a request for seven finds only five."""
  view_of_all, view_of_one = Noting(), Noting(lambda _, images: images[:, ::-1])
  method = cmi(
      num_steps=1, num_negatives=7, augment=view_of_all, local_view=view_of_one,
      contrast_temperature=0.3)
  start = toys.jit(method.init)(jax.random.key(0), toys.teacher())
  bank = np.abs(np.random.default_rng(0).normal(size=start.bank.shape)).astype(np.float32)
  bank[:, 5:] = 1e4  # Not images.
  _, metrics = toys.jit(method.synthesize)(
      start.replace(bank=bank, size=jnp.int32(5)), jax.random.key(1), toys.teacher(),
      toys.student())
  (_, global_), (_, local) = (noting.given_and_seen() for noting in (view_of_all, view_of_one))
  np.testing.assert_array_equal(local, global_[:, :, ::-1])
  head = jax.tree.map(np.asarray, start.head)
  rows = projected(head, np.concatenate([features_of(local[0]), bank[0, :5, 0]]))
  columns = projected(head, np.concatenate([features_of(global_[0]), bank[0, :5, 1]]))
  odds = np.exp(rows @ columns.T / 0.3)
  losses = -np.log(np.diag(odds) / odds.sum(1))
  np.testing.assert_allclose(
      metrics['contrast'], [losses[:4].mean() + losses[4:].mean()], rtol=1e-4)
  total = sum(getattr(CONTRAST, name) * value for name, value in metrics.items() if name != 'loss')
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-5)


def test_pooled_features_are_means_over_the_pixels_of_each_image():
  """So each image's are the mean moments of a batch of its own."""
  images = jax.random.uniform(jax.random.key(0), (3, *toys.IMAGE))
  together, alone = toys.jit(lambda: (
      toys.teacher()(images).pooled, [toys.teacher()(images[i:i + 1]).moments for i in range(3)]))()
  assert set(together) == {'bn1', 'bn2'}
  for path, pooled in together.items():
    np.testing.assert_allclose(
        pooled, [moments[path].mean for moments in alone], rtol=1e-4, atol=1e-6)


@functools.cache
def calls_over_a_bank(bank_size):
  """Three calls whose inversions are the same whatever the bank holds."""
  factors = Factors(one_hot=0.5, contrast=0.8)
  return run(cmi(
      bank_size=bank_size, num_steps=1, num_negatives=2, sample_rows=no_rows, factors=factors),
      calls=3)[0]


@pytest.mark.parametrize('bank_size', [5, 6])
def test_the_bank_is_a_ring(bank_size):
  """Rows in order, the newest over the oldest."""
  history = np.asarray(calls_over_a_bank(13)[3].bank[0, :12])
  assert (np.abs(history).sum((1, 2)) > 0).all()
  expected, written = np.zeros_like(history[:bank_size]), 0
  for index, state in enumerate(calls_over_a_bank(bank_size)):
    np.testing.assert_allclose(state.bank[0], expected, rtol=1e-5, atol=1e-6)
    assert (int(state.next), int(state.size)) == (written % bank_size, min(written, bank_size))
    for row in history[4 * index:4 * index + 4]:
      expected[written % bank_size] = row
      written += 1


def test_the_bank_holds_features_of_the_images_kept():
  """The bank has the global view, to the accuracy of uint8.

  The local view is mirrored, and its means before bn1 differ.
  """
  state = calls_over_a_bank(13)[3]
  images = replay.to_float(state.inversion.buffer.images[0])
  found = np.asarray(state.bank[0, :12])
  np.testing.assert_allclose(found[:, 1], features_of(images), atol=0.02)
  assert np.abs(found[:, 0] - found[:, 1]).max() > 1e-3


@functools.cache
def filling():
  """Five calls with a bank of two batches, and their program.

  The bank is empty, half full and just full; then calls overwrite it.
  """
  method = cmi(bank_size=8, num_negatives=8, num_steps=3)
  synthesize = toys.jit(method.synthesize)
  states, metrics = [toys.jit(method.init)(jax.random.key(0), toys.teacher())], []
  for index in range(5):
    state, found = synthesize(
        states[-1], jax.random.key(10 + index), toys.teacher(), toys.student())
    states.append(state)
    metrics.append(found)
  return states, metrics, synthesize


def test_no_bank_is_too_empty_or_too_full():
  """The published code has NaN in the third call here, where the bank is just full."""
  states, metrics, _ = filling()
  assert [int(state.size) for state in states] == [0, 4, 8, 8, 8, 8]
  for found, state in zip(metrics, states[1:], strict=True):
    for leaf in jax.tree.leaves((found, state)):
      assert np.isfinite(leaf).all()
  contrast = np.array([found['contrast'] for found in metrics])
  assert (contrast[0] < np.log(4) + 2).all()  # The batch alone.
  assert (contrast[1:] > contrast[0]).all()  # And the bank's rows, whose mean is added.
  for state, following in itertools.pairwise(states):
    assert largest_difference(state.head, following.head) > 1e-4
    assert largest_difference(state.inversion.meta_params, following.inversion.meta_params) > 1e-3


def test_the_head_gives_projections_of_norm_one():
  features = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
  head = method_file.Head(3)
  params = toys.jit(head.init)(jax.random.key(0), features)['params']
  project = lambda params, x: head.apply({'params': params}, x)
  np.testing.assert_allclose(toys.jit(project)(params, features), projected(
      jax.tree.map(np.asarray, params), features), rtol=1e-5, atol=1e-6)
  grads = toys.jit(jax.grad(lambda *inputs: project(*inputs).sum()))(
      jax.tree.map(jnp.zeros_like, params), features)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_heads_optimizer_lasts_over_calls():
  states, _, synthesize = filling()
  assert [int(count(state)) for state in states] == [0, 3, 6, 9, 12, 15]
  assert {count(state).dtype for state in states} == {np.dtype('int32')}
  fresh = states[3].replace(head_opt_state=jax.tree.map(jnp.zeros_like, states[3].head_opt_state))
  anew, _ = synthesize(fresh, jax.random.key(13), toys.teacher(), toys.student())
  assert largest_difference(states[4].head, anew.head) > 1e-4


@functools.cache
def one_step():
  """The states before and after, and the keys of the views and rows with all their splits."""
  keys = []

  def note(key, drawn):
    halves = jax.random.split(key)
    for each in (key, *halves, *jax.vmap(jax.random.split)(halves).ravel()):
      jax.debug.callback(
          lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(each), ordered=True)
    return drawn

  with jax.debug_key_reuse(False):
    states, _ = run(cmi(
        factors=Factors(contrast=0.8), num_steps=1, generator_lr=2e-3, head_lr=5e-4,
        augment=note, local_view=note,
        sample_rows=lambda key, *sizes: note(key, no_rows(key, *sizes))))
  jax.effects_barrier()
  return states, keys


def test_one_step_of_the_head_is_adam_at_its_own_rate():
  (start, end), _ = one_step()
  steps = jax.tree.map(lambda a, b: np.abs(a - b).ravel(), start.head, end.head)
  np.testing.assert_allclose(np.median(np.concatenate(jax.tree.leaves(steps))), 5e-4, rtol=1e-2)


def test_every_draw_of_a_step_has_a_key_of_its_own():
  _, keys = one_step()
  assert len(keys) == len(set(keys)) == 3 * 7
