"""All that is wrong with a config and a folder, at once and before anything is spent on it.

What is found here is what can be found in a second or two, from names, numbers, shapes and paths: nothing is read
but what says that a data set or a run is there, nothing is compiled, and nothing is written. Weights and images are
read later.
"""

import os
import pathlib
import re

import jax
import jax.numpy as jnp

from dfkd_jax import data, distill, parallel, paths
from dfkd_jax.config import build, build_optimizer, check_fields, image_shapes, records
from dfkd_jax.config.check_fields import InvalidError, Problems
from dfkd_jax.losses import inversion
from dfkd_jax.messages import check_choice
from dfkd_jax.models.network import Network
from dfkd_jax.parallel import launch
from dfkd_jax.runs import config_diff, init_from, programs
from dfkd_jax.runs import folder as run_folder
from dfkd_jax.weights import embeddings

__all__ = ['InvalidError', 'alone', 'check']


def alone(config: build.Config) -> bool:
  """Whether a run is one process by itself, which waits for no other before it is checked."""
  given = [config.distributed.get(name) for name in ('coordinator', 'num_processes', 'process_id')]
  return given in ([None] * 3, [None, 1, None]) and (given[1] == 1 or launch.started_together() == 1)


def check(
    config: build.Config, workdir: str | os.PathLike | None = None, teacher: Network | None = None,
    resume: str | None = None) -> None:
  """Looks at all that a run of a config stands on, but for the numbers in its files.

  Args:
    config: Of the run.
    workdir: Of its results; None: there is none, or it is looked at elsewhere.
    teacher: A network in the place of the config's, if there is one.
    resume: In what a run that is in the folder may go on with another config, see `config_diff.config_changes`.

  Raises:
    InvalidError: Has a line for each thing that is wrong by itself, and none for what only follows from another.
  """
  problems = Problems()
  check_fields.look(config, problems)
  there = {}
  if written := workdir is not None and config.get('job') != 'check':
    workdir = problems.ask(lambda: paths.expand_path(workdir, 'workdir'), 'workdir')
    there = _there(problems, workdir)
  if not problems.concern('fields'):
    _look(config, problems, teacher, there)
  if written:  # At last, so that what is wrong by itself is not told as different, too.
    problems.ask(lambda: config_diff.config_changes(
        there, config_diff.run_identity(records.to_json(config)), workdir, resume, problems.concern), 'workdir', on=['fields'])
  problems.tell()


def _there(problems: Problems, workdir: pathlib.Path | None) -> dict:
  """Whether the folder may be written; what is known of the run that it holds."""
  problems.ask(lambda: run_folder.check_place(workdir), 'workdir')
  problems.ask(lambda: run_folder.check_not_running(workdir), 'workdir')
  return problems.ask(lambda: run_folder.read_stored(workdir), 'workdir') or {}


def _look(config: build.Config, problems: Problems, teacher: Network | None, there: dict) -> None:
  job = config.job
  _names(config, problems)
  if problems.concern('job'):
    return
  if job == 'train':
    _training(config, problems, teacher)
  else:
    _method(config, problems)
    image_shapes.network(config, problems, 'student', needed=job == 'distill')
    if teacher is None:
      _teacher(config, problems)
  if job == 'distill':
    _judge(config, problems)
    _distillation(config, problems)
  if job != 'check':
    _dataset(config, problems)
    unread = init_from.unread_sources(records.InitFrom(**config.init_from), there, config.control)
    for which, source in unread._asdict().items():
      if source is not None:
        problems.ask(lambda which=which, source=source: init_from.source_path(which, source), f'init_from.{which}')


def _names(config: build.Config, problems: Problems) -> None:
  """Those that any job looks up."""
  if config.compute_dtype is not None:
    problems.ask(lambda: check_choice(config.compute_dtype, build.DTYPES, 'compute_dtype'), 'compute_dtype')
  problems.ask(lambda: _precision(config.precision), 'precision')
  problems.ask(lambda: check_choice(config.labels, build.LABELS, 'labels'), 'labels')
  problems.ask(lambda: _cache(config.compilation_cache), 'compilation_cache')


