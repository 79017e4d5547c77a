"""Images in host memory: the same run bit for bit as on the devices, from either's checkpoint."""

import functools
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache
from toy_runs import equal, four_tasks

from dfkd_jax import parallel, train
from dfkd_jax.synth import host_replay, replay

SHAPE, K = (3, 2, 1), 4


@pytest.fixture(scope='module', autouse=True)
def optimised():
  """Without optimisations, the same operations may round differently from program to program."""
  kept, least = (
      jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  yield
  jax.config.update('jax_compilation_cache_dir', kept)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', least)
  compilation_cache.reset_cache()


def config(place, **changes):
  """Ten slots, four images a call: in the third of five calls the ring passes its end."""
  return toy_runs.config(**{
      'buffer': place, 'method__capacity': 10,
      'compilation_cache': str(toy_runs.folder() / 'optimised'), **changes})


def assert_same_run(workdir, make=config, **changes):
  """With the images on the devices and on the host; returns the state."""
  found = {place: toy_runs.observed(make(place, **changes), workdir / place)
           for place in ('device', 'host')}
  (summary, state, _), (other, of_host, compiled) = found.values()
  assert isinstance(state.synthesis, type(of_host.synthesis))
  assert equal(state, of_host)
  assert toy_runs.metrics(workdir / 'device') == toy_runs.metrics(workdir / 'host')
  assert (workdir / 'device' / 'images.png').read_bytes() == (
      workdir / 'host' / 'images.png').read_bytes()
  assert summary['student'] == other['student']
  # Without a spread no image could differ.
  assert replay.find_buffer(state.synthesis).images.std() > 1
  return state, compiled


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Both runs: workdir, state, programs compiled by round of that on the host."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, *assert_same_run(workdir)


def test_a_run_is_the_same_bit_for_bit(whole):
  _, state, compiled = whole
  assert int(state.synthesis.buffer.next) == 20 % 10
  assert int(state.synthesis.buffer.size) == 10
  assert [during for during in compiled[2:-1] if during] == []  # Nothing after the first round.


@pytest.mark.exhaustive
def test_the_checkpoint_of_a_place_goes_on_in_the_other(whole, tmp_path, capsys):
  workdir, state, _ = whole
  for place, other in (('device', 'host'), ('host', 'device')):
    toy_runs.stopped(config(place), tmp_path / place, 4)
    capsys.readouterr()
    _, resumed, _ = toy_runs.observed(config(other), tmp_path / place)
    assert 'after round 2' in capsys.readouterr().err
    assert equal(resumed, state)
    assert toy_runs.metrics(tmp_path / place) == toy_runs.metrics(workdir / place)


def test_steps_by_chunks_are_the_same(whole, tmp_path, monkeypatch):
  """Metrics but for the rounding of their means."""
  workdir, state, _ = whole
  monkeypatch.setattr(host_replay, 'CHUNK', 4 * 12 * 8 + 1)
  _, by_one, _ = toy_runs.observed(config('host'), tmp_path)
  assert equal(by_one, state)
  for mine, theirs in zip(
      toy_runs.metrics(tmp_path), toy_runs.metrics(workdir / 'host'), strict=True):
    assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.exhaustive
def test_four_devices_with_two_tasks_each(tmp_path):
  make = lambda place, **changes: four_tasks(
      buffer=place, num_devices=4, method__num_tasks=8, method__capacity=48, **changes)
  state, _ = assert_same_run(tmp_path, make, distill__rounds=2)
  assert state.synthesis.buffer.images.shape == (8, 6, *toy_runs.IMAGE)


@pytest.mark.exhaustive
def test_a_moving_average_of_the_generator_makes_its_half(tmp_path):
  """Of a batch, half comes of no slot."""
  assert_same_run(tmp_path, distill__rounds=2, method__num_tasks=2, method__capacity=20, **{
      'method__ema_decay': 0.9})


@functools.cache
def added(num, away):
  """`replay.add`, compiled once for all examples."""
  del num, away  # By shape.
  return toys.jit(replay.add)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=9),
       st.sampled_from([1, 2]), st.integers(0, 9))
def test_ring_and_draws_are_those_of_the_buffer(sizes, num_tasks, seed):
  images = np.zeros((num_tasks, 7, *SHAPE), np.uint8)
  buffer = replay.create(7, SHAPE, K, num_tasks)
  for index, num in enumerate(sizes):
    values = np.arange(num_tasks * num).reshape(num_tasks, num, 1, 1, 1) + 40 * index
    pushed = jnp.asarray(
        np.broadcast_to(values % 256 / 255 + 1e-4, (num_tasks, num, *SHAPE)), jnp.float32)
    labels = jnp.zeros((num_tasks, num), jnp.int32)
    away = added(num, True)(buffer.replace(images=None), pushed, labels)
    buffer = added(num, False)(buffer, pushed, labels)
    host_replay.write(images, np.asarray(away.added), int(away.next))
    assert equal(buffer, away.replace(images=images, added=None))
  key = jax.random.key(seed)
  batch, without = (replay.sample(jax.random.clone(key), of, 6)
                    for of in (buffer, buffer.replace(images=None)))
  assert without.images is None
  np.testing.assert_array_equal(without.slots, batch.slots)
  found = host_replay.gather(images, np.asarray(without.slots)[None])[0]
  np.testing.assert_array_equal(found, np.round(255 * np.asarray(batch.images)))
  given_back = replay.sample(
      key, replay.with_batch(buffer.replace(images=None), jnp.asarray(found)), 6)
  assert equal(given_back, batch)


