import json
import logging
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from dfkd_jax.runs.checkpoint import Checkpoints, read_meta
from dfkd_jax.runs.checkpoint_format import hash_json


class Ring(NamedTuple):
  images: jax.Array
  pointer: jax.Array


class Student(struct.PyTreeNode):
  params: dict
  opt_state: optax.OptState
  name: str = struct.field(pytree_node=False, default='student')


def make_state(seed=0, width=5):
  """All kinds of leaves and containers that a run has, filled with what no default would give."""
  rng = np.random.default_rng(seed)
  params = {'stem/conv': {'kernel': jnp.asarray(rng.normal(size=(3, width)), jnp.float32)},
      'scale': jnp.full(2, 1.5)}
  tx = optax.multi_transform(
    {'a': optax.chain(optax.clip(1.0), optax.adam(0.1)), 'b': optax.sgd(0.1, momentum=0.9)},
    {'stem/conv': 'a', 'scale': 'b'},
  )
  _, opt_state = tx.update(params, tx.init(params), params)
  return {
    'student': Student(params, opt_state),
    'ring': Ring(jnp.asarray(rng.integers(0, 256, (7, 2, 3, 1)), jnp.uint8), jnp.int32(4)),
    'half': jnp.asarray(rng.normal(size=(3,)), jnp.bfloat16),
    'host': [np.asarray(rng.normal(size=(2, 3))), np.array(True),
        rng.normal(size=2).astype(ml_dtypes.bfloat16)],
    'none': None,
  }


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert (a.dtype, a.shape, isinstance(a, np.ndarray)) == (b.dtype, b.shape,
        isinstance(b, np.ndarray))
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def one_line(error):
  text = str(error.value)
  assert '\n' not in text
  assert len(text) < 600
  return text


@pytest.fixture
def folder(tmp_path):
  return tmp_path / 'checkpoints'


@pytest.fixture
def saved(folder):
  """A folder with steps 3 and 8."""
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(3, make_state(3), {'round': 3})
    checkpoints.save(8, make_state(8),
        {'round': 8, 'config': {'betas': (0.5, 0.999)}, 'best': None})
  return folder


def test_state_comes_back_bit_for_bit_from_arrays_and_from_shapes(saved):
  with Checkpoints(saved) as checkpoints:
    assert checkpoints.latest() == 8
    state, meta = checkpoints.restore(make_state(0))
    assert_same(state, make_state(8))
    assert state['student'].name == 'student'
    assert meta == {'round': 8, 'config': {'betas': [0.5, 0.999]}, 'best': None}
    ring = {'ring': make_state(0)['ring']}
  with Checkpoints(saved.parent / 'ring') as checkpoints:
    checkpoints.save(1, ring, {})
    state, _ = checkpoints.restore(jax.eval_shape(lambda: ring))
    assert_same(state, ring)


def test_an_earlier_step_and_its_meta_can_be_asked_for(saved):
  with Checkpoints(saved) as checkpoints:
    state, meta = checkpoints.restore(make_state(0), step=3)
    assert_same(state, make_state(3))
    assert meta == {'round': 3}
    assert read_meta(saved)['round'] == 8
    with pytest.raises(ValueError, match=r'Cannot read step 5 in .*') as error:
      checkpoints.restore(make_state(0), step=5)
    one_line(error)


def test_meta_is_read_without_the_arrays(saved):
  shutil.rmtree(saved / '8' / 'state')
  assert read_meta(saved)['round'] == 8


def test_nothing_saved_yet(folder):
  with Checkpoints(folder) as checkpoints:
    assert checkpoints.latest() is None
    with pytest.raises(ValueError, match='There is no checkpoint in'):
      checkpoints.restore(make_state())


def test_only_the_latest_are_kept(folder):
  with Checkpoints(folder, max_to_keep=2) as checkpoints:
    for step in (1, 2, 5, 7):
      checkpoints.save(step, {'a': jnp.arange(step)}, {})
  assert sorted(path.name for path in folder.iterdir()) == ['5', '7']


@pytest.mark.parametrize('step', [8, 5, 3])
def test_a_step_is_never_saved_twice_nor_backwards(saved, step):
  with Checkpoints(saved) as checkpoints:
    with pytest.raises(
        ValueError, match=f'Step {step} is not saved: .* has step 8 already') as error:
      checkpoints.save(step, make_state(1), {})
    one_line(error)
    assert_same(checkpoints.restore(make_state(0))[0], make_state(8))


def test_numpy_scalars_become_arrays(folder):
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, {'a': np.int16(-7), 'b': np.float32(1.5)}, {})
    state, _ = checkpoints.restore({'a': np.int16(0), 'b': jax.ShapeDtypeStruct((), jnp.float32)})
  assert isinstance(state['a'], np.ndarray)
  assert (state['a'].shape, state['a'].dtype, int(state['a'])) == ((), np.int16, -7)
  assert float(state['b']) == 1.5


@pytest.mark.parametrize(
  ('leaf', 'named'),
  [(3, 'int'), (2.5, 'float'), ('text', 'str'), (np.array(['a']), '<U1'),
      (np.array([None]), 'object')],
)
def test_what_is_no_array_is_refused(folder, leaf, named):
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(ValueError, match=f"Leaf 'outer/1' .*{named}"):
      checkpoints.save(1, {'outer': [jnp.zeros(2), leaf]}, {})
    assert checkpoints.latest() is None


