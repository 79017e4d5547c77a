"""A data set, a teacher and a config for runs of seconds."""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import common
from dfkd_jax import models, report, train, weights
from dfkd_jax.data import prepare
from dfkd_jax.jobs import distillation
from dfkd_jax.runs import programs
from dfkd_jax.runs.loop import Experiment

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # For configs, which are no package.
COMPILED = '/jax/core/compile/backend_compile_duration'
IMAGE, CLASSES = (12, 8, 1), 5
NETWORKS = {'teacher': dict(widths=(3, 6), strides=(1, 2)),
            'student': dict(widths=(2, 3), strides=(1, 2))}


@functools.cache
def folder() -> pathlib.Path:
  """Of this process, removed at its end."""
  folder.kept = tempfile.TemporaryDirectory(prefix='toy_runs_')
  return pathlib.Path(folder.kept.name)


@functools.cache
def data_dir() -> str:
  """Prepares the data sets 'toy' and 'grey' (brightness is the class) in a folder."""
  draw = np.random.default_rng(0)
  labels = {'train': draw.permutation(np.arange(61) % CLASSES),
            'test': draw.permutation(np.arange(23) % CLASSES)}
  noise = lambda of: draw.integers(0, 256, (len(of), *IMAGE), np.uint8)
  toy = {split: (noise(of), of) for split, of in labels.items()}
  shade = lambda of: 30 + 45 * of[:, None, None, None] + draw.integers(0, 20, (len(of), *IMAGE))
  grey = {split: (shade(of).astype(np.uint8), of) for split, of in labels.items()}
  for name, splits in (('toy', toy), ('grey', grey)):
    prepare.write(name, splits, folder() / 'data')
  return str(folder() / 'data')


@functools.cache
def teacher_file(widths: tuple[int, ...] = (3, 6)) -> str:
  """Weights of a toy teacher."""
  module = models.create('convnet', CLASSES, widths=widths, strides=(1, 2)[:len(widths)])
  network = models.create_network(module, jax.random.key(7), IMAGE)
  path = folder() / f'teacher_{len(widths)}.safetensors'
  weights.save_safetensors(
      path, {'params': network.params, 'batch_stats': moved(network.batch_stats)})
  return str(path)


def moved(batch_stats):
  """Running moments off their start, as any training leaves them."""
  return jax.tree.map(
      lambda leaf: leaf + np.random.default_rng(leaf.size).uniform(-0.3, 0.3, leaf.shape),
      batch_stats)


def config(**changes):
  """A distillation of 5 rounds, the first without student steps; `changes` have '__' for dots."""
  found = common.base()
  found.num_devices = 1
  found.dataset.update(name='toy', data_dir=data_dir(), image_shape=IMAGE, num_classes=CLASSES)
  found.teacher.update(name='convnet', options=NETWORKS['teacher'], source=teacher_file(),
                       mean=(0.4,), std=(0.3,))
  found.student.update(name='convnet', options=NETWORKS['student'], mean=(0.4,), std=(0.3,))
  found.generator.options = dict(width=2)
  found.method.update(
      name='fast_dfkd', num_steps=2, generator_lr=3e-3, latent_lr=0.1, latent_dim=7,
      adversarial_after=1, batch_size=4, capacity=12, num_tasks=1)
  found.factors.update(batch_norm=10.0, one_hot=1.0, adversarial=1.0)
  found.augment.update(synthesis=dict(name='shift', pad=2), student=dict(name='shift', pad=2))
  found.distill.update(rounds=5, steps_per_round=3, distill_after=1, batch_size=4, temperature=4.0)
  found.train.update(epochs=3, batch_size=8)
  found.evaluate.batch_size = 9
  found.preflight.update(enabled=False, batch_size=6)  # It takes as long as the rest.
  found.checkpoint.every = 2
  found.compilation_cache = str(folder() / 'programs')
  found.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in changes.items()})
  return found


def config_file(name, **changes) -> str:
  """A file of this process that gives `config`, for a command."""
  path = folder() / name
  path.write_text(
      'from ml_collections import config_dict\n\n\ndef get_config():\n'
      f'  return config_dict.ConfigDict({config(**changes).to_dict()!r})\n')
  return str(path)


def process(*arguments, cwd) -> subprocess.CompletedProcess:
  """`python main.py` to its end, on one device and compiled as by default."""
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  return subprocess.run(
      [sys.executable, str(ROOT / 'main.py'), *arguments], cwd=cwd, capture_output=True, text=True,
      timeout=300, env=environment, check=False)