def test_each_device_counts_its_slots_from_its_first_stripe():
  """Two devices of two stripes of five slots, three images a stripe; the last is from no slot."""
  images = np.arange(20, dtype=np.uint8).reshape(4, 5, 1, 1, 1)
  slots = np.array([[0, 4, 2, 5, 9, 6, 1, 1, 0, 8, 5, -1]])
  found = host_replay.gather(images, slots)[0, :, 0, 0, 0]
  np.testing.assert_array_equal(found[:11], [0, 4, 2, 5, 9, 6, 11, 11, 10, 18, 15])


@pytest.mark.parametrize(('steps', 'size', 'most', 'wanted'), [
    (12, 10, 120, 12), (12, 10, 119, 6), (12, 10, 50, 4), (12, 10, 9, 1), (7, 10, 69, 1),
    (7, 10, 70, 7)])
def test_chunks_divide_the_steps(steps, size, most, wanted, monkeypatch):
  monkeypatch.setattr(host_replay, 'CHUNK', most)
  assert host_replay.steps_per_chunk(steps, size) == wanted


def test_the_budget_is_what_stays_beside_all_else():
  """10 MB a device: 0.5 MB spared, 1.2 MB stay, the larger program takes 0.5 + 0.3 - 0.1 MB."""
  mesh = parallel.make_mesh(4)
  spread, whole = (jax.sharding.NamedSharding(mesh, spec)
                   for spec in (parallel.SPREAD, parallel.REPLICATED))
  of = lambda shape, dtype, place: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
  images = of((8, 100, 50, 50, 3), jnp.uint8, spread)  # 1.5 MB on each of four devices.
  state = {'network': of((250_000,), jnp.float32, whole),
           'latents': of((8, 25_000), jnp.float32, spread)}
  sizes = lambda *values: types.SimpleNamespace(
      memory_analysis=lambda: types.SimpleNamespace(**dict(zip(
          ('temp_size_in_bytes', 'output_size_in_bytes', 'alias_size_in_bytes'),
          values, strict=True))))
  programs = (sizes(200_000, 0, 0), sizes(500_000, 300_000, 100_000))
  assert host_replay.free_memory(10_000_000, state, programs) == 7_600_000
  buffer = replay.create(1, SHAPE, K).replace(images=images)
  asked = []
  for limit, kept, compiled in ((10**7, 'device', 1), (35 * 10**5, 'host', 2),
                                (16 * 10**5, 'host', 2)):
    made, note = host_replay.choose_place(
        'auto', limit, state, buffer, lambda: asked.append(0) or programs)
    # In the last case the images alone are too many.
    assert (made, len(asked)) == (programs if kept == 'device' else None, compiled)
    assert note.endswith(f'kept in {kept} memory')
    if kept == 'device':
      assert note.startswith('image buffer: 1.5 MB a device, 7.6 MB free of 10 MB: ')
  assert host_replay.choose_place('auto', None, state, buffer, lambda: programs) == (programs, '')


def test_auto_takes_the_host_where_the_device_is_too_small(whole, tmp_path, capsys):
  _, state, _ = whole
  _, found, _ = toy_runs.observed(config('auto', device_memory_gb=1e-6), tmp_path)
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('image buffer')]
  assert lines == ['image buffer: 0.00096 MB a device, 0 MB free of 0.001 MB: kept in host memory']
  assert equal(found, state)


def ssd_kd(**changes):
  found = toy_runs.config(method__capacity=12, **changes)
  found.method.name = 'ssd_kd'
  return found


def dafl(**changes):
  found = toy_runs.config(**changes)
  found.method.name = 'dafl'
  with found.unlocked():
    for name in ('adversarial_after', 'capacity', 'latent_lr'):
      del found.method[name]
  found.factors.update(batch_norm=0.0, adversarial=0.0)
  return found


@pytest.mark.parametrize(('make', 'changes', 'message'), [
    (ssd_kd, dict(buffer='host'),
     "buffer is 'host', must be 'auto' or 'device': the method draws images by prioriti"),
    (dafl, dict(buffer='host'),
     "buffer is 'host', must be 'auto' or 'device': the method keeps no images"),
    (ssd_kd, dict(device_memory_gb=1e-6),
     'method.capacity must be lower: the image buffer is .* by priorities.*tries'),
    (toy_runs.config, dict(buffer='hots'),
     "buffer is 'hots', must be one of auto, device, host. Did you mean 'host'"),
    (toy_runs.config, dict(device_memory_gb=0.0),
     r'device_memory_gb is 0.0, must be a number in \(0, inf\) or None')])
def test_refusals_take_a_line(make, changes, message, tmp_path):
  with pytest.raises(ValueError, match=message) as error:
    train.run(make(**changes), tmp_path / 'run')
  assert len(str(error.value).splitlines()) == 1
  assert not (tmp_path / 'run').exists()


def test_where_draws_go_by_priority_auto_is_the_device():
  buffer = replay.create(3, SHAPE, K, prioritised=True)
  assert 'by priorities' in host_replay.device_only_reason(buffer)
  assert 'keeps no images' in host_replay.device_only_reason({'no': 'buffer'})
  assert host_replay.device_only_reason(replay.create(3, SHAPE, K)) is None
  assert host_replay.choose_place('auto', 1, {}, {'no': 'buffer'}, lambda: ('programs',)) == (
      ('programs',), '')


def test_a_host_without_the_memory_for_a_checkpoint_too_is_said_before_anything_is_written(
    tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'sysconf', lambda name: 30)
  with pytest.raises(ValueError, match=r'method\.capacity needs .* of host memory'):
    train.run(toy_runs.config(buffer='host'), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
