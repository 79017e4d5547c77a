"""Generators that last: a step by hand, and equalities between tasks, steps and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from dfkd_jax import parallel, synth, tasks
from dfkd_jax.losses import divergence
from dfkd_jax.models import layers
from dfkd_jax.synth import Factors, generators

LATENTS = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
FACTORS = Factors(one_hot=0.5, batch_norm=2.0, adversarial=1.5, balance=3.0, activation=0.25)
NUMBERS = dict(image_shape=toys.IMAGE, task=tasks.classification(toys.CLASSES), latent_dim=7,
               batch_size=4, sample_batch_size=6)


def method(**changes):
  return synth.create('dfq', **{
      'generator': toys.generator(), 'factors': FACTORS, **NUMBERS, **changes})


@functools.cache
def start():
  """The first state of all these methods: it depends on the generator alone."""
  with jax.enable_x64(False):  # Whoever asks first.
    # Make it here: a first call inside a traced program would keep tracers.
    toys.student()
    return toys.jit(method().init)(jax.random.key(0), toys.teacher())


def called(made, calls=1, state=None):
  """The state before and after each call, and the metrics of each; one program for all calls."""
  state = start() if state is None else state
  synthesize = toys.jit(made.synthesize)
  states, metrics = [state], []
  for index in range(calls):
    state, found = synthesize(state, jax.random.key(10 + index), toys.teacher(), toys.student())
    states.append(state)
    metrics.append(found)
  assert synthesize._cache_size() == 1
  return states, metrics


def gradient(state):
  """From Adam's first moment, which after one update of a fresh optimizer is 1 - b1 = 1/2 of it."""
  return jax.tree.map(lambda mu: 2 * mu, optax.tree_utils.tree_get(state.opt_state, 'mu'))


def assert_close(tree, other, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other)


def apart(tree, other):
  return max(jax.tree.leaves(jax.tree.map(
      lambda a, b: float(np.abs(np.asarray(a) - b).max()), tree, other)))


@functools.cache
def fixed():
  """Two calls on the same latents."""
  return called(method(sample_latents=lambda *_: LATENTS), calls=2)


@toys.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def by_hand(params):
  """The loss of one step written out, its images, the moments in the generator's batch norms."""
  with layers.capture_moments():
    images, found = toys.generator().apply(
        {'params': params}, LATENTS, train=True, mutable=['batch_stats', 'intermediates'])
  outputs, running = toys.teacher()(images), toys.teacher().running()
  batch_norm = sum(
      jnp.linalg.norm(outputs.moments[path].mean - running[path].mean)
      + jnp.linalg.norm(outputs.moments[path].var - running[path].var) for path in running)
  p = jax.nn.softmax(outputs.logits)
  one_hot = -jnp.log(p.max(1)).mean()
  mean = p.mean(0)
  terms = {
      'one_hot': one_hot, 'batch_norm': batch_norm, 'balance': (mean * jnp.log(mean)).sum(),
      'adversarial': -divergence.kl(toys.student()(images).logits, outputs.logits).mean(),
      'activation': -jnp.abs(outputs.features).mean()}
  loss = sum(getattr(FACTORS, name) * term for name, term in terms.items())
  captures = layers.captures_by_path(found['intermediates'])
  return loss, (terms, {path: capture.moments for path, capture in captures.items()})


def test_two_calls_by_hand():
  """The gradient of the weighted sum, by a lasting Adam; running moments move by a tenth."""
  (begin, first, second), metrics = fixed()
  (loss, (terms, moments)), grads = by_hand(begin.params)
  assert_close(
      metrics[0], jax.tree.map(lambda term: term[None], {'loss': loss, **terms}), rtol=1e-4)
  distances = toys.distances(gradient(first), grads)
  # A batch norm follows Dense_0, so only rounding is left of the gradient of its bias's mean.
  assert max(distances.values()) < 1e-3, distances
  biased = {path: (0.1 * found.mean, 0.9 + 0.1 * found.var) for path, found in moments.items()}
  for path, (mean, var) in biased.items():
    np.testing.assert_allclose(first.batch_stats[path]['mean'], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first.batch_stats[path]['var'], var, rtol=1e-4)

  (loss, (terms, moments)), grads = by_hand(first.params)
  np.testing.assert_allclose(metrics[1]['loss'], [loss], rtol=1e-4)
  mu = optax.tree_utils.tree_get(second.opt_state, 'mu')
  expected = jax.tree.map(lambda old, new: 0.25 * old + 0.5 * new, gradient(first), grads)
  assert max(toys.distances(mu, expected).values()) < 1e-3
  for path, found in moments.items():
    np.testing.assert_allclose(
        second.batch_stats[path]['var'], 0.9 * biased[path][1] + 0.1 * found.var, rtol=1e-4)
  assert [int(state.step) for state in (begin, first, second)] == [0, 1, 2]


