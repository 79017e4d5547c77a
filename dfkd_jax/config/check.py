"""Checks all that a run stands on, before anything is loaded, compiled or written.

Takes a second or two. Reads names, numbers, shapes and paths. Weights and images are read later.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dfkd_jax import augment, data, parallel
from dfkd_jax.config import build, build_method
from dfkd_jax.config.problems import Problems, caught, wrong_value
from dfkd_jax.config.records import Distributed, NetworkSettings, Settings, resolve
from dfkd_jax.config.values import check_values
from dfkd_jax.messages import FieldError
from dfkd_jax.models.network import Network
from dfkd_jax.parallel import launch
from dfkd_jax.paths import expand_path

ROLES = ('teacher', 'student', 'judge')


def is_single_process(distributed: Distributed) -> bool:
  """Whether a run is one process, which waits for no other."""
  if distributed.coordinator is not None or distributed.process_id is not None:
    return False
  return distributed.num_processes == 1 or (
      distributed.num_processes is None and launch.started_together() == 1)


def find_problems(config: ConfigDict, teacher: Network | None = None) -> Problems:
  """Returns all problems of a config, without those that only follow from another.

  Args:
    config: The config of the run; `check_structure` must have passed.
    teacher: A network that replaces the config's teacher.
  """
  problems, settings = Problems(), resolve(config)
  problems.run(check_values, config)
  numbers = settings.method.numbers.items()
  method = settings.method._replace(numbers={
      name: value for name, value in numbers if not problems.affect(f'method.{name}')})
  settings = settings._replace(
      method=method, teacher=settings.teacher if teacher is None else None)
  for check, reads in CHECKS:
    problems.run(check, settings, reads)
  return problems


def _check_job(settings: Settings) -> Iterator[FieldError]:
  """Fields that a job needs, or has no use for."""
  if settings.control and settings.dataset.name is None:
    yield wrong_value('control', True, 'False where dataset.name is None: a control is evaluated '
                      'on real images.')
  if settings.job != 'train':
    return
  if settings.teacher is None:
    yield FieldError('teacher', "teacher is a network, must be None where job is 'train', which "
                     'reads it from teacher.source.')
  if settings.run.images is not None:
    yield wrong_value('budget.images', settings.run.images, "None where job is 'train', which "
                      'synthesises no image.')
  if settings.dataset.name is None:
    yield wrong_value('dataset.name', None, "the name of a prepared data set where job is 'train'.")
  if not (settings.train.label_factor or settings.train.teacher_factor):
    yield FieldError('train.label_factor', 'train.label_factor and train.teacher_factor are 0, '
                     'one must be above: there is nothing to learn.')


def _check_rounds(settings: Settings) -> Iterator[FieldError]:
  section = settings.distill
  if settings.job == 'distill' and section.distill_after >= section.rounds:
    yield wrong_value('distill.distill_after', section.distill_after, 'below distill.rounds, '
                      f'{section.rounds}, so that the student learns.')


def _check_calls(settings: Settings) -> Iterator[FieldError]:
  steps, calls = settings.distill.steps_per_round, settings.distill.calls_per_round
  if settings.job == 'distill' and steps % calls:
    yield wrong_value('distill.steps_per_round', steps,
                      f'a multiple of {calls}, distill.calls_per_round.')


def _check_warmup(settings: Settings) -> Iterator[FieldError]:
  steps, schedule = settings.optimizer.warmup_steps, settings.optimizer.schedule
  if steps and schedule != 'cosine_by_step':
    yield wrong_value('optimizer.warmup_steps', steps, f'0 with the schedule {schedule!r}.')


def _check_cache(settings: Settings) -> Iterator[FieldError]:
  if settings.compilation_cache is not None:
    path = expand_path(settings.compilation_cache, 'compilation_cache')
    if path == path.parent or (path.exists() and not path.is_dir()):
      yield wrong_value('compilation_cache', str(path), 'a folder for compiled programs alone.')


def _check_channels(settings: Settings) -> Iterator[FieldError]:
  channels = settings.dataset.image_shape[-1]
  for network in filter(None, (settings.teacher, settings.student, settings.judge)):
    for name in ('mean', 'std'):
      value = network.preprocessing[name]
      if isinstance(value, tuple) and len(value) not in (1, channels):
        yield wrong_value(f'{network.role}.{name}', value,
                          f'one number, or one for each of the {channels} channels.')


def _used_networks(settings: Settings, role: str) -> Iterator[tuple[NetworkSettings, bool]]:
  """Yields the networks of a role that the job makes, and whether it loads their weights."""
  teacher, student, judge = settings.teacher, settings.student, settings.judge
  if settings.job == 'train':
    used = [(getattr(settings, settings.train.network), False),
            (teacher if settings.train.teacher_factor else None, True)]
  elif settings.job == 'check':
    used = [(teacher, True), (student if student.name else None, False)]
  else:
    used = [(teacher, True), (student, False),
            (judge if judge.name or judge.source else None, True)]
  yield from ((network, loads) for network, loads in used if network and network.role == role)


def _check_source(settings: Settings, role: str) -> Iterator[FieldError]:
  for network, loads in _used_networks(settings, role):
    if loads:
      yield from caught(f'{role}.source', build.check_source, network)


def _check_network(settings: Settings, role: str) -> Iterator[FieldError]:
  for network, _ in _used_networks(settings, role):
    yield from caught(f'{role}.options', build.module, network)


def _check_factors(settings: Settings) -> Iterator[FieldError]:
  if settings.job == 'train':
    return
  has_factors = 'factors' in build_method.parameters(settings.method)
  if has_factors and not any(settings.method.factors):
    yield FieldError('factors', 'all factors are 0, at least one must be above.')


def _check_generator(settings: Settings) -> Iterator[FieldError]:
  method, shape = settings.method, settings.dataset.image_shape
  if settings.job == 'train' or 'generator' not in build_method.parameters(method):
    return
  generator = build_method.generator(method.generator)
  latents = jax.ShapeDtypeStruct(build_method.latent_shape(method, 2), jnp.float32)
  try:
    images, _ = jax.eval_shape(generator.init_with_output, jax.random.key(0), latents)
  except Exception as error:  # a width of 0, or of another type, may raise anything
    yield wrong_value('generator.options', method.generator.options, 'options with which generator '
                      f'{method.generator.name!r} makes images {shape}: {error}')
    return
  if images.shape[1:] != shape:
    yield wrong_value('dataset.image_shape', shape, f'{images.shape[1:]}, as the generator makes.')


def _check_augmentation(settings: Settings, which: str) -> Iterator[FieldError]:
  shape, field = settings.dataset.image_shape, f'augment.{which}'
  if settings.job == 'check' or (which == 'synthesis' and settings.job == 'train'):
    return
  options = settings.method.augment if which == 'synthesis' else settings.augment
  pad, scale = options.get('pad', 0), options.get('scale', (0, 1))
  if pad >= max(shape[:2]):
    yield wrong_value(f'{field}.pad', pad, f'below {max(shape[:2])}, the size of the images.')
  if scale[0] > scale[1]:
    yield wrong_value(f'{field}.scale', scale, '(least, most) of an image.')
  try:
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    jax.eval_shape(augment.create(**options), jax.random.key(0), images)
  except Exception as error:  # an option of another type may raise anything
    yield wrong_value(field, options, f'an augmentation of images {shape}: {error}')


def _check_devices(settings: Settings) -> None:
  if settings.job != 'check':
    field, number = build.shared_number(settings)
    parallel.even_share(number, build.make_mesh(settings).size, field)


def _check_tasks(settings: Settings) -> Iterator[FieldError]:
  method = settings.method
  if settings.job == 'distill':
    yield from caught('distill.batch_size', build_method.batch_share, method)
    for name in sorted(build_method.SHARED & method.numbers.keys()):
      yield from caught(f'method.{name}', build_method.task_share, method, name)


def _check_method(settings: Settings) -> Iterator[FieldError]:
  """The method's own checks, repeated without each number that it refuses."""
  method = settings.method
  while settings.job == 'distill':
    try:
      build_method.synthesizer(method, build.make_mesh(settings).size)(None)
      return
    except FieldError as error:
      yield error
      name = error.field.removeprefix('method.')
    except Exception as error:  # a number of another type may raise anything
      prefix = f'Cannot create method {method.name!r} from {method.numbers}: '
      yield FieldError('method', f'{prefix * (not isinstance(error, ValueError))}{error}')
      return
    if name not in method.numbers:
      return
    method = method._replace(numbers={
        number: value for number, value in method.numbers.items() if number != name})


