"""Which runs are the same, told from configs, weights and settings of JAX."""

import jax
import pytest

from dfkd_jax.runs import config_diff

CONFIG = {'seed': 0, 'precision': None, 'teacher': {'source': 'a.pth#ema'}, 'num_devices': 1}


def identity(**changes):
  return config_diff.run_identity(CONFIG | changes)


@pytest.mark.parametrize(('name', 'context', 'here'), [
    ('default_prng_impl', lambda: jax.default_prng_impl('rbg'), 'rbg'),
    ('enable_x64', lambda: jax.enable_x64(True), True),
    ('default_matmul_precision', lambda: jax.default_matmul_precision('highest'), 'highest')])
def test_settings_of_jax_that_change_numbers_differ(tmp_path, name, context, here):
  stored = identity()
  with context():
    changed = identity()
  assert config_diff.differing_fields(stored, stored) == {}
  assert config_diff.differing_fields(stored, changed) == {
      f'jax.{name}': {'there': stored['jax'][name], 'here': here}}
  with pytest.raises(ValueError, match=rf'jax\.{name} is .*--resume=force:jax\.{name}'):
    config_diff.config_changes(stored, changed, tmp_path)
  (tmp_path / 'checkpoints' / '1').mkdir(parents=True)
  for resume in ('force', 'force:jax', f'force:jax.{name}'):
    assert set(config_diff.config_changes(stored, changed, tmp_path, resume)) == {f'jax.{name}'}


def test_runs_of_before_know_no_settings_of_jax():
  older = {'config': CONFIG}
  with jax.enable_x64(True):
    assert config_diff.differing_fields(older, identity()) == {}
  # Without a field there is its default: here the seed is 0, and the source is not None.
  assert config_diff.differing_fields({}, identity()).keys() == {'teacher.source'}


def test_a_precision_of_the_config_counts_instead_of_that_of_jax():
  stored = identity(precision='high')
  with jax.default_matmul_precision('highest'):
    assert config_diff.differing_fields(stored, identity(precision='high')) == {}
    assert set(config_diff.differing_fields(stored, identity(precision='highest'))) == {'precision'}


def test_paths_and_devices_may_change():
  moved = identity(teacher={'source': 'b.pth#ema'}, num_devices=4)
  assert config_diff.differing_fields(identity(), moved) == {}
  assert config_diff.fingerprint(CONFIG) == config_diff.fingerprint(CONFIG | {'num_devices': 4})
  other = identity(teacher={'source': 'b.pth'})
  assert set(config_diff.differing_fields(identity(), other)) == {'teacher.source'}


def test_weights_are_forced_by_the_field_that_names_them(tmp_path):
  stored, current = (identity() | {'weights': {'teacher': digest, 'init_from.student': digest}}
                     for digest in ('0' * 64, '1' * 64))
  (tmp_path / 'checkpoints' / '1').mkdir(parents=True)
  with pytest.raises(
      ValueError, match=r"weights\.teacher is '0+ \.\.\. 0+' there.*force:teacher\.source"):
    config_diff.config_changes(stored, current, tmp_path, 'force:init_from.student')
  changes = config_diff.config_changes(stored, current, tmp_path, 'force:teacher,init_from.student')
  assert changes['weights.teacher'] == {'there': '0' * 64, 'here': '1' * 64}


def test_a_run_from_before_there_was_a_field_has_its_default():
  assert config_diff.differing_fields(identity(), identity(task='classification')) == {}
  changes = config_diff.differing_fields(identity(), identity(task='segmentation'))
  assert changes == {'task': {'there': 'classification', 'here': 'segmentation'}}
  same = identity(student={'head_init': 'random', 'head_width': None})
  assert config_diff.differing_fields(identity(), same) == {}
  changes = config_diff.differing_fields(identity(), identity(student={'head_init': 'ridge'}))
  assert changes == {'student.head_init': {'there': 'random', 'here': 'ridge'}}