def test_the_first_running_moments_are_biased():
  """By numpy, from the dense layer that feeds the first batch norm."""
  (begin, first, _), _ = fixed()
  dense, stats = begin.params['Dense_0'], first.batch_stats['BatchNorm_0']
  fed = LATENTS @ np.asarray(dense['kernel']) + np.asarray(dense['bias'])
  fed = fed.reshape(-1, stats['mean'].size)
  np.testing.assert_allclose(stats['mean'], 0.1 * fed.mean(0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * fed.var(0), rtol=1e-4)


def test_adam_goes_on_from_call_to_call():
  """A first step moves each number by the rate; later ones remember."""
  (begin, first, second), _ = fixed()
  clear = jax.tree.map(lambda g: np.abs(g) > 1e-3, gradient(first))
  moved = jax.tree.map(lambda a, b, c: np.abs(a - b)[c], first.params, begin.params, clear)
  np.testing.assert_allclose(np.concatenate(jax.tree.leaves(moved)), 1e-3, rtol=1e-2)
  # By hand from the two moments, with b1 0.5 and b2 0.999.
  mu, nu, count = (optax.tree_utils.tree_get(second.opt_state, name)
                   for name in ('mu', 'nu', 'count'))
  assert int(count) == 2
  step = jax.tree.map(
      lambda m, n: -1e-3 * (m / 0.75) / (np.sqrt(n / (1 - 0.999**2)) + 1e-8), mu, nu)
  assert_close(jax.tree.map(jnp.subtract, second.params, first.params), step, atol=1e-6)


def test_the_rate_may_follow_a_schedule():
  """Of the generator's steps, two in a call: the second call has the rate 0."""
  made = method(generator_lr=lambda step: jnp.where(step < 2, 1e-3, 0.0), num_steps=2)
  (begin, first, second), _ = called(
      made, 2, toys.jit(made.init)(jax.random.key(0), toys.teacher()))
  assert apart(begin.params, first.params) > 1e-4
  assert_close(first.params, second.params, rtol=0)


@functools.cache
def drawn():
  """By `sample_by` and number of latents: images by the generator and by other running moments."""
  state = fixed()[0][-1]
  other = state.replace(batch_stats=jax.tree.map(lambda leaf: leaf + 0.5, state.batch_stats))
  found = {}
  for sample_by in ('running', 'batch'):
    made = method(sample_by=sample_by, sample_batch_size=4, sample_latents=lambda *_: LATENTS)
    sample = toys.jit(made.sample)
    found[sample_by] = [sample(of, jax.random.key(0)) for of in (state, other)]
  return found


def test_samples_by_running_moments():
  state, (batch, other) = fixed()[0][-1], drawn()['running']
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  alone = toys.jit(lambda z: toys.generator().apply(variables, z, train=False))
  np.testing.assert_allclose(batch.images, alone(LATENTS), atol=1e-6)
  # Independent of the images beside them.
  np.testing.assert_allclose(batch.images[1:3], alone(LATENTS[1:3]), atol=1e-6)
  assert apart(batch.images, other.images) > 1e-2
  np.testing.assert_array_equal(batch.slots, [-1] * 4)
  np.testing.assert_array_equal(batch.labels, [-1] * 4)


def test_samples_by_the_moments_of_their_batch():
  batch, other = drawn()['batch']
  np.testing.assert_array_equal(batch.images, other.images)
  rendered = toys.jit(lambda params: generators.render(toys.generator(), params, LATENTS))(
      fixed()[0][-1].params)
  np.testing.assert_allclose(batch.images, rendered, atol=1e-6)
  assert apart(batch.images, drawn()['running'][0].images) > 1e-2


@functools.cache
def single_task():
  """One task of the latents of a key, as `num_tasks` tasks hand them out."""

  @toys.jit
  def single(state, key_latents):
    made = method(sample_latents=lambda _, shape: jax.random.normal(key_latents, shape))
    return made.synthesize(state, jax.random.key(99), toys.teacher(), toys.student())

  return single


@pytest.mark.parametrize('task_map', ['vmap', 'map'])
def test_three_tasks_are_the_average_of_three(task_map):
  whole = method(num_tasks=3, task_map=task_map)
  with jax.debug_key_reuse(False):  # Which takes the keys of a scan under vmap for used.
    together, metrics = toys.jit(whole.synthesize)(
        start(), jax.random.key(5), toys.teacher(), toys.student())
    of_step = jax.random.split(jax.random.split(jax.random.key(5), 1)[0], 1)[0]
    found = [single_task()(start(), key) for key in parallel.task_keys(of_step, 3, None)]
  states = [state for state, _ in found]
  mean = lambda of: jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *of)
  distances = toys.distances(gradient(together), mean(list(map(gradient, states))))
  assert max(distances.values()) <= 1e-4, distances
  assert_close(metrics, mean([metrics for _, metrics in found]), rtol=1e-5, atol=1e-6)
  assert_close(
      together.batch_stats, mean([state.batch_stats for state in states]), rtol=1e-5, atol=1e-6)
  # The gradients differ from task to task, or the average would show nothing.
  assert apart(gradient(states[0]), gradient(states[1])) > 1e-2
  assert int(optax.tree_utils.tree_get(together.opt_state, 'count')) == 1


