"""Configs of data sets with masks: labels, resizing and augmentations."""

import jax
import numpy as np
import pytest
import toy_runs
from image_arrays import fails_in_one_line, image_pairs

from dfkd_jax import augment, train
from dfkd_jax.config import build
from dfkd_jax.config.problems import InvalidError
from dfkd_jax.config.records import resolve
from dfkd_jax.data import prepare
from dfkd_jax.runs.loop import Start


def load(tmp_path, masks, **changes):
  """Writes a data set 'camvid' of masks, and loads it as a run with `changes` of the section."""
  images, _ = image_pairs(*masks.shape)
  prepare.write('camvid', {'test': (images, masks)}, tmp_path, class_names=['sky', 'road'])
  config = toy_runs.config()
  config.dataset.update(name='camvid', data_dir=str(tmp_path), image_shape=images.shape[1:])
  config.dataset.update(changes)
  config.task = 'segmentation'
  settings = resolve(config)
  return build.load_split(settings.dataset, settings.task, 'test')


def masks_with(*labels):
  """Masks [3, 4, 5] of class 0, with further labels at one pixel each."""
  masks = np.zeros((3, 4, 5), np.uint8)
  masks[1].flat[:len(labels)] = labels
  return masks


@pytest.mark.parametrize(('labels', 'changes'), [
    ((10,), dict(num_classes=11)), ((10, 255), dict(num_classes=11)),
    ((10, 11), dict(num_classes=11, ignore=11)), ((10, 11), dict(num_classes=12, ignore=11)),
    ((1, 2), dict(num_classes=3, ignore=0))])
def test_masks_whose_labels_fit_are_loaded_whatever_the_class_names(tmp_path, labels, changes):
  masks = masks_with(*labels)
  loaded = load(tmp_path, masks, **changes)
  np.testing.assert_array_equal(loaded.labels, masks)
  assert loaded.class_names == ('sky', 'road')


@pytest.mark.parametrize(('labels', 'changes', 'message'), [
    ((10, 255), dict(num_classes=9),
     r"dataset.num_classes is 9, must be at least 11: masks of 'camvid' have label 10 "
     r'\(dataset.ignore is 255\)'),
    ((3, 11), dict(num_classes=11), 'at least 12: .* label 11'),
    ((3, 11, 255), dict(num_classes=4, ignore=11), r'at least 256: .*label 255 .*ignore is 11'),
    ((), dict(num_classes=3, ignore=0),
     "dataset.ignore is 0, must be another label: masks of split 'test' of 'camvid'")])
def test_masks_with_other_labels_are_refused(tmp_path, labels, changes, message):
  with fails_in_one_line(message):
    load(tmp_path, masks_with(*labels), **changes)


def test_a_run_resizes_as_its_config_says(tmp_path):
  masks = masks_with(1, 2, 3)
  loaded = load(tmp_path, masks, num_classes=4, resize=True, image_shape=(8, 10, 3))
  assert loaded.images.shape == (3, 8, 10, 3)
  np.testing.assert_array_equal(loaded.labels, masks.repeat(2, axis=1).repeat(2, axis=2))


def problems_of(tmp_path, **changes):
  try:
    train.check(toy_runs.config(**changes), Start(tmp_path / 'run'), None)
  except InvalidError as error:
    return error.problems
  return ()


@pytest.mark.parametrize(('changes', 'piece'), [
    (dict(dataset__resize=True, dataset__crop=0.5), 'dataset.crop is 0.5, must be None with'),
    (dict(dataset__ignore=256), 'dataset.ignore is 256, must be a whole number in [0, 255]'),
    (dict(augment__student__size=(0, 3)), 'augment.student.size is (0, 3), must be a tuple of 2'),
    (dict(augment__student=dict(name='random_crop', pad=None)), "'size'")])
def test_values_that_do_not_fit(tmp_path, changes, piece):
  line, = problems_of(tmp_path, **changes)
  assert piece in line


def test_a_config_sets_the_size_of_a_random_crop(tmp_path):
  changes = dict(augment__student=dict(name='random_crop_and_flip', pad=None, size=[9, 7]))
  assert problems_of(tmp_path, **changes) == ()
  view = augment.create(**resolve(toy_runs.config(**changes)).augment)
  images = jax.random.uniform(jax.random.key(0), (2, 12, 8, 1))
  assert view(jax.random.key(1), images).shape == (2, 9, 7, 1)
