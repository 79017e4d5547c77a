"""The contract of all methods. A new file in synth/methods is picked up without an edit here.

A method may leave out `weigh`, `fresh`, `generator` and `with_generator`, any argument but
`image_shape`, and all metrics. It refuses a task, or a moving average, by a FieldError about it.
"""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from method_runs import ALIKE

from dfkd_jax import augment, synth, tasks
from dfkd_jax.messages import FieldError
from dfkd_jax.synth import host_replay, methods
from dfkd_jax.types import Batch

NAMES = synth.names()
SAMPLES = 6
CLASSES, PIXELS = tasks.classification(toys.CLASSES), tasks.segmentation(toys.CLASSES)
KINDS = {  # One class an image, and one a pixel; and the generator with its moving average.
    'classification': (CLASSES, toys.teacher, toys.student, {}),
    'dense': (PIXELS, toys.dense_teacher, toys.dense_student, {}),
    'averaged': (CLASSES, toys.teacher, toys.student, {'ema_decay': 0.75})}


def networks(kind):
  return tuple(network() for network in KINDS[kind][1:3])


def create(name, kind='classification', **changes):
  """A method from whatever of these arguments it takes."""
  taken = synth.parameters(name)
  factors = synth.Factors(
      one_hot=1.0, batch_norm=1.0, adversarial=0.5,
      contrast=0.5 if 'contrast_temperature' in taken else 0.0)
  at_hand = {
      'generator': toys.generator(), 'image_shape': toys.IMAGE, 'task': KINDS[kind][0],
      'num_classes': toys.CLASSES, 'factors': factors, 'num_steps': 2, 'latent_dim': 7,
      'batch_size': 4, 'sample_batch_size': SAMPLES, 'capacity': 8, 'augment': augment.flip,
      'bank_size': 6, 'num_negatives': 3, 'projection_size': 5, **KINDS[kind][3], **changes}
  return synth.create(name, **{key: value for key, value in at_hand.items() if key in taken})


def refusal(name, kind):
  """The error by which a method refuses a kind of task or a moving average; else None."""
  try:
    create(name, kind)
  except FieldError as error:
    return error if error.field in ('task', 'ema_decay') else None
  return None


def serves(name, kind):
  """Whether the method takes this kind, and has a generator where one is to be averaged."""
  return KINDS[kind][3].keys() <= set(synth.parameters(name)) and refusal(name, kind) is None


PAIRS = [(name, kind) for name in NAMES for kind in KINDS if serves(name, kind)]


def for_each(*seldom):
  """Parametrizes by `PAIRS`; kinds of `seldom`, and of methods in `ALIKE`, are exhaustive."""
  is_further = lambda name, kind: kind in seldom or (name in ALIKE and kind != 'classification')
  return pytest.mark.parametrize(('name', 'kind'), [
      pytest.param(*pair, marks=pytest.mark.exhaustive) if is_further(*pair) else pair
      for pair in PAIRS])


each = for_each()
each_method = pytest.mark.parametrize('name', NAMES)


@functools.cache
def programs(name, kind):
  """The functions of a method, compiled once for all tests."""
  method = create(name, kind)
  # Programs of one function share a cache, as with the default `weigh`; a partial has its own.
  compiled = lambda function: function and toys.jit(functools.partial(function))
  return method._replace(**{field: compiled(getattr(method, field)) for field in (
      'init', 'synthesize', 'sample', 'weigh', 'fresh')})


@functools.cache
def rounds(name, kind):
  """Three rounds: the states after each part, the batches, the weights and the metrics."""
  method, (teacher, student) = programs(name, kind), networks(kind)
  state = method.init(jax.random.key(0), teacher)
  states, batches, weights, metrics = [state], [], [], []
  for index in range(3):
    state, found = method.synthesize(state, jax.random.key(10 + index), teacher, student)
    batch = method.sample(state, jax.random.key(20 + index))
    states.append(state)
    state, weighed = method.weigh(state, batch, jnp.linspace(0.1, 2.0, SAMPLES))
    states.append(state)
    batches.append(batch)
    weights.append(weighed)
    metrics.append(found)
  return states, batches, weights, metrics


def shapes(tree):
  """Structure, shapes, dtypes and weak types; a change of any compiles the program again."""
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def equal(tree, other):
  return all(jax.tree.leaves(jax.tree.map(
      lambda a, b: np.array_equal(a, b, equal_nan=True), tree, other)))


