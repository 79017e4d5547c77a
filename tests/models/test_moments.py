"""Moments of batch norms in modules as others write them: right by hand, or refused by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import linen as nn

from dfkd_jax import models, synth, tasks
from dfkd_jax.losses import inversion
from dfkd_jax.synth.objective import Factors

STACKED = {'params': 0, 'batch_stats': 0, 'intermediates': 0}
WIDTH = 4


class Step(nn.Module):
  """A convolution and its batch norm, as nn.scan calls it."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(WIDTH, (3, 3), name='conv')(x)
    return nn.tanh(nn.BatchNorm(use_running_average=not train, name='bn')(x)), None


class Scanned(nn.Module):
  """Three steps by nn.scan, between a stem and a head."""

  variable_axes: dict
  shared: tuple = ()
  length: int = 3

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(WIDTH, (1, 1), name='stem')(x)
    steps = nn.scan(
        Step, variable_axes=self.variable_axes, variable_broadcast=self.shared, length=self.length,
        split_rngs={'params': 'params' in self.variable_axes}, in_axes=nn.broadcast)
    x, _ = steps(name='blocks')(x, train)
    return nn.Dense(toys.CLASSES, name='head')(x.mean((1, 2)))


class Looped(nn.Module):
  """The same without nn.scan."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(WIDTH, (1, 1), name='stem')(x)
    for i in range(3):
      x, _ = Step(name=f'blocks_{i}')(x, train)
    return nn.Dense(toys.CLASSES, name='head')(x.mean((1, 2)))


class Ensemble(nn.Module):
  """Two of nn.vmap, each of two steps of nn.scan."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(WIDTH, (1, 1), name='stem')(x)
    scanned = nn.scan(
        Step, variable_axes=STACKED, split_rngs={'params': True}, length=2, in_axes=nn.broadcast)
    members = nn.vmap(
        scanned, variable_axes=STACKED, split_rngs={'params': True}, in_axes=None, axis_size=2)
    x, _ = members(name='members')(x, train)
    return nn.Dense(toys.CLASSES, name='head')(x.mean((0, 2, 3)))


class ChannelsFirst(nn.Module):
  """A batch norm over axis 1."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(WIDTH, (3, 3), name='conv')(x).transpose(0, 3, 1, 2)
    x = nn.BatchNorm(use_running_average=not train, axis=1, name='bn')(x)
    return nn.Dense(toys.CLASSES, name='head')(nn.tanh(x).mean((2, 3)))


class Slash(nn.Module):
  """Two batch norms with paths that are equal when joined by slashes."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x, _ = Step(name='a')(x, train)
    x = nn.BatchNorm(use_running_average=not train, name='a/bn')(3 * x + 1)
    return nn.Dense(toys.CLASSES, name='head')(x.mean((1, 2)))


class Twice(nn.Module):
  """One batch norm that is called twice."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    norm = nn.BatchNorm(use_running_average=not train, name='bn')
    return nn.Dense(toys.CLASSES, name='head')(norm(3 * norm(x)).mean((1, 2)))


class OwnNorm(nn.Module):
  """A normalization of one's own beside an nn.BatchNorm."""

  names: tuple[str, str]

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.BatchNorm(use_running_average=not train, name='bn')(x)
    mean, var = (
        self.variable('batch_stats', name, lambda: jnp.ones(x.shape[-1])) for name in self.names)
    x = (x - mean.value) / jnp.sqrt(var.value)
    return nn.Dense(toys.CLASSES, name='head')(x.mean((1, 2)))


