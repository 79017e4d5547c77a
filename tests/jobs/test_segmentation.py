"""Runs whose labels are masks: from the data set to the summary and the pictures."""

import functools
import json

import jax
import numpy as np
import pytest
import toy_runs
import toys
from PIL import Image

from dfkd_jax import models, train, weights
from dfkd_jax.data import prepare

SIZE, CLASSES, VOID = (24, 20), 4, 3  # Void is an output of the networks.
NET = dict(widths=(4, 6, 6), blocks=0, rates=())


@pytest.fixture(autouse=True, scope='module')
def _quick():
  with toy_runs.quick():
    yield


@functools.cache
def data_dir():
  """The data set 'scenes': a dark and a bright half, a grey square, and void at the border."""
  draw = np.random.default_rng(0)

  def scenes(number):
    masks = np.zeros((number, *SIZE), np.uint8)
    for mask in masks:
      mask[:, draw.integers(6, 14):] = 1
      row = draw.integers(2, 14)
      mask[row:row + 7, 4:12] = 2
      mask[0] = VOID
    shades = np.array([30, 220, 120, 90])[masks][..., None]
    noise = draw.integers(0, 20, (*masks.shape, 3))
    return (shades + noise).astype(np.uint8), masks

  folder = toy_runs.folder() / 'scenes'
  prepare.write('scenes', {'train': scenes(13), 'test': scenes(5)}, folder,
                class_names=['dark', 'bright', 'square'])
  return str(folder)


@functools.cache
def teacher_file():
  network = models.create_network(
      models.create('drn', CLASSES, **NET), jax.random.key(7), (*SIZE, 3))
  path = toy_runs.folder() / 'drn.safetensors'
  weights.save_safetensors(
      path, {'params': network.params, 'batch_stats': toy_runs.moved(network.batch_stats)})
  return str(path)


def config(**changes):
  found = toy_runs.config(
      task='segmentation', teacher__source=teacher_file(), distill__rounds=2,
      distill__distill_after=0, distill__steps_per_round=2)
  found.dataset.update(name='scenes', data_dir=data_dir(), image_shape=(*SIZE, 3),
                       num_classes=CLASSES, ignore=VOID)
  for network in (found.teacher, found.student):
    network.update(name='drn', mean=(0.4,), std=(0.3,))
    network.options = NET
  found.generator.image_shape = (16, 12, 3)
  found.method.update(adversarial_after=0)
  found.augment.synthesis.name = found.augment.student.name = 'flip'
  for augmentation in (found.augment.synthesis, found.augment.student):
    augmentation.pad = None
  found.evaluate.batch_size = 3
  found.grid.update(columns=3, rows=6)
  found.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in changes.items()})
  return found


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('dense') / 'run'
  return workdir, train.run(config(control=True), workdir)


def test_a_run_reports_its_own_metrics(whole, capsys):
  workdir, summary = whole
  for result in (summary['teacher'], summary['student']['last'], summary['control']):
    assert {'mean_iou', 'mean_iou_void', 'pixel_accuracy', 'class_accuracy'} <= result.keys()
    assert 'top1' not in result
    assert 0 <= result['mean_iou_void'] <= result['mean_iou'] <= 1
  assert 0 <= summary['student']['last']['agreement'] <= 1
  assert summary['selection'] == 'mean_iou'
  line = json.loads((workdir / 'metrics.jsonl').read_text().splitlines()[-1])
  assert line['mean_iou'] == summary['student']['last']['mean_iou']
  train.run(config(control=True), workdir)  # A finished run tells its results again.
  said = capsys.readouterr().out
  assert 'mIoU' in said
  assert 'IoU by class' in said
  assert 'top-1' not in said