def test_methods_are_the_files():
  folder = pathlib.Path(methods.__file__).parent
  assert set(NAMES) == {path.stem for path in folder.glob('*.py')} - {'__init__'}
  assert {'fast_dfkd', 'ssd_kd', 'noise'} <= set(NAMES)


def test_the_shipped_methods_refuse_little():
  """NAYER has no dense task, CMI no generator that lasts; both say so in one line."""
  refused = {(name, kind): str(refusal(name, kind)) for name in NAMES for kind in KINDS
             if refusal(name, kind)}
  assert 'no classes to ask for' in refused['nayer', 'dense']
  assert 'ema_decay is 0.75, must be None' in refused['cmi', 'averaged']
  assert not any('\n' in line for line in refused.values())
  averaged = {'cu_dfkd', 'dafl', 'dfad', 'dfq', 'fast_dfkd', 'nayer', 'ssd_kd', 'zskt'}
  assert averaged <= {name for name, kind in PAIRS if kind == 'averaged'}


@each
def test_state_keeps_its_structure(name, kind):
  states, *_ = rounds(name, kind)
  for state in states[1:]:
    assert jax.tree.structure(state) == jax.tree.structure(states[0])
    assert shapes(state) == shapes(states[0])


@each
def test_state_holds_neither_keys_nor_the_teacher(name, kind):
  states, *_ = rounds(name, kind)
  kernel = max(jax.tree.leaves(networks(kind)[0].params), key=jnp.size)
  for leaf in jax.tree.leaves(states[-1]):
    assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    assert leaf.shape != kernel.shape or not np.array_equal(leaf, kernel)


@each
def test_samples(name, kind):
  _, batches, weights, _ = rounds(name, kind)
  for batch, weighed in zip(batches, weights, strict=True):
    assert isinstance(batch, Batch)
    assert batch.images.shape == (SAMPLES, *toys.IMAGE)
    assert batch.images.dtype == jnp.float32
    assert (batch.labels.shape, batch.labels.dtype) == ((SAMPLES,), jnp.int32)
    assert (batch.slots.shape, batch.slots.dtype) == ((SAMPLES,), jnp.int32)
    assert float(batch.images.min()) >= 0
    assert float(batch.images.max()) <= 1
    assert float(batch.images.std()) > 1e-3
    assert int(batch.labels.min()) >= -1
    assert int(batch.labels.max()) < toys.CLASSES
    assert weighed.shape == (SAMPLES,)
    assert jnp.issubdtype(weighed.dtype, jnp.floating)
    assert np.isfinite(weighed).all()
    assert float(weighed.min()) >= 0


@each
def test_metrics_are_finite_and_keep_their_names(name, kind):
  *_, metrics = rounds(name, kind)
  for found in metrics:
    assert found.keys() == metrics[0].keys()
    assert all(leaf.ndim == 1 and np.isfinite(leaf).all() for leaf in found.values())


@each
def test_each_program_is_compiled_once(name, kind):
  rounds(name, kind)
  assert [function._cache_size() for function in programs(name, kind)[:4]] == [1, 1, 1, 1]


@each
def test_same_key_same_result(name, kind):
  method, (states, *_) = programs(name, kind), rounds(name, kind)
  call = lambda seed: method.synthesize(states[0], jax.random.key(seed), *networks(kind))
  draw = lambda state, seed: method.sample(state, jax.random.key(seed))
  (state, metrics), again, (other, _) = call(10), call(10), call(11)
  assert equal((state, metrics), again)
  assert equal(state, states[1])
  assert equal(draw(state, 3), draw(state, 3))
  assert not np.array_equal(draw(state, 3).images, draw(state, 4).images)
  # Noise draws nothing before `sample`; what synthesizes, synthesizes something else.
  assert equal(state, other) == (not metrics)


@each
def test_teacher_and_student_stay_as_they_are(name, kind):
  """Not even donated: the arrays are read again, and hold what they held."""
  method = programs(name, kind)
  given = networks(kind)
  before = jax.tree.map(np.array, given)
  state = method.init(jax.random.key(1), given[0])
  jax.block_until_ready(method.synthesize(state, jax.random.key(2), *given))
  assert equal(before, given)