class Spectral(nn.Module):
  """Spectral norm, which has batch_stats too, but no moments."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.SpectralNorm(nn.Conv(WIDTH, (3, 3)))(x, update_stats=train)
    x = nn.BatchNorm(use_running_average=not train, name='bn')(x)
    return nn.Dense(toys.CLASSES, name='head')(x.mean((1, 2)))


def network(module, **options):
  """With drawn running moments."""
  return models.bind(module, toys.jit(functools.partial(toys.variables, module=module))(
      jax.random.key(3)), **options)


def images():
  return jax.random.uniform(jax.random.key(1), (6, *toys.IMAGE))


def unrolled(scanned):
  """The network of a loop with the variables of a scan."""
  def unroll(tree):
    tree = dict(tree)
    blocks = tree.pop('blocks')
    return tree | {f'blocks_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(3)}

  return models.bind(Looped(), {
      'params': unroll(scanned.params), 'batch_stats': unroll(scanned.batch_stats)})


@pytest.mark.parametrize('train', [False, True])
def test_layers_of_a_scan_are_those_of_a_loop(train):
  scanned = network(Scanned(STACKED))
  looped = unrolled(scanned)
  ours, theirs = (
      toys.jit(functools.partial(of.forward, train=train))(images())[0] for of in (scanned, looped))
  np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
  assert list(ours.moments) == list(scanned.running()) == [f'blocks/bn/{i}' for i in range(3)]
  assert list(ours.pooled) == list(ours.moments)
  for i in range(3):
    for one, other in ((ours.moments, theirs.moments), (ours.pooled, theirs.pooled),
                       (scanned.running(), looped.running())):
      jax.tree.map(
          functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
          one[f'blocks/bn/{i}'], other[f'blocks_{i}/bn'])
  scanned.check_moments(ours.moments)
  for term in (inversion.batch_norm, inversion.relative_batch_norm):
    expected = term(theirs.moments, looped.running())
    np.testing.assert_allclose(term(ours.moments, scanned.running()), expected, rtol=1e-4)
  # Unlike a norm over all layers together, which would be smaller.
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *theirs.moments.values())
  running = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped.running().values())
  together = inversion.batch_norm({'all': stacked}, {'all': running})
  assert together < 0.9 * inversion.batch_norm(ours.moments, scanned.running())


def test_a_scan_may_train_on_several_devices():
  scanned, half = network(Scanned(STACKED)), images().reshape(2, 3, *toys.IMAGE)
  whole, stats = toys.jit(functools.partial(scanned.forward, train=True))(images())
  split, split_stats = toys.jit(jax.vmap(
      functools.partial(scanned.forward, train=True, axis='data'), axis_name='data'))(half)
  for path, moments in whole.moments.items():
    np.testing.assert_allclose(split.moments[path].var[1], moments.var, rtol=1e-4, atol=1e-6)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-6), split_stats, stats)


def test_scans_within_a_vmap_have_one_entry_for_each_layer():
  ensemble = network(Ensemble())
  outputs = toys.jit(ensemble)(images())
  paths = [f'members/bn/{member}/{step}' for member in range(2) for step in range(2)]
  assert list(outputs.moments) == list(ensemble.running()) == paths
  ensemble.check_moments(outputs.moments)
  # The first step of each member sees the stem's maps, through its own convolution.
  stem = nn.Conv(WIDTH, (1, 1)).apply({'params': ensemble.params['stem']}, images())
  for member in range(2):
    kernel = jax.tree.map(lambda leaf, at=member: leaf[at, 0], ensemble.params['members']['conv'])
    inputs = np.asarray(nn.Conv(WIDTH, (3, 3)).apply({'params': kernel}, stem), np.float64)
    moments = outputs.moments[f'members/bn/{member}/0']
    np.testing.assert_allclose(moments.mean, inputs.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moments.var, inputs.var((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(
        ensemble.running()[f'members/bn/{member}/1'].var,
        ensemble.batch_stats['members']['bn']['var'][member, 1])


@pytest.mark.parametrize('train', [False, True])
def test_moments_are_of_the_axis_that_a_batch_norm_has(train):
  first = network(ChannelsFirst())
  outputs, stats = toys.jit(functools.partial(first.forward, train=train))(images())
  conv = nn.Conv(WIDTH, (3, 3)).apply({'params': first.params['conv']}, images())
  inputs = np.asarray(conv, np.float64)
  moments = outputs.moments['bn']
  np.testing.assert_allclose(moments.mean, inputs.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(moments.var, inputs.var((0, 1, 2)), rtol=1e-4)
  np.testing.assert_allclose(outputs.pooled['bn'], inputs.mean((1, 2)), rtol=1e-4, atol=1e-6)
  if train:
    half = images().reshape(2, 3, *toys.IMAGE)
    split, split_stats = toys.jit(jax.vmap(
        functools.partial(first.forward, train=True, axis='data'), axis_name='data'))(half)
    np.testing.assert_allclose(
        split.logits.reshape(6, -1), outputs.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(split_stats['bn']['mean'][0], stats['bn']['mean'], rtol=1e-4)


def test_batch_norms_with_slashes_in_their_names_are_told_apart():
  both = network(Slash())
  outputs = toys.jit(both)(images())
  both.check_moments(outputs.moments)
  assert len(outputs.moments) == len(both.running()) == 2
  inner, outer = sorted(outputs.moments)
  np.testing.assert_array_equal(both.running()[inner].mean, both.batch_stats['a']['bn']['mean'])
  np.testing.assert_array_equal(both.running()[outer].mean, both.batch_stats['a/bn']['mean'])
  assert outputs.moments[inner].mean.shape == outputs.moments[outer].mean.shape
  inputs = np.asarray(nn.Conv(WIDTH, (3, 3)).apply({'params': both.params['a']['conv']}, images()))
  np.testing.assert_allclose(outputs.moments[inner].mean, inputs.mean((0, 1, 2)), rtol=1e-4)


UNCAPTURED = {
    'a scan without intermediates': (Scanned({'params': 0, 'batch_stats': 0}), 'blocks/bn/0'),
    'a scan along another axis': (Scanned({name: 1 for name in STACKED}), 'blocks/bn/0'),
    'as many layers as channels': (
        Scanned(STACKED | {'intermediates': 1}, length=WIDTH), 'blocks/bn/0'),
    'running moments along another axis': (
        Scanned(STACKED | {'batch_stats': 1}), 'blocks/bn/0'),
    'one batch norm for all steps': (
        Scanned({'intermediates': 0}, ('params', 'batch_stats')), 'blocks/bn'),
    'an own norm': (OwnNorm(('mean', 'var')), ''),
    'an own norm of other names': (OwnNorm(('moving_mean', 'moving_variance')), ''),
    'two calls': (Twice(), 'bn/call 2'),
}


@pytest.mark.parametrize('case', UNCAPTURED)
def test_what_is_not_captured_is_refused_by_name(case):
  module, path = UNCAPTURED[case]
  teacher = network(module)
  outputs = jax.eval_shape(teacher, images())
  with pytest.raises(ValueError, match=f"{path!r}.*nn.BatchNorm") as error:
    teacher.check_moments(outputs.moments)
  assert len(str(error.value).splitlines()) == 1
  assert ("variable_axes={'params': 0, 'batch_stats': 0, 'intermediates': 0}" in str(error.value)
          ) == (case != 'two calls')
  if case != 'an own norm of other names':
    with pytest.raises(ValueError, match='moments only'):
      inversion.batch_norm(outputs.moments, teacher.running())


def test_spectral_norm_has_no_moments():
  teacher = network(Spectral())
  assert list(teacher.running()) == ['bn']
  teacher.check_moments(jax.eval_shape(teacher, images()).moments)


@pytest.mark.parametrize('method', ['fast_dfkd', 'dfq', 'deep_inversion'])
def test_methods_refuse_such_a_teacher_when_they_begin(method):
  """Unless no term of theirs matches moments."""
  teacher = network(Scanned({'params': 0, 'batch_stats': 0}))
  options = dict(batch_size=4, num_steps=1)
  if method != 'dfq':
    options |= dict(capacity=8)
  if method != 'deep_inversion':
    options |= dict(generator=toys.generator(), latent_dim=7, sample_batch_size=4)
  for terms in ({'batch_norm': 1.0}, {'relative_batch_norm': 1.0}, {}):
    made = synth.create(
        method, image_shape=toys.IMAGE, task=tasks.classification(toys.CLASSES),
        factors=Factors(one_hot=1.0, **terms), **options)
    init = functools.partial(jax.eval_shape, made.init, jax.random.key(0), teacher)
    if terms:
      with pytest.raises(ValueError, match=r"'blocks/bn/0'.*'intermediates': 0"):
        init()
    else:
      init()


class Heads(nn.Module):
  """Logits among other results."""

  kind: str

  @nn.compact
  def __call__(self, x, train: bool = False):
    x, _ = Step(name='step')(x, train)
    logits = nn.Dense(toys.CLASSES, name='head')(x.mean((1, 2)))
    return {'tuple': (x, logits), 'list': [x, logits], 'dict': {'maps': x, 'out': logits},
            'array': logits}[self.kind]


@pytest.mark.parametrize(('kind', 'entry', 'entries'), [
    ('tuple', 1, r'a tuple with entries \[0, 1\]'), ('list', 1, r'a list with entries \[0, 1\]'),
    ('dict', 'out', r"a dict with entries \['maps', 'out'\]")])
def test_logits_among_other_results_are_named(kind, entry, entries):
  expected = network(Heads('array'))(images()).logits
  np.testing.assert_array_equal(network(Heads(kind), logits=entry)(images()).logits, expected)
  for wrong in (None, 2, 'logits'):
    with pytest.raises(ValueError, match=f'{entries}: .*logits.*, not {wrong!r}') as error:
      jax.eval_shape(network(Heads(kind), logits=wrong), images())
    assert len(str(error.value).splitlines()) == 1


def test_variables_of_other_collections_are_refused():
  variables = toys.variables(jax.random.key(0), Looped())
  with pytest.raises(ValueError, match=r"\['constants', 'state'\].*params and batch_stats"):
    models.bind(Looped(), variables | {'state': {}, 'constants': {}})