def test_pictures_have_masks_in_rows(whole):
  workdir, summary = whole
  assert {'images.png', 'test_images.png'} <= set(summary['files'])
  for name, rows, height in (('images.png', 6, 16), ('test_images.png', 4, SIZE[0])):
    tile = height * round(96 / height)  # Enlarged to about 96 pixels; labels take some 30 more.
    with Image.open(workdir / name) as picture:
      assert 1.25 * rows < picture.height / tile < 1.25 * (rows + 1)


@pytest.mark.exhaustive
def test_devices_share_the_work_of_tasks(tmp_path):
  changes = dict(distill__rounds=1, distill__batch_size=8, method__batch_size=2,
                 method__num_tasks=4, method__capacity=16)
  states = [toy_runs.observed(config(num_devices=count, **changes), tmp_path / str(count))[1]
            for count in (1, 4)]
  alone, spread = (state.student.network for state in states)
  buffers = [state.synthesis.buffer.images.astype(int) for state in states]
  assert buffers[0].shape == (4, 4, 16, 12, 3)
  assert np.abs(buffers[0] - buffers[1]).max() <= 1
  assert max(toys.distances(alone.params, spread.params).values()) <= 1e-4
  for mine, theirs in zip(*map(jax.tree.leaves, (alone.batch_stats, spread.batch_stats)),
                          strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_the_other_void_rule_picks_the_best_round(tmp_path):
  summary = train.run(config(dataset__count_void=True), tmp_path)
  assert summary['selection'] == 'mean_iou_void'


@pytest.mark.parametrize('changes', [
    dict(train__class_weights='median_frequency', train__focal_gamma=1.0),
    pytest.param(dict(train__focal_gamma=2.0), marks=pytest.mark.exhaustive)])
def test_a_network_learns_from_masks(changes, tmp_path):
  made = config(job='train', train__epochs=25, train__batch_size=4, **changes)
  made.optimizer.update(name='adam', learning_rate=2e-2, weight_decay=0.0, schedule='constant')
  made.augment.student.update(name='random_crop_and_flip', size=(16, 16))
  summary = train.run(made, tmp_path)
  assert summary['student']['last']['mean_iou'] > 0.55
  line = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
  assert line['train_pixels'] > 0.6


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(teacher__name='resnet8'),
     "teacher.name is 'resnet8', which predicts a class for each image, but task is 'segmen"),
    (dict(task='classification'),
     "teacher.name is 'drn', which predicts a class for each pixel, but task is 'classificat"),
    (dict(dataset__num_classes=2, dataset__ignore=255),
     "dataset.num_classes is 2, must be at least 4: masks of 'scenes' have label 3"),
    (dict(dataset__name='toy', dataset__data_dir=toy_runs.data_dir(),
          dataset__image_shape=toy_runs.IMAGE, generator__image_shape=None),
     "dataset.name is 'toy', must be a data set of mas"),
    (dict(distill__mosaic=2, distill__batch_size=6),
     'distill.batch_size is 6, must be a multiple of 4: distill.mosaic is 2'),
    (dict(labels='balanced'),
     "labels is 'balanced', must be 'uniform' where task is 'segmentation'"),
    (dict(generator__image_shape=(16, 12, 1)),
     r'generator.image_shape is \(16, 12, 1\), must be \(height, width, 3\), as of dataset.im'),
])
def test_what_does_not_fit_costs_one_line(changes, message, tmp_path):
  made = config(**changes)
  made.teacher.options = {} if 'teacher__name' in changes else made.teacher.options
  with pytest.raises(ValueError, match=message) as error:
    train.run(made, tmp_path / 'run')
  assert len(str(error.value).splitlines()) == 1
  assert not (tmp_path / 'run').exists()


def test_a_classifier_in_memory_is_refused_too(tmp_path):
  module = models.create('resnet8', CLASSES)
  teacher = models.create_network(module, jax.random.key(0), (*SIZE, 3))
  with pytest.raises(ValueError, match="teacher is 'ThinResNet', which predicts a class for ea"):
    train.run(config(teacher__source=None), tmp_path / 'run', teacher=teacher)