def _precision(name: str | None) -> None:
  """Matrix products', as JAX calls them."""
  if name:
    try:
      with jax.default_matmul_precision(name):
        pass
    except ValueError as error:
      raise ValueError(f'precision is {name!r}, must be a precision of JAX: {error}') from error


def _cache(folder: str | None) -> None:
  if not folder:
    return
  path = paths.expand_path(folder, 'compilation_cache')
  if os.path.lexists(path) and not path.is_dir():
    raise ValueError(f'compilation_cache is {folder!r}, must be a folder: it is a file.')
  if path == path.parent:
    raise ValueError(f'compilation_cache is {folder!r}, must be a folder of its own: every program is a file in it.')


def _training(config: build.Config, problems: Problems, teacher: Network | None) -> None:
  """The job 'train'."""
  section = config.train
  if teacher is not None:
    problems.add("teacher is a network, must be None where job is 'train': it is read from teacher.source.")
  which = problems.ask(
      lambda: check_choice(section.network, ('teacher', 'student'), 'train.network'), 'train.network')
  if not problems.concern('train.label_factor', 'train.teacher_factor') and not (
      section.label_factor or section.teacher_factor):
    problems.add('train.label_factor and train.teacher_factor are 0, one must be above: there is nothing to learn.')
  if section.teacher_factor and teacher is None:
    _teacher(config, problems)
  if which is not None:
    image_shapes.network(config, problems, which)
  mesh = problems.ask(lambda: build.mesh(config), 'num_devices', on=['train.batch_size'])
  if mesh is not None:
    problems.ask(
        lambda: parallel.even_share(section.batch_size, mesh.size, 'train.batch_size'), 'train.batch_size')
  image_shapes.augmentation(config, problems, 'student')
  _optimizer(config, problems, section.epochs, 1)


def _teacher(config: build.Config, problems: Problems) -> None:
  image_shapes.network(config, problems, 'teacher')
  problems.ask(lambda: _weights(config, 'teacher'), 'teacher.source')


def _weights(config: build.Config, which: str) -> str | None:
  """What the weights are called, if they are there, as far as this machine knows."""
  found = build.source(config, which)
  if found is not None and found.startswith('hf:'):
    build.check_hub(found, f'{which}.source')
  elif found is not None:
    build.weights_path(found, f'{which}.source')
  return found


def _judge(config: build.Config, problems: Problems) -> None:
  named = problems.ask(lambda: _weights(config, 'judge'), 'judge.source')
  if named or config.judge.name is not None:
    image_shapes.network(config, problems, 'judge')


def _method(config: build.Config, problems: Problems) -> None:
  """The method and the numbers that any job needs of it, and the generator."""
  taken = problems.ask(lambda: build.method_takes(config.method.name), 'method.name') or ()
  if 'factors' in taken and not problems.concern('factors') and not any(config.factors.to_dict().values()):
    problems.add('all factors are 0, at least one must be above: there is nothing to minimise.', 'factors')
  if 'generator' in taken and not problems.concern('method.latent_dim'):
    image_shapes.takes_images(config, problems, image_shapes.generator, 'generator')
  adversary = config.method.get('adversary')
  if isinstance(adversary, build.Config) and 'divergence' in adversary:
    like = jnp.zeros((1, 2))
    problems.ask(lambda: inversion.adversarial(like, like, divergence=adversary.divergence),
                 'method.adversary.divergence')


def _distillation(config: build.Config, problems: Problems) -> None:
  section = config.distill
  like = jnp.zeros((1, 2))
  problems.ask(lambda: distill.divergence(section.divergence, like, like, 1.0), 'distill.divergence')
  problems.ask(lambda: programs.steps_per_call(config), 'distill.steps_per_round', on=['distill.calls_per_round'])
  for which in ('synthesis', 'student'):
    image_shapes.augmentation(config, problems, which)
  _optimizer(config, problems, section.rounds - section.distill_after if not problems.concern(
      'distill.rounds', 'distill.distill_after') else 1, section.steps_per_round)
  mesh = problems.ask(lambda: build.mesh(config), 'num_devices', on=['method.num_tasks'])
  if mesh is not None:
    problems.ask(lambda: build.local_tasks_of(config, mesh.size), 'method.num_tasks')
  problems.ask(lambda: build.share_of_batch(config), 'distill.batch_size', on=['method.num_tasks'])
  if not problems.concern('method.name'):
    _shares(config, problems)
    _numbers_of_method(config, problems, mesh)


