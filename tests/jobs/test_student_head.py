"""Heads that are fitted within a run: the state afterwards, resuming, and refusals.

test_train.py and test_processes.py fit heads on several devices and in several processes.
"""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import toy_runs
from flax import linen as nn
from toy_runs import equal

from dfkd_jax import distill, models, train
from dfkd_jax.config import build
from dfkd_jax.config.head import fit_round
from dfkd_jax.config.problems import InvalidError
from dfkd_jax.config.records import resolve
from dfkd_jax.jobs import student_head
from dfkd_jax.runs.loop import Start
from dfkd_jax.spline.network import network_of

KINDS = ('ridge', 'random_features', 'spline')


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


def config(kind='ridge', **changes):
  """A run on noise, which compiles fast; test_train.py has one with a replay buffer."""
  made = toy_runs.config(**{
      'distill__divergence': 'l2' if kind == 'random_features' else 'kl',
      'student__head_init': kind, 'student__head_width': 13, 'student__head_images': 19,
      'optimizer__name': 'adam', 'optimizer__learning_rate': 0.01, **changes})
  made.method = dict(name='noise')
  return made


def observed(made, workdir):
  """Runs; returns the summary, the last state, the fits, and the students before and after."""
  fits, students = [], []

  def fit_head(*arguments, **options):
    fits.append(original(*arguments, **options))
    return fits[-1]

  def replace_layers(student, layers, tx):
    students.append((student, jax.device_get(replaced(student, layers, tx))))
    return students[-1][1]

  original, replaced = student_head.fit_head, distill.replace_layers
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(student_head, 'fit_head', fit_head)
    patch.setattr(distill, 'replace_layers', replace_layers)
    summary, state, _ = toy_runs.observed(made, workdir)
  return summary, state, fits, students


@functools.cache
def whole(kind):
  return observed(config(kind), toy_runs.folder() / kind)


@pytest.mark.parametrize('kind', KINDS)
def test_the_head_of_a_run_is_the_fitted_one(kind):
  summary, _, (fit,), ((before, after),) = whole(kind)
  record = dict(summary['head'])
  assert 0 < record.pop('seconds') < summary['wall_seconds']
  assert record == {'init': kind, 'round': 2, 'images': 19, 'terms': fit.num_terms}
  assert summary['seconds']['head'] > 0
  images = np.random.default_rng(0).uniform(size=(7, *toy_runs.IMAGE)).astype(np.float32)
  outputs, old = after.network(images), before.network(images)
  np.testing.assert_array_equal(outputs.features, old.features)
  np.testing.assert_allclose(
      outputs.logits, network_of(fit.params).apply({'params': fit.params}, outputs.features),
      rtol=1e-5, atol=1e-5)
  assert np.abs(outputs.logits - old.logits).max() > 1e-2
  # The mean over classes is of no effect in a KL divergence, and a part of the target in l1 and l2.
  assert (np.abs(outputs.logits.mean(1)).max() < 1e-4) == (kind != 'random_features')
  names = {'fc_hidden', 'fc'}
  old, new = before.network.params, after.network.params
  assert old.keys() == new.keys()
  assert {name for name in old if not equal(old[name], new[name])} == names
  (old, old_schedule), (new, new_schedule) = before.opt_state[1], after.opt_state[1]
  assert old_schedule.count == new_schedule.count == 3
  assert equal(old.inner_states['others'], new.inner_states['others'])
  old, new = (jax.tree.leaves(of.inner_states[distill.REPLACED]) for of in (old, new))
  assert len(new) == 9  # The count, and both moments of four arrays.
  assert all(leaf.any() for leaf in old)
  assert not any(leaf.any() for leaf in new)
  assert equal(before.network.batch_stats, after.network.batch_stats)
  assert before.step == after.step == 3


@pytest.mark.parametrize(('kind', 'rounds'), [('spline', 3), ('random_features', 5)])
def test_a_run_that_stops_around_the_fit_has_the_same_bits(tmp_path, kind, rounds):
  """The fit is before the third round; rounds 2 and 4 are saved."""
  toy_runs.stopped(config(kind), tmp_path, rounds)
  summary, state, fits, _ = observed(config(kind), tmp_path)
  assert len(fits) == (rounds == 3)
  assert equal(state, whole(kind)[1])
  assert toy_runs.metrics(tmp_path) == toy_runs.metrics(toy_runs.folder() / kind)
  seconds = lambda summary: summary['head']['seconds']
  assert seconds(summary) > 0
  assert summary['head'] == whole(kind)[0]['head'] | {'seconds': seconds(summary)}


def test_a_run_that_is_made_longer_does_not_fit_again():
  store = SimpleNamespace(meta={}, stored={'head': {'round': 3}})
  events = lambda **changes: student_head.events(
      SimpleNamespace(store=store), None, resolve(config(**changes)), None)
  assert [index for index, _ in events()] == [3]
  assert [index for index, _ in events(student__head_round=4)] == [4]
  assert store.meta['head'] == {'round': 3}
  assert not events(kind='random')


