"""Blocks of code in Markdown, and small worlds in which they run."""

import io
import re
import shlex
import subprocess
import sys
import tarfile

import jax
import ml_collections
import numpy as np
import toy_runs
from PIL import Image

from dfkd_jax import cli, models, weights
from dfkd_jax.data import prepare
from dfkd_jax.data.prepare.__main__ import main as prepare_main
from dfkd_jax.spline.__main__ import main as spline_main

ROOT = toy_runs.ROOT
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'^```([^\n`]*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
FILES = (
    'teacher.safetensors', 'resnet34.pth', 'resnet56_cifar10.th', 'efficientnet-lite0.pth',
    'ResNet50', 'espnet_p2_q8_camvid.pth')
PARSE_ONLY = '''
import argparse, os, runpy, sys

def stop(self, *given, **more):
  parse(self, *given, **more)
  sys.exit()

parse, argparse.ArgumentParser.parse_known_args = argparse.ArgumentParser.parse_known_args, stop
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name='__main__')
'''
TINY = dict(widths=(2, 3), strides=(2, 2))  # Of a convnet.
TINY_DENSE = dict(widths=(2, 2, 2), blocks=0, rates=())  # Of the small dilated network.


def blocks(path):
  """[(info string, text), ...] of the fenced blocks of a page."""
  return BLOCK.findall(path.read_text())


def tiny_network(num_classes, channels=3):
  """A module and its variables."""
  module = models.create('convnet', num_classes, **TINY)
  network = models.create_network(module, jax.random.key(1), (8, 8, channels))
  return module, {'params': network.params, 'batch_stats': toy_runs.moved(network.batch_stats)}


def tiny_source(num_classes, channels):
  """A file of weights for `TINY`."""
  path = toy_runs.folder() / f'docs_{num_classes}_{channels}.safetensors'
  if not path.exists():
    weights.save_safetensors(path, tiny_network(num_classes, channels)[1])
  return str(path)


def tiny_dense_source(num_classes):
  """A file of weights for `TINY_DENSE`."""
  path = toy_runs.folder() / f'docs_dense_{num_classes}.safetensors'
  if not path.exists():
    module = models.create('drn', num_classes, **TINY_DENSE)
    network = models.create_network(module, jax.random.key(1), (16, 16, 3))
    weights.save_safetensors(path, {'params': network.params,
                                    'batch_stats': toy_runs.moved(network.batch_stats)})
  return str(path)


