"""Runs without real images, the judge, and a teacher from Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs
import toys

from dfkd_jax import models, parallel, train, weights
from dfkd_jax.config import build, build_method, check
from dfkd_jax.config.records import resolve
from dfkd_jax.evaluate import synthetic_images
from dfkd_jax.jobs import sample_images
from dfkd_jax.synth import host_replay

ONE = parallel.make_mesh(1)


def looked(method, state, student, judge=None):
  program = synthetic_images.compile_metrics(ONE, lambda axis: method, state, toys.teacher(),
                                             student, judge)
  return jax.device_get(program(
      host_replay.strip_images(state), jax.random.key(4), toys.teacher(), student, judge))


@pytest.fixture(scope='module')
def synthesis():
  """A method with room for one call, and a state of its own with more, after a call."""
  large, small = toys.fast_dfkd(capacity=20), toys.fast_dfkd(capacity=4)
  state = large.init(jax.random.key(0), toys.teacher())
  return small, toys.jit(large.synthesize)(state, jax.random.key(1), toys.teacher(),
                                           toys.student())[0]


def test_a_student_that_is_the_teacher_agrees_and_so_does_a_judge(synthesis):
  found = looked(*synthesis, toys.teacher(), toys.teacher())
  assert found == {'held_out_agreement': 1, 'judge_top1': 1, 'judge_top5': 1}


def test_a_judge_of_other_mind_does_not(synthesis):
  """Its classes are the teacher's, moved by one: never the first, always among all five."""
  params = dict(toys.teacher().params)
  params['fc'] = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, -1), params['fc'])
  other = toys.teacher().replace(params=params)
  found = looked(*synthesis, other, other)
  assert found == {'held_out_agreement': 0, 'judge_top1': 0, 'judge_top5': 1}
  assert set(looked(*synthesis, toys.student())) == {'held_out_agreement'}


def test_images_are_fresh_and_nothing_is_kept(synthesis):
  """Whatever the buffer holds: the images are those of a call."""
  method, state = synthesis
  black = state.replace(buffer=state.buffer.replace(images=jnp.zeros_like(state.buffer.images)))
  assert looked(method, black, toys.student()) == looked(method, state, toys.student())


def test_a_run_without_real_images(tmp_path):
  config = toy_runs.config(dataset__name=None, evaluate__every=2)
  config.judge.update(name='convnet', options=toy_runs.NETWORKS['teacher'],
                      source=toy_runs.teacher_file(), mean=(0.4,), std=(0.3,))
  with toy_runs.quick():
    summary = train.run(config, tmp_path / 'run')
  last = summary['student']['last']
  assert set(last) == {'held_out_agreement', 'judge_top1', 'judge_top5', 'round'}
  assert last['judge_top1'] == 1  # The judge is the teacher.
  assert summary['images']['judge_top1'] == 1
  assert summary['images']['count'] >= sample_images.JUDGED
  assert summary['teacher'] is None
  assert summary['selection'] == 'held_out_agreement'
  assert summary['student']['best']['held_out_agreement'] >= last['held_out_agreement']
  assert 'No real image was seen' in summary['note']
  rounds = [line['step'] for line in toy_runs.metrics(tmp_path / 'run')
            if 'held_out_agreement' in line]
  assert rounds == [2, 4, 5]
  with toy_runs.quick():  # It has finished, and says the same again.
    assert train.run(config, tmp_path / 'run')['student'] == summary['student']


def test_training_and_a_control_need_real_images():
  for changes, message in ((dict(job='train'), 'dataset.name is None'),
                           (dict(control=True), 'control is True')):
    with pytest.raises(ValueError, match=message):
      check.find_problems(toy_runs.config(dataset__name=None, **changes)).raise_if_any()


def test_a_judge_needs_weights():
  with pytest.raises(ValueError, match=r"judge\.source is None, must be weights"):
    build.check_source(resolve(toy_runs.config(judge__name='convnet')).judge)


def test_a_teacher_from_python_is_that_from_its_file(tmp_path):
  teacher = build.trained_network(resolve(toy_runs.config()).teacher)
  changes = dict(distill__rounds=2, preflight__enabled=True)
  config = toy_runs.config(teacher__source=None, **changes)
  with toy_runs.quick():
    given = train.run(config, tmp_path / 'given', teacher=teacher)
    read = train.run(toy_runs.config(**changes), tmp_path / 'read')
  assert given['student'] == read['student']
  assert given['teacher'] == read['teacher']
  assert given['preflight']['card']['source'] == 'variables in memory'
  assert len(given['preflight']['card']['sha256']) == 64
  assert read['preflight']['card']['source'] == toy_runs.teacher_file()