def _shares(config: build.Config, problems: Problems) -> None:
  """Numbers of the method, each by itself."""
  numbers, taken = config.method, (*build.method_takes(config.method.name), 'generator_schedule')
  for name in numbers:
    if name != 'name':
      problems.ask(lambda name=name: check_choice(name, taken, f'argument of {numbers.name}'), f'method.{name}')
  for name in ('capacity', 'bank_size'):
    if numbers.get(name) is not None:
      problems.ask(lambda name=name: build.share_of(config, name), f'method.{name}',
                   on=['method.num_tasks', 'method.batch_size'])
  if numbers.get('generator_schedule') is not None:
    problems.ask(lambda: check_choice(numbers.generator_schedule, build.GENERATOR_SCHEDULES, 'generator schedule'),
                 'method.generator_schedule')
  if numbers.get('embeddings') is not None:
    problems.ask(lambda: embeddings.load(numbers.embeddings), 'method.embeddings')


def _numbers_of_method(config: build.Config, problems: Problems, mesh: jax.sharding.Mesh | None) -> None:
  """What the method itself says of its numbers, but for those that are known to be wrong already."""
  on = ('method.num_tasks', 'distill.batch_size', 'generator', 'labels', 'augment.synthesis', 'factors')
  if mesh is None or problems.concern(*on, *image_shapes.ON_IMAGES):
    return
  left = build.Config(config.to_dict())
  dropped = [name for name in config.method if name != 'name' and problems.concern(f'method.{name}')]
  for name in dropped:
    del left.method[name]
  while True:
    try:
      build.synthesizer(left, mesh.size)(None)
      return
    except ValueError as error:
      line = str(error)
    except Exception as error:  # Whatever a number of another type leads to.
      line = f'method is {build.plain(left.method)}, of which no method can be made: {str(error)[:200]}'
    if any(re.search(rf'\b{name}\b', line) for name in dropped):
      return  # It may be wrong only beside what took the place of another.
    problems.add(line, 'method.numbers')
    named = re.match(r'(?:method\.)?(\w+)( of a ramp)? (?:is|are) ', line)
    name = named and ('adversarial' if named[2] else named[1])
    if name in (None, 'name') or name not in left.method:
      return
    dropped.append(name)
    del left.method[name]


def _optimizer(config: build.Config, problems: Problems, rounds: int, steps: int) -> None:
  section = config.optimizer
  problems.ask(lambda: check_choice(section.name, build_optimizer.NAMES, 'optimizer'), 'optimizer.name')
  problems.ask(lambda: check_choice(section.schedule, build_optimizer.SCHEDULES, 'schedule'), 'optimizer.schedule')
  numbers = ('learning_rate', 'warmup_steps', 'milestones', 'gamma', 'end_value', 'schedule')
  if not problems.concern('distill.steps_per_round', *(f'optimizer.{name}' for name in numbers)):
    problems.ask(lambda: build.schedule(section, rounds, steps), 'optimizer.schedule')


def _dataset(config: build.Config, problems: Problems) -> None:
  section = config.dataset
  if section.name is None:
    return
  prepared = problems.ask(lambda: data.is_prepared(section.name, section.data_dir), 'dataset.data_dir')
  for which in ('test', *(('train',) if config.job == 'train' else ())):
    split = section[f'{which}_split']
    problems.ask(lambda split=split: data.check_prepared(section.name, split, section.data_dir),
                 f'dataset.{which}_split' if prepared else 'dataset.name', on=['dataset.data_dir'])