_shared = {}  # Compiled programs.
# Sections that programs do not depend on, or only by the modules of the networks.
OUTSIDE = ('teacher', 'student', 'judge', 'seed', 'preflight', 'control', 'evaluate', 'checkpoint',
           'budget', 'faults', 'init_from', 'grid')


def share_programs(patch):
  """Runs whose programs are equal trace and compile them once in this process."""
  init_state = distillation._Distillation.init_state

  class Plan(programs.Plan):
    key = None  # Of the control and of others that are not made below: these are never shared.

  def keyed(self):
    state = init_state(self)
    config = {name: value for name, value in self.settings.run.config.items()
              if name not in OUTSIDE}
    networks = [(network.module, network.mean, network.std, network.bgr, network.resize)
                for network in (self.teacher, self.student)]
    self.plan = Plan(*self.plan)
    self.plan.key = json.dumps(config, sort_keys=True) + str(
        (networks, self.factors, jax.config.jax_default_prng_impl))
    return state

  def sharing(function):
    def make(plan, *inputs):
      key = getattr(plan, 'key', None)
      if key is None:
        return function(plan, *inputs)
      shapes = jax.tree.map(lambda leaf: str(jax.typeof(leaf)) + str(leaf.sharding), inputs)
      key = function.__name__, key, str(shapes)
      if key not in _shared:
        _shared[key] = function(plan, *inputs)
      return _shared[key]
    return make

  patch.setattr(distillation._Distillation, 'init_state', keyed)
  for name in ('_compile_call', 'compile_steps'):
    patch.setattr(programs, name, sharing(getattr(programs, name)))


@contextlib.contextmanager
def quick():
  """Within: programs are compiled without much ado, and kept for the next run."""
  folder = jax.config.jax_compilation_cache_dir
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    with pytest.MonkeyPatch.context() as patch:
      share_programs(patch)
      yield
  finally:
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', least)
    jax.config.update('jax_disable_most_optimizations', False)
    compilation_cache.reset_cache()


def observed(config, workdir):
  """Runs; returns the summary, the last state, and the names of compiled programs by round."""
  states, compiled = [], [[]]
  active = True

  def listen(event, seconds, **more):
    if active and event == COMPILED:
      compiled[-1].append(more.get('fun_name', '?'))

  def loop(self, *arguments):
    states.append(original(self, *arguments))
    return states[-1]

  def update(self, **numbers):
    if not states:  # The control, after the rounds, has a progress of its own.
      compiled.append([])
    return updated(self, **numbers)

  original, updated = Experiment.loop, report.Progress.update
  jax.monitoring.register_event_duration_secs_listener(listen)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Experiment, 'loop', loop)
    patch.setattr(report.Progress, 'update', update)
    summary = train.run(config, workdir, command='python main.py')
  active = False
  return summary, jax.device_get(states[-1]), compiled


def stopped(config, workdir, rounds):
  """Runs until the given number of rounds is done, of which the last has not been saved."""
  done = []

  def update(self, **numbers):
    done.append(numbers)
    if len(done) == rounds:
      raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report.Progress, 'update', update)
    with pytest.raises(KeyboardInterrupt):
      train.run(config, workdir)


@functools.cache
def whole(**changes):
  """Runs without a stop; returns the summary and metrics."""
  workdir = folder() / '_'.join(['whole', *changes])
  return train.run(config(**changes), workdir), metrics(workdir)


def metrics(workdir) -> list[dict]:
  """Lines of metrics.jsonl, without what depends on the clock."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in line.items() if not name.startswith('seconds_')}
          for line in lines]


def tree_of(path: pathlib.Path) -> dict[str, bytes]:
  """All files under a folder, but for that by which a run keeps it to itself."""
  return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob('*'))
          if file.is_file() and file.name != '.lock'}


def equal(tree, other):
  is_equal = lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype
  return jax.tree.all(jax.tree.map(is_equal, tree, other))


def four_tasks(**changes):
  """With plain SGD: Adam would turn rounding errors of gradients near zero into steps."""
  return config(**{**dict(
      distill__distill_after=0, distill__batch_size=8, method__num_steps=1, method__num_tasks=4,
      method__capacity=16,
      optimizer__momentum=0.0, optimizer__learning_rate=0.3, optimizer__weight_decay=0.0,
      factors__adversarial=0.0, teacher__options__widths=(3,), teacher__options__strides=(1,),
      teacher__source=teacher_file((3,)),
      student__options__widths=(2,), student__options__strides=(1,)), **changes})


__all__ = ['CLASSES', 'IMAGE', 'ROOT', 'config', 'config_file', 'data_dir', 'folder', 'metrics',
           'observed', 'process', 'quick', 'teacher_file', 'tree_of', 'whole']