@each
def test_fresh_images_are_new_and_need_neither_student_nor_buffer(name, kind):
  method, (states, batches, *_) = programs(name, kind), rounds(name, kind)
  teacher, student = networks(kind)
  state = host_replay.strip_images(states[-1])
  batch = method.fresh_images(state, jax.random.key(5), teacher, student)
  assert batch.images.shape[1:] == toys.IMAGE
  assert (batch.labels.shape, batch.slots.tolist()) == (
      (len(batch.images),), [-1] * len(batch.images))
  assert float(batch.images.min()) >= 0
  assert float(batch.images.max()) <= 1
  assert equal(batch, method.fresh_images(state, jax.random.key(5), teacher, student))
  other = method.fresh_images(state, jax.random.key(6), teacher, student)
  assert not np.array_equal(batch.images, other.images)
  seen = {image.tobytes() for drawn in batches for image in np.asarray(drawn.images)}
  assert not seen & {image.tobytes() for image in np.asarray(batch.images)}
  alone = method.fresh_images(state, jax.random.key(5), teacher)
  assert alone.images.shape == batch.images.shape


@each
def test_a_generator_can_be_taken_over(name, kind):
  method, (states, *_) = programs(name, kind), rounds(name, kind)
  state, variables = states[-1], method.generator(states[-1])
  if variables is None:
    assert method.with_generator(state, {'params': {}}) is state
    return
  assert {'params'} <= variables.keys() <= {'params', 'batch_stats'}
  other = jax.tree.map(lambda leaf: 0.5 * leaf, variables)
  changed = method.with_generator(state, other)
  assert shapes(changed) == shapes(state)
  assert equal(method.generator(changed), other)
  assert not equal(method.generator(state), other)


@for_each('averaged')
def test_objective_falls(name, kind):
  """Without an adversary, on a random teacher, the last step of call 5 beats the very first."""
  if 'loss' not in rounds(name, kind)[-1][0]:
    pytest.skip(f'{name} minimises nothing.')
  rates = dict(generator_lr=1e-2, latent_lr=1e-2, num_steps=15)
  method = create(
      name, kind, factors=synth.Factors(one_hot=1.0, batch_norm=1.0), augment=augment.identity,
      generator=toys.package_generator(), **rates)
  teacher, student = networks(kind)
  state = toys.jit(method.init)(jax.random.key(0), teacher)
  synthesize, losses = toys.jit(method.synthesize), []
  for index in range(5):
    state, metrics = synthesize(state, jax.random.key(index), teacher, student)
    losses.append(np.asarray(metrics['loss']))
  assert np.mean(losses[-1][-3:]) < 0.7 * losses[0][0]


@each_method
def test_an_unknown_argument_is_named(name):
  with pytest.raises(ValueError, match=f"Unknown argument of {name} 'no_such_number'"):
    synth.create(name, no_such_number=1)


HEAVY = (
    'tensorflow', 'tensorflow_datasets', 'ml_collections', 'dfkd_jax.data', 'dfkd_jax.config',
    'configs')
PROBE = """
import sys
import dfkd_jax.synth as synth
import dfkd_jax.distill
for name in synth.names():
  synth.parameters(name)
print(*sorted(name for name in sys.modules if name.split('.')[0] == 'dfkd_jax'))
print(*sorted(set(%r) & set(sys.modules)))
"""


def test_the_library_imports_alone():
  """Without data sets, configs and flags; only Flax and Optax may import absl for themselves."""
  found = subprocess.run(
      [sys.executable, '-c', PROBE % (HEAVY,)], capture_output=True, text=True, check=True)
  ours, heavy = found.stdout.splitlines()
  assert heavy == ''
  assert {'dfkd_jax.synth.methods.fast_dfkd', 'dfkd_jax.losses.inversion',
          'dfkd_jax.parallel'} <= set(ours.split())
  root = pathlib.Path(synth.__file__).parents[1]
  for module in ours.split():
    path = root.joinpath(*module.split('.')[1:])
    source = (path / '__init__.py' if path.is_dir() else path.with_suffix('.py')).read_text()
    assert not {line.split('.')[0] for line in imports(source)} & {
        'absl', 'ml_collections', 'tensorflow'}, module


def imports(source):
  """Modules that a file imports, wherever it does."""
  for line in source.splitlines():
    words = line.split()
    if len(words) > 1 and words[0] in ('import', 'from'):
      yield words[1]