def shrink(config, teacher=None):
  """The same job and method at a size that takes seconds; fewer rounds stay fewer."""
  config = ml_collections.ConfigDict(config.to_dict())
  data, tasks = config.dataset, config.method.get('num_tasks') or 1
  if data.image_shape[0] > 32:
    data.image_shape = (32, 32, data.image_shape[-1])
  if data.name == 'fashion_mnist':
    data.test_split = 'test[:20]'
  for network in (config.teacher, config.student, config.judge):
    if network.name is not None:
      network.name, network.options = 'convnet', ml_collections.ConfigDict(TINY)
    if network.get('source') is not None:
      network.source = tiny_source(data.num_classes, data.image_shape[-1])
    if config.task == 'segmentation' and network.name is not None:
      network.name, network.options = 'drn', ml_collections.ConfigDict(TINY_DENSE)
      if network.get('source') is not None:
        network.source = tiny_dense_source(data.num_classes)
  if config.generator.image_shape is not None:
    config.generator.image_shape = (16, 16, 3)
  is_spatial = config.generator.name == 'spatial_generator'
  config.generator.options = dict(widths=(2, 2)) if is_spatial else dict(width=2)
  at_most(config.method, num_steps=2, batch_size=4, capacity=8 * tasks, latent_dim=5,
          bank_size=8 * tasks, num_negatives=3, projection_size=4, redraw_every=2, restart_every=2)
  at_most(config.distill, calls_per_round=1, steps_per_round=2, distill_after=1,
          batch_size=max(2, config.distill.mosaic**2) * tasks)
  config.distill.rounds = max(2, min(4, config.distill.rounds // 40))
  at_most(config.train, epochs=1, batch_size=8)
  at_most(config.preflight, batch_size=4)
  at_most(config.student, head_images=100)
  config.optimizer.update(warmup_steps=0, milestones=())
  config.evaluate.update(every=2, batch_size=10)
  config.update(compilation_cache=str(toy_runs.folder() / 'programs'), num_devices=1)
  return config


def at_most(fields, **most):
  fields.update({name: min(fields[name], number) for name, number in most.items()
                 if fields.get(name) is not None})


def fill(folder):
  """Writes the files and data sets that the pages name."""
  for name in FILES:  # Only looked for: `shrink` names other weights.
    (folder / name).write_bytes(b'weights')
  draw = np.random.default_rng(0)
  images = draw.integers(0, 256, (100, 32, 32, 3), np.uint8)
  splits = dict.fromkeys(('train', 'test'), (images, np.arange(100)))
  prepare.write('cifar100', splits, folder / 'data')
  np.savez(folder / 'images.npz', images=images[:37], labels=np.arange(37))
  for label, image in enumerate(images[:37]):
    (folder / f'photos/{label:02}').mkdir(parents=True)
    Image.fromarray(image).save(folder / f'photos/{label:02}/photo.png')
  for name, arrays in (('test', images[:5]), ('testannot', images[:5, :, :, 0] % 12)):
    (folder / f'CamVid/{name}').mkdir(parents=True)
    for index, array in enumerate(arrays):
      Image.fromarray(array).save(folder / f'CamVid/{name}/{index}.png')
  rows = [','.join(map(str, ['M', *row])) for row in draw.uniform(size=(50, 8)).round(3)]
  (folder / 'abalone.data').write_text('\n'.join(rows))
  labels = np.arange(30, dtype=np.uint8)[:, None] % 10
  records = np.concatenate([labels, images[:30].reshape(30, -1)], axis=1).tobytes()
  names = b'\n'.join(b'class%d' % label for label in range(10))
  batches = [f'data_batch_{index}.bin' for index in range(1, 6)]
  with tarfile.open(folder / 'cifar-10-binary.tar.gz', 'w:gz') as archive:
    for name in (*batches, 'test_batch.bin', 'batches.meta.txt'):
      content = names if name.endswith('.txt') else records
      header = tarfile.TarInfo(f'cifar-10-batches-bin/{name}')
      header.size = len(content)
      archive.addfile(header, io.BytesIO(content))


def commands(text):
  """Words of each command, without comments and without the start on several hosts."""
  for line in text.replace('\\\n', ' ').splitlines():
    for command in filter(None, map(str.strip, line.split('&&'))):
      words = shlex.split(command, comments=True)
      yield words[next((i for i, word in enumerate(words) if word.endswith('python')), 0):]


def run_command(words):
  """Runs a command of a block; of benchmarks, pip and pytest only their arguments are looked at."""
  program, *arguments = words
  if program.endswith('pip'):
    assert arguments[:2] == ['install', '-q'], words
    check_extras(arguments[-1])
  elif not program.endswith('python'):
    assert words[:3] == ['python3', '-m', 'venv'], words
  elif arguments[0] == 'main.py':
    assert cli.main(arguments) == 0, words
  elif arguments[0].startswith('benchmarks/'):
    check_script(ROOT / arguments[0], arguments[1:])
  elif arguments[:2] == ['-m', 'dfkd_jax.prepare']:
    assert prepare_main(arguments[2:]) == 0, words
  elif arguments[:2] == ['-m', 'dfkd_jax.spline']:
    assert spline_main([*arguments[2:], '--steps=20']) == 0, words
  else:
    assert arguments[:2] == ['-m', 'pytest'], words


def check_extras(target):
  """Asserts that `.[hf]` names extras of the package."""
  for extra in re.findall(r'\[([\w,]+)\]', target):
    for name in extra.split(','):
      assert re.search(rf'^{name} =$', (ROOT / 'setup.cfg').read_text(), re.MULTILINE), target


def check_script(path, arguments):
  """Asserts that a script takes these arguments; its process ends once they are parsed."""
  assert path.exists(), path
  if 'argparse' in path.read_text():
    done = subprocess.run(
        [sys.executable, '-c', PARSE_ONLY, str(path), *arguments], capture_output=True, text=True,
        check=False)
    assert done.returncode == 0, done.stderr
  else:
    assert not arguments, path