@pytest.mark.exhaustive
def test_images_on_the_host_fit_the_same_head(tmp_path):
  make = lambda place: toy_runs.config(
      distill__rounds=2, buffer=place, student__head_init='ridge', student__head_images=19)
  on_host, on_device = (observed(make(place), tmp_path / place)[2][0]
                        for place in ('host', 'device'))
  assert equal(on_host.params, on_device.params)


def test_only_the_part_of_the_layers_is_reset_in_any_optimizer():
  """Also where a layer of the backbone has the name of the head, and labels are keys."""
  params = {'fc': {'kernel': np.ones((3, 2), np.float32), 'bias': np.ones(2, np.float32)},
            'block': {'fc': {'kernel': np.ones((4, 3), np.float32)}}}
  network = models.bind(nn.Dense(2), {'params': params})
  labels = {'fc': 'fc', 'block': 'other'}
  tx = optax.partition({'fc': optax.adam(0.1), 'other': optax.lamb(0.1)}, labels)
  student = distill.init(network, tx)
  student = student.replace(opt_state=jax.tree.map(lambda leaf: leaf + 3, student.opt_state))
  layers = {'fc': {'kernel': np.full((3, 2), 5.0), 'bias': np.full(2, 6.0)}}
  new = distill.replace_layers(student, layers, tx)
  assert new.network.params['fc']['kernel'].dtype == np.float32
  assert equal(new.network.params['block'], params['block'])
  changed = []
  jax.tree.map_with_path(lambda path, old, new: changed.append(jax.tree_util.keystr(path))
                         if not equal(old, new) else None, student.opt_state, new.opt_state)
  assert len(changed) == 4  # Both moments of both arrays.
  assert all("['fc']" in path and "['block']" not in path and '.count' not in path
             for path in changed)


def test_adam_takes_steps_of_its_rate_after_the_layers_are_replaced():
  """Moments of zero with the old count would give steps of 3.2 times the rate."""
  params = {name: {'kernel': np.full((2, 3), 0.5, np.float32)} for name in ('conv', 'fc')}
  section = resolve(toy_runs.config(
      optimizer__name='adam', optimizer__learning_rate=0.01, optimizer__weight_decay=0.0,
      optimizer__schedule='constant')).optimizer
  grads = jax.tree.map(np.ones_like, params)
  for replaced in (('fc',), ()):
    tx = build.optimizer(section, 9, 5, replaced)
    student = distill.init(models.bind(nn.Dense(2), {'params': params}), tx)
    for _ in range(30):
      _, opt_state = tx.update(grads, student.opt_state, params)
      student = student.replace(opt_state=opt_state)
    new = distill.replace_layers(student, {'fc': {'kernel': np.zeros((2, 3))}}, tx)
    updates, _ = tx.update(grads, new.opt_state, new.network.params)
    np.testing.assert_allclose(updates['conv']['kernel'], -0.01, rtol=1e-3)
    factor = 1 if replaced else 0.1 / (1 - 0.9**31) / np.sqrt(0.001 / (1 - 0.999**31))
    np.testing.assert_allclose(updates['fc']['kernel'], -0.01 * factor, rtol=1e-3)


class Plain(nn.Module):
  num_classes: int
  dtype: type | None = None

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.num_classes)(x.mean((1, 2)))


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(kind='spline', student__head_width=None),
     "student.head_width is None, must be a number of units: 'spline'"),
    (dict(kind='random_features', student__head_width=None), 'student.head_width is None, must be'),
    (dict(kind='spline', student__head_width=9), 'student.head_width is 9, must be at least 10'),
    (dict(kind='spline', student__head_width=0), 'student.head_width is 0, must be a whole number'),
    (dict(kind='spline', student__head_images=7), 'student.head_images is 7, must be above 7'),
    (dict(kind='random_features', student__head_images=14), 'must be above 14, the terms'),
    (dict(student__head_width=None, student__head_images=4),
     'student.head_images is 4, must be above 4'),
    (dict(student__head_round=5), r'student.head_round is 5, must be in \[1, 5\)'),
    (dict(student__head_round=1, distill__distill_after=3),
     r'student.head_round is 1, must be in \[3, 5\)'),
    (dict(student__head_init='splines'), "student.head_init is 'splines'.*Did you mean 'spline'"),
    (dict(job='train'), "student.head_init is 'ridge', must be 'random' where job is 'train'"),
    (dict(student__name='plain', student__head_width=None),
     "must be 'random': Plain does not name a dense layer"),
])
def test_a_head_that_cannot_be_fitted_costs_a_line(tmp_path, monkeypatch, changes, message):
  monkeypatch.setitem(models._MODELS, 'plain', Plain)
  made = config(**changes)
  if made.student.name == 'plain':
    made.student.options = {}
  with pytest.raises(InvalidError, match=message) as error:
    train.check(made, Start(str(tmp_path / 'run')))
  line, = error.value.problems
  assert '\n' not in line


def test_the_head_is_fitted_after_a_quarter_of_the_rounds_with_student_steps():
  for rounds, after, first in ((220, 20, 70), (5, 1, 2), (2, 0, 1), (3, 2, 2)):
    settings = resolve(config(distill__rounds=rounds, distill__distill_after=after))
    assert fit_round(settings.head, settings.distill) == first