def test_random_keys_and_empty_states_are_refused(folder):
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(ValueError, match=r"Leaf 'key' .*key<"):
      checkpoints.save(1, {'key': jax.random.key(0)}, {})
    with pytest.raises(ValueError, match='no arrays'):
      checkpoints.save(1, {'nothing': None}, {})


def test_meta_must_be_json(folder):
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(TypeError, match='float32'):
      checkpoints.save(1, {'a': jnp.ones(2)}, {'accuracy': np.float32(0.5)})
    assert checkpoints.latest() is None


def changed(change):
  state = make_state(0)
  change(state)
  return state


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    (make_state(0, width=4),
        r"'student/params/stem/conv/kernel' is float32\[3, 5\] there, float32\[3, 4\] here"),
    (changed(lambda s: s.update(half=jnp.zeros(3))),
        r"'half' is bfloat16\[3\] there, float32\[3\] here\."),
    (changed(lambda s: s.update(half=jnp.zeros((3, 1), jnp.bfloat16))),
        r"'half' is bfloat16\[3\] .*bfloat16\[3, 1\]"),
    (changed(lambda s: s.update(more=jnp.zeros(2, jnp.int8))),
        r"'more' is missing there, int8\[2\] here\."),
    (changed(lambda s: s.pop('ring')),
        r"'ring/images' is uint8\[7, 2, 3, 1\] there, missing here \(and 1 more\)\."),
  ],
  ids=['shape', 'dtype', 'rank', 'missing', 'extra'],
)
def test_another_architecture_is_named_by_its_first_leaf(saved, template, message):
  with Checkpoints(saved) as checkpoints:
    with pytest.raises(
        ValueError, match='Checkpoint of another architecture, step 8 .*' + message) as error:
      checkpoints.restore(template)
    one_line(error)


def test_an_optimizer_of_another_kind_is_another_architecture(folder):
  params = {'w': jnp.ones((2, 3))}
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, optax.sgd(0.1, momentum=0.9).init(params), {})
    with pytest.raises(ValueError, match=r"'0/count' is missing there, int32\[\] here"):
      checkpoints.restore(optax.adam(0.1).init(params))


def test_saved_arrays_may_be_donated_and_overwritten_at_once(folder):
  step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
  state = {'a': jnp.asarray(np.random.default_rng(0).integers(0, 99, 2_000_001), jnp.int32),
      'b': jnp.zeros(3)}
  host = np.arange(300_001)
  expected = jax.tree.map(np.array, state)
  with Checkpoints(folder, max_to_keep=None) as checkpoints:
    for number in range(3):
      checkpoints.save(number, {'device': state, 'host': host}, {})
      host += 1
      state = step(step(state))
    for number in range(3):
      restored, _ = checkpoints.restore({'device': state, 'host': host}, number)
      np.testing.assert_array_equal(restored['host'], np.arange(300_001) + number)
      for name in state:
        np.testing.assert_array_equal(restored['device'][name], expected[name] + 2 * number)


def test_arrays_move_between_numbers_of_devices(folder):
  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (('data',), ()))
  values = {'a': jnp.arange(24.0).reshape(8, 3), 'b': jnp.arange(5)}
  on_four = {'a': jax.device_put(values['a'], split), 'b': jax.device_put(values['b'], everywhere)}
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, on_four, {})
    on_one, _ = checkpoints.restore(values)
    checkpoints.save(2, on_one, {})
    back, _ = checkpoints.restore(on_four)
    on_host, _ = checkpoints.restore(jax.tree.map(np.asarray, values))
  assert_same(on_one, values)
  assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(on_one))
  assert_same(back, values)
  assert (back['a'].sharding, back['b'].sharding) == (split, everywhere)
  assert back['a'].addressable_shards[2].data.shape == (2, 3)
  assert_same(on_host, jax.tree.map(np.asarray, values))


def test_doubles_stay_doubles(folder, x64):
  with Checkpoints(folder) as checkpoints:
    state = {'w': jnp.full(3, 1 / 3)}
    assert state['w'].dtype == jnp.float64
    checkpoints.save(1, state, {})
    assert_same(checkpoints.restore(state)[0], state)


def test_a_resumed_state_needs_no_second_compilation(folder):
  step = jax.jit(lambda state, number: jax.tree.map(lambda leaf: leaf * 2 + number, state))
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, {'w': jnp.arange(3.0)}, {})
    state, _ = checkpoints.restore({'w': jnp.zeros(3)})
  for number in range(3):
    state = step(state, jnp.int32(number))
  assert step._cache_size() == 1


def test_a_save_and_a_restore_log_no_warning(folder, caplog):
  with caplog.at_level(logging.WARNING), Checkpoints(folder) as checkpoints:
    checkpoints.save(1, {'a': jnp.ones(3)}, {})
    checkpoints.restore({'a': jnp.ones(3)})
  assert caplog.records == []


def test_the_hash_of_a_config_depends_on_values_alone():
  config = {'b': {'y': (1, 2), 'x': None}, 'a': 'é'}
  same = json.loads(json.dumps({'a': 'é', 'b': {'x': None, 'y': [1, 2]}}))
  assert hash_json(config) == hash_json(same)
  assert len(hash_json(config)) == 16
  assert len(
      {hash_json({'a': value}) for value in (1, 2, '1', None, [1], {'a': 1}, 1.5, True)}) == 8
