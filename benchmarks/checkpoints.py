r"""Measures the size of a checkpoint and the seconds that it costs.

  python benchmarks/checkpoints.py --config=configs/cifar10.py:fast_dfkd

The state has fresh weights and a full buffer of noise, which does not compress. A save blocks the
run until the arrays are copied (`held up`). They are written in the background (`written`).
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from dfkd_jax import cli, distill, parallel
from dfkd_jax.config import build, build_method
from dfkd_jax.config.records import resolve
from dfkd_jax.runs import programs
from dfkd_jax.runs.checkpoint import Checkpoints
from dfkd_jax.synth import replay

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `configs` is not installed.


def full_state(config: ConfigDict) -> dict:
  """Returns the state of a run, with fresh weights and a buffer full of noise."""
  keys = jax.random.split(jax.random.key(0), 3)
  mesh = parallel.make_mesh(1)
  settings = resolve(config)
  teacher = build.fresh_network(settings.teacher, keys[0])
  student = build.fresh_network(settings.student, keys[1])
  tx = build.optimizer(
      settings.optimizer, settings.distill.rounds, settings.distill.steps_per_round)
  synthesis = programs.init(build_method.synthesizer(settings.method, 1), mesh, keys[2], teacher)
  images = replay.find_buffer(synthesis).images
  noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
  synthesis = replay.replace_buffer(synthesis, images=jax.device_put(noise, images.sharding))
  return {'synthesis': synthesis, 'student': distill.init(student, tx),
          'best': jax.tree.map(np.asarray, student)}


def measure(state: dict, folder: pathlib.Path) -> dict[str, float]:
  """Saves twice, where the first save is a warm-up, and restores."""
  raw = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  with Checkpoints(folder, max_to_keep=1) as checkpoints:
    for step in (1, 2):
      began = time.perf_counter()
      checkpoints.save(step, state, {})
      held_up = time.perf_counter() - began
      checkpoints.wait()
      written = time.perf_counter() - began
    size = sum(path.stat().st_size for path in (folder / '2').rglob('*') if path.is_file())
    began = time.perf_counter()
    restored_state, _ = checkpoints.restore(state)
    jax.block_until_ready(restored_state)
    restored = time.perf_counter() - began
  return {'raw bytes': raw, 'bytes': size, 'ratio': size / raw, 'held up, s': held_up,
          'written, s': written, 'read, s': restored}


def main(argv: Sequence[str]) -> None:
  """Prints a line for each figure."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/cifar10.py:fast_dfkd')
  parser.add_argument(
      '--seconds', type=float, help='seconds of a round, to print the share of saves')
  options = parser.parse_args(argv)
  config = cli.load(options.config)
  with tempfile.TemporaryDirectory() as folder:
    figures = measure(full_state(config), pathlib.Path(folder))
  for name, value in figures.items():
    print(f'{name:12}{value:16,.4g}' if value < 1e4 else f'{name:12}{value:16,.0f}')
  if options.seconds:
    share = figures['held up, s'] / (options.seconds * config.checkpoint.every)
    print(f'{"share":12}{share:16.3%}')


if __name__ == '__main__':
  main(sys.argv[1:])