@functools.cache
def two_steps():
  """(state, rate, spread) -> the state after a call of two steps, and metrics.

  The latents are LATENTS plus draws of that spread.
  """

  @toys.jit
  def call(state, rate, spread):
    draw = lambda key, shape: LATENTS + spread * jax.random.normal(key, shape)
    made = method(num_steps=2, generator_lr=rate, sample_latents=draw)
    return made.synthesize(state, jax.random.key(10), toys.teacher(), toys.student())

  return call


def test_a_call_of_two_steps_is_two_calls_but_for_their_count():
  (*_, twice), metrics = fixed()
  once, both = two_steps()(start(), 1e-3, 0.0)
  assert_close(once.replace(step=twice.step), twice, rtol=1e-4, atol=5e-5)  # A step moves by 1e-3.
  assert_close(both, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *metrics), rtol=1e-4)
  assert (int(once.step), int(twice.step)) == (1, 2)
  assert both['loss'][0] != both['loss'][1]


def test_each_step_draws_its_own_latents():
  """At rate 0 nothing else could change the loss."""
  alike, apiece = (two_steps()(start(), 0.0, spread)[1]['loss'] for spread in (0.0, 1.0))
  np.testing.assert_allclose(alike[0], alike[1], rtol=1e-5)
  assert abs(apiece[0] - apiece[1]) > 1e-2


def on_devices(size, **changes):
  """State, metrics and samples of two calls of four tasks in all."""
  mesh, one = parallel.make_mesh(size), parallel.REPLICATED

  def both(state, key, key_sample, teacher, student, *, axis):
    made = method(
        num_tasks=4 // size, sample_batch_size=8 // size, task_map='map', axis=axis, **changes)
    state, metrics = made.synthesize(state, key, teacher, student)
    return state, metrics, made.sample(state, key_sample).images

  program = toys.jit(parallel.each_device(both, mesh, (one,) * 5, (one, one, parallel.SPREAD)))
  networks = toys.float64(toys.teacher()), toys.float64(toys.student())
  # Scalars are counts.
  state = jax.tree.map(lambda leaf: leaf.astype(float) if leaf.ndim else leaf, start())
  for index in range(2):
    state, *found = program(
        state, jax.random.key(10 + index), jax.random.key(20 + index), *networks)
  return jax.device_get((state, *found))


def test_four_devices_equal_four_tasks(x64):
  """In float64; in float32 Adam turns rounding into steps of the other sign."""
  one, four = (on_devices(size) for size in (1, 4))
  assert_close(four, one, rtol=1e-8, atol=1e-10)
  assert len({image.tobytes() for image in one[-1]}) == 8


def test_a_task_of_pixels():
  """Segmentation: each pixel's class is the one that the teacher sees there."""
  teacher, student = toys.dense_teacher(), toys.dense_student()
  made = method(
      task=tasks.segmentation(toys.CLASSES), factors=FACTORS._replace(activation=0.0), num_steps=2)
  state = start()  # Whatever the teacher.
  images = toys.jit(made.sample)(state, jax.random.key(2)).images
  state, metrics = toys.jit(made.synthesize)(state, jax.random.key(1), teacher, student)
  assert {name: leaf.shape for name, leaf in metrics.items()} == dict.fromkeys(
      ('loss', 'one_hot', 'batch_norm', 'adversarial', 'balance'), (2,))
  assert np.isfinite(list(metrics.values())).all()
  assert metrics['adversarial'].max() < 0 < metrics['one_hot'].min() < np.log(toys.CLASSES)
  assert images.shape == (6, *toys.IMAGE)
  with pytest.raises(
      ValueError, match='The teacher sows no features: the factor activation must be 0'):
    jax.eval_shape(method(task=tasks.segmentation(toys.CLASSES)).init, jax.random.key(0), teacher)


def test_a_generator_of_maps_without_batch_norm():
  """Latents [B, h, w, Z], and nothing to keep running moments of."""
  made = method(generator=toys.Maps(), latent_dim=(12, 8, 2), factors=Factors(one_hot=1.0))
  (begin, state), (metrics,) = called(
      made, state=toys.jit(made.init)(jax.random.key(0), toys.teacher()))
  assert (begin.batch_stats, state.batch_stats) == ({}, {})
  assert np.isfinite(metrics['loss']).all()
  assert apart(begin.params, state.params) > 1e-4
  assert jax.eval_shape(made.sample, state, jax.random.key(1)).images.shape == (6, *toys.IMAGE)