def _check_dataset(settings: Settings) -> Iterator[FieldError]:
  dataset = settings.dataset
  if settings.job == 'check' or dataset.name is None:
    return
  is_prepared = data.is_prepared(dataset.name, dataset.data_dir)
  for which in ('test', 'train') if settings.job == 'train' else ('test',):
    field = f'dataset.{which}_split'
    yield from caught(field if is_prepared else 'dataset.name', data.check_prepared, dataset.name,
                      getattr(dataset, f'{which}_split'), dataset.data_dir)


_SHAPES = ('job', 'dataset.image_shape', 'dataset.num_classes', 'compute_dtype')
CHECKS = (  # with the fields that each reads
    (_check_job, ('job', 'dataset.name', 'train.label_factor', 'train.teacher_factor')),
    (_check_rounds, ('job', 'distill.rounds', 'distill.distill_after')),
    (_check_calls, ('job', 'distill.steps_per_round', 'distill.calls_per_round')),
    (_check_warmup, ('optimizer.warmup_steps', 'optimizer.schedule')),
    (_check_cache, ('compilation_cache',)),
    (_check_channels, ('dataset.image_shape',)),
    *((functools.partial(_check_source, role=role), ('job', 'train.network', f'{role}.source'))
      for role in ROLES),
    *((functools.partial(_check_network, role=role),
       (*_SHAPES, 'train.network', f'{role}.name', f'{role}.options', f'{role}.resize'))
      for role in ROLES),
    (_check_factors, ('job', 'method.name')),
    (_check_generator, (*_SHAPES, 'method.name', 'method.latent_dim', 'generator')),
    *((functools.partial(_check_augmentation, which=which),
       ('job', f'augment.{which}', 'dataset.image_shape')) for which in ('synthesis', 'student')),
    (_check_devices, ('job', 'num_devices', 'method.num_tasks', 'train.batch_size')),
    (_check_tasks, ('job', 'method.num_tasks', 'method.batch_size', 'distill.batch_size')),
    (_check_method, (*_SHAPES, 'method.name', 'method.num_tasks', 'num_devices', 'generator',
                     'distill.batch_size', 'labels', 'augment.synthesis', 'factors')),
    (_check_dataset, ('job', 'dataset.name', 'dataset.data_dir')),
)
