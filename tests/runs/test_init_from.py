"""A new run takes over the generator of a run of any method; sources are read once."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.config.records import InitFrom
from dfkd_jax.runs import init_from
from dfkd_jax.runs.checkpoint import Checkpoints

PARAMS = {'linear': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}}
MOMENTS = {'bn': {'mean': np.float32([1, 2, 3])}}
# As checkpoints of format 1 have them: (part 'synthesis', whether it has running moments).
OLD_RUNS = {
    'fast_dfkd': ({'meta_params': PARAMS}, False),
    'cmi': ({'inversion': {'meta_params': PARAMS}, 'head': PARAMS}, False),
    'dafl': ({'params': PARAMS, 'batch_stats': MOMENTS, 'ema': {'params': PARAMS}}, True),
    'cu_dfkd': ({'online': {'params': PARAMS, 'batch_stats': MOMENTS}}, True)}


def synthesizer(variables):
  """A method whose state is the variables of its generator."""
  return types.SimpleNamespace(
      generator=lambda state: variables, with_generator=lambda state, new: new)


def old_run(folder, synthesis):
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    checkpoints.save(1, {'synthesis': synthesis | {'buffer': np.zeros((3, 4))}}, {})
  return str(folder)


def load(source, variables):
  mesh = jax.make_mesh((1,), ('devices',), axis_types=(jax.sharding.AxisType.Auto,))
  return init_from.load_generator(synthesizer(variables), 'state', source, mesh)


@pytest.mark.parametrize('method', OLD_RUNS)
def test_a_generator_is_found_in_checkpoints_of_every_method(tmp_path, method):
  synthesis, has_moments = OLD_RUNS[method]
  source = old_run(tmp_path, synthesis)
  zeros = jax.tree.map(jnp.zeros_like, {'params': PARAMS, 'batch_stats': MOMENTS})
  loaded = load(source, zeros)
  jax.tree.map(np.testing.assert_array_equal, loaded, {
      'params': PARAMS, 'batch_stats': MOMENTS if has_moments else zeros['batch_stats']})
  assert init_from.source_path('generator', source).is_dir()
  sources = InitFrom(None, source)
  digests = init_from.source_digests(sources, sources, {})
  assert list(digests) == ['init_from.generator']
  assert len(digests['init_from.generator']) == 64


def test_generators_that_do_not_fit_are_refused(tmp_path):
  source = old_run(tmp_path / 'old', {'meta_params': PARAMS})
  with pytest.raises(ValueError, match=r"'params/linear/kernel' is \(2, 3\), must be \(2, 4\)"):
    load(source, {'params': {'linear': {'kernel': jnp.zeros((2, 4))}}})
  with pytest.raises(ValueError, match=r"'params/other' is missing, must be \(2,\)"):
    load(source, {'params': {'other': jnp.zeros(2)}})
  with pytest.raises(ValueError, match=r'init_from\.generator is .*must be None'):
    load(source, None)
  other = old_run(tmp_path / 'other', {'step': np.ones(1)})
  with pytest.raises(ValueError, match=r'init_from\.generator is .*other.*without a generator'):
    load(other, {'params': PARAMS})
  assert load(None, None) == 'state'


def test_sources_are_read_once():
  sources = InitFrom('old', 'older')
  config = {'init_from': {'student': 'old', 'generator': 'other'}}
  stored = {'config': config,
      'weights': {'init_from.student': '5' * 64, 'init_from.generator': '6' * 64}}
  assert init_from.unread_sources(sources, {}, False) == sources
  assert init_from.unread_sources(sources, stored, False) == InitFrom(None, 'older')
  # The control needs the first student.
  assert init_from.unread_sources(sources, stored, True) == sources
  assert init_from.source_digests(InitFrom('old', None), InitFrom(None, None), stored) == {
      'init_from.student': '5' * 64}


def test_places_that_are_no_source(tmp_path):
  with pytest.raises(
      ValueError, match=r"init_from\.generator is '.*', must be the folder of a run"):
    init_from.source_path('generator', str(tmp_path))
  with pytest.raises(ValueError, match=r"init_from\.student is 'nowhere'"):
    init_from.source_path('student', 'nowhere')