def test_a_student_carries_its_probe_and_its_preprocessing(tmp_path):
  with toy_runs.quick():
    train.run(toy_runs.config(distill__rounds=2), tmp_path / 'run')
  path = tmp_path / 'run' / 'student.safetensors'
  config = toy_runs.config()
  module = build.module(resolve(config).student)
  variables = weights.load(path, module, toy_runs.IMAGE)
  probe = weights.read_probe(path)
  right = models.bind(module, variables, mean=(0.4,), std=(0.3,))
  assert weights.check_network(right, toy_runs.IMAGE, probe)['probe_difference'] < 1e-5
  with pytest.raises(ValueError, match='off by'):
    weights.check_network(right.replace(std=(0.05,)), toy_runs.IMAGE, probe)


@pytest.mark.parametrize(('name', 'dtype', 'remat'),
                         [('resnet18_imagenet', 'bfloat16', True), ('wrn10_1', None, True)])
def test_how_networks_compute_is_the_configs_to_say(name, dtype, remat):
  config = toy_runs.config(compute_dtype=dtype, remat=remat)
  config.teacher.name, config.teacher.options = name, {
      }  # `update` would keep those that are there.
  module = build.module(resolve(config).teacher)
  assert module.dtype == (dtype and jnp.bfloat16)
  assert getattr(module, 'remat', None) == (True if name == 'resnet18_imagenet'
                                            else None)  # If it has the switch.
  config.compute_dtype = 'float8'
  with pytest.raises(ValueError, match="'float8'"):
    build.module(resolve(config).teacher)


def test_a_spatial_generator_has_the_latents_of_its_images():
  config = toy_runs.config()
  config.dataset.image_shape = (24, 8, 3)
  config.generator.name, config.generator.options = 'spatial_generator', dict(widths=(3, 2, 2))
  assert build_method.latent_dim(resolve(config).method) == (6, 2, 7)
  assert build_method.latent_dim(resolve(toy_runs.config()).method) == 7
  config.dataset.image_shape = (24, 10, 3)  # The images are cut.
  assert build_method.latent_dim(resolve(config).method) == (6, 3, 7)
  config.generator.image_shape = (9, 5, 3)
  assert build_method.latent_dim(resolve(config).method) == (3, 2, 7)


def test_preprocessing_in_terms_of_bytes():
  """BGR minus means over 0 to 255, as Keras' ResNet-50 wants; and (x - 127) / 128."""
  pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3))
  images = jnp.asarray(pixels / 255, jnp.float32)
  module = toys.Plain()
  variables = module.init(jax.random.key(0), images)
  caffe = models.bind(module, variables, mean=[v / 255 for v in (123.68, 116.779, 103.939)],
                      std=(1 / 255,), bgr=True)
  np.testing.assert_allclose(
      caffe.preprocess(images), pixels[..., ::-1] - np.array([103.939, 116.779, 123.68]), atol=1e-4)
  plain = models.bind(module, variables, mean=(127 / 255,), std=(128 / 255,))
  np.testing.assert_allclose(plain.preprocess(images), (pixels - 127) / 128, atol=1e-5)
  np.testing.assert_allclose(caffe(images).logits,
                             module.apply(variables, caffe.preprocess(images)), rtol=1e-6)


def test_resizing_averages_where_it_shrinks_and_passes_the_rest():
  images = jax.random.uniform(jax.random.key(0), (2, 8, 6, 3))
  module = toys.Plain()
  network = models.create_network(module, jax.random.key(1), (8, 6, 3), resize=(4, 3))
  found = network.preprocess(images)
  assert found.shape == (2, 4, 3, 3)
  np.testing.assert_allclose(found.mean(), images.mean(), atol=0.05)
  same = jax.random.uniform(jax.random.key(2), (2, 4, 3, 3))
  assert (network.preprocess(same) == same).all()
  flat = jnp.full((1, 8, 6, 3), 0.3)
  np.testing.assert_allclose(network.preprocess(flat), 0.3, rtol=1e-6)
