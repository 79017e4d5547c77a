"""Checks all that a run stands on, before anything is loaded, compiled or written.

Takes a second or two. Reads names, numbers, shapes and paths. Weights and images are read later.
"""

import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dfkd_jax import augment, data
from dfkd_jax.config import build, build_method, head
from dfkd_jax.config.fields import BY_NAME, OPEN, RUN_FIELDS, leaves
from dfkd_jax.config.problems import Problems, wrong_value
from dfkd_jax.config.records import Distributed, MethodSettings, Settings, resolve
from dfkd_jax.messages import FieldError, nearest
from dfkd_jax.models.network import Network
from dfkd_jax.parallel import launch
from dfkd_jax.paths import expand_path

_NO_PATHS = ('hf:', 'embedded:')  # sources that are no paths
_SHAPES = ('job', 'dataset.image_shape', 'dataset.num_classes', 'compute_dtype')


def is_single_process(distributed: Distributed) -> bool:
  """Whether a run is one process, which waits for no other."""
  processes = distributed.num_processes
  processes = launch.started_together() if processes is None else processes
  return distributed.coordinator is None and distributed.process_id is None and processes == 1


def check_structure(config: ConfigDict) -> Iterator[FieldError]:
  """Yields fields that are missing, unknown or no section; without any a config can be resolved."""
  values, names = dict(leaves(config)), [field.name for field in RUN_FIELDS]
  sections = {name.rpartition('.')[0] for name in names} | {'augment', *OPEN} - {''}
  for name in sorted(sections & values.keys()):
    if not isinstance(values[name], ConfigDict):
      yield wrong_value(name, values[name], 'a section of the config.')
      return
  missing = [name for name in names if name not in values
             and (not name.startswith('augment.') or name.endswith('.name'))]
  if missing:
    yield FieldError(missing[0], f'The config has no {", ".join(missing[:5])}'
                     f'{" ..." * (len(missing) > 5)}. It must have all fields of `fields.base()`.')
  open_sections = tuple(f'{section}.' for section in OPEN)
  for name in values:
    if name not in names and name not in sections and not name.startswith(open_sections):
      yield FieldError(name, f'Unknown config field {name!r}.{nearest(name, names)} '
                       'python main.py --help lists all fields.')


def check_values(config: ConfigDict) -> Iterator[FieldError]:
  """Yields each value that its row does not allow, and each path that can be none."""
  values = dict(leaves(config))
  for row in BY_NAME.values():
    value = values.get(row.name)
    if row.name not in values or row.kind is dict:
      continue
    if error := row.error(value):
      yield FieldError(row.name, error)
    elif 'path' in row.flags and value is not None and not value.startswith(_NO_PATHS):
      try:
        expand_path(value.partition('#')[0], row.name)
      except ValueError as error:
        yield FieldError(row.name, str(error))
  for name in sorted(values.keys() - BY_NAME.keys()):
    try:
      json.dumps(None if isinstance(values[name], ConfigDict) else values[name])
    except TypeError:
      kind = type(values[name]).__name__
      yield wrong_value(name, values[name], f'a value that JSON can hold, not a {kind}.')


def find_problems(config: ConfigDict, teacher: Network | None = None) -> Problems:
  """Returns all problems of a config that has the structure, without those that follow from others.

  `teacher` is a network that replaces the config's teacher.
  """
  problems, settings = Problems(), resolve(config)
  problems.run(check_values, config)
  method = settings.method._replace(numbers={
      name: value for name, value in settings.method.numbers.items()
      if not problems.affect(f'method.{name}')})
  settings = settings._replace(method=method, teacher=settings.teacher if teacher is None else None)
  problems.run(_check_job, settings,
               reads=('job', 'dataset.name', 'train.label_factor', 'train.teacher_factor'))
  problems.run(_check_numbers, settings, problems)
  if settings.job != 'check':
    problems.run(build.make_mesh, settings,
                 reads=('job', 'num_devices', 'method.num_tasks', 'train.batch_size'))
  for check, *reads in (
      (_check_networks, 'train.network'), (_check_augmentations, 'dataset.image_shape'),
      (_check_method, 'method.name'), (_check_data_set, 'dataset.name', 'dataset.data_dir')):
    problems.run(check, settings, problems, reads=('job', *reads))
  return problems


def _check_job(settings: Settings) -> Iterator[FieldError]:
  """Yields fields that a job needs, or has no use for."""
  train, data_set, images = settings.train, settings.dataset.name, settings.run.images
  if settings.control and data_set is None:
    yield wrong_value('control', True, 'False without dataset.name: it needs real images.')
  if settings.job != 'train':
    return
  if settings.teacher is None:
    yield FieldError('teacher', "teacher is a network, must be None where job is 'train'.")
  if images is not None:
    yield wrong_value('budget.images', images, "None where job is 'train': it synthesises none.")
  if data_set is None:
    yield wrong_value('dataset.name', None, "a prepared data set where job is 'train'.")
  if not (train.label_factor or train.teacher_factor):
    yield FieldError('train.label_factor', 'train.label_factor and train.teacher_factor are 0, '
                     'one must be above: there is nothing to learn.')


def _check_numbers(settings: Settings, problems: Problems) -> Iterator[FieldError]:
  """Yields values that do not go together; skips those that are wrong by themselves."""
  is_wrong, distill, optimizer = problems.affect, settings.distill, settings.optimizer
  rounds, after, shape = distill.rounds, distill.distill_after, settings.dataset.image_shape
  steps, calls, cache = (
      distill.steps_per_round, distill.calls_per_round, settings.compilation_cache)
  if settings.job == 'distill':
    if not is_wrong('distill.rounds', 'distill.distill_after') and after >= rounds:
      yield wrong_value('distill.distill_after', after, f'below distill.rounds, {rounds}.')
    if not is_wrong('distill.steps_per_round', 'distill.calls_per_round') and steps % calls:
      yield wrong_value('distill.steps_per_round', steps,
                        f'a multiple of {calls}, distill.calls_per_round.')
  yield from _check_images(settings, problems)
  if (optimizer.warmup_steps and optimizer.schedule != 'cosine_by_step'
      and not is_wrong('optimizer.warmup_steps', 'optimizer.schedule')):
    yield wrong_value('optimizer.warmup_steps', optimizer.warmup_steps,
                      f'0 with the schedule {optimizer.schedule!r}.')
  if cache is not None and not is_wrong('compilation_cache') and expand_path(cache).is_file():
    yield wrong_value('compilation_cache', cache, 'a folder.')
  for network in filter(None, (settings.teacher, settings.student, settings.judge)):
    for name in ('mean', 'std'):
      field, value = f'{network.role}.{name}', network.preprocessing[name]
      if not is_wrong('dataset.image_shape', field) and len(value) not in (1, shape[-1]):
        yield wrong_value(field, value, f'one number, or one for each of the {shape[-1]} channels.')


def _check_images(settings: Settings, problems: Problems) -> Iterator[FieldError]:
  """Yields sizes of images, mosaics and labels that do not suit the task or each other."""
  is_wrong, distill, channels = problems.affect, settings.distill, settings.dataset.image_shape[-1]
  labels = settings.run.config['labels']
  if settings.task.label_axes and labels != 'uniform' and not is_wrong('labels'):
    yield wrong_value('labels', labels, "'uniform' where task is 'segmentation': no class can be "
                      'asked of a pixel.')
  if distill.mosaic > 1 and settings.job == 'distill' and not is_wrong('distill.mosaic'):
    if not settings.task.label_axes:
      yield wrong_value('distill.mosaic', distill.mosaic, "1 where task is 'classification'.")
    share, images = distill.batch_size // settings.method.num_tasks, distill.mosaic**2
    if share % images:
      yield wrong_value('distill.batch_size', distill.batch_size,
                        f'a multiple of {images * settings.method.num_tasks}: distill.mosaic is '
                        f'{distill.mosaic}.')
  synthesised = settings.method.generator.image_shape
  if not is_wrong('dataset.image_shape', 'generator.image_shape') and synthesised[-1] != channels:
    yield wrong_value('generator.image_shape', synthesised,
                      f'(height, width, {channels}), as of dataset.image_shape.')
  if settings.dataset.resize and settings.dataset.crop is not None:
    yield wrong_value('dataset.crop', settings.dataset.crop, 'None with dataset.resize.')


def _check_networks(settings: Settings, problems: Problems) -> None:
  """Checks the networks of the job, and the sources of trained networks."""
  teacher, student, judge = settings.teacher, settings.student, settings.judge
  loaded, drawn = [teacher], student
  if settings.job == 'train':
    loaded = [teacher] if settings.train.teacher_factor else []
    drawn = getattr(settings, settings.train.network)
  elif settings.job == 'check' and not student.name:
    drawn = None
  elif settings.job == 'distill' and (judge.name or judge.source):
    loaded.append(judge)
  for network in filter(None, (*loaded, drawn)):
    role = network.role
    if network in loaded:
      problems.run(build.check_source, network, reads=[f'{role}.source'], field=f'{role}.source')
    problems.run(build.module, network, reads=(
        *_SHAPES, f'{role}.name', f'{role}.options', f'{role}.resize', f'{role}.head_width'))
  problems.run(head.check_head, settings, reads=(
      *_SHAPES, 'student', 'distill.rounds', 'distill.distill_after'))


def _check_method(settings: Settings, problems: Problems) -> Iterator[FieldError]:
  """Checks the method's shares by task, its factors, its generator and its other numbers."""
  method, reads = settings.method, ('method.num_tasks', 'method.batch_size', 'distill.batch_size')
  if settings.job == 'train':
    return
  if settings.job == 'distill':
    problems.run(build_method.batch_share, method, reads=reads)
    for name in sorted(build_method.SHARED & method.numbers.keys()):
      problems.run(build_method.task_share, method, name, reads=reads)
  takes = build_method.parameters(method)
  if 'factors' in takes and not any(method.factors):
    yield FieldError('factors', 'all factors are 0, at least one must be above.')
  if 'generator' in takes:
    problems.run(_check_generator, method, reads=(*_SHAPES, 'method.latent_dim', 'generator'))
  if settings.job == 'distill':
    problems.run(_check_arguments, settings, reads=(
        *_SHAPES, 'method.num_tasks', 'num_devices', 'generator', 'distill.batch_size',
        'distill.rounds', 'distill.calls_per_round', 'labels', 'augment.synthesis', 'factors'))


def _check_generator(method: MethodSettings) -> None:
  """Checks that the generator makes images of its shape."""
  shape, generator = method.generator.image_shape, build_method.generator(method.generator)
  latents = jax.ShapeDtypeStruct(build_method.latent_shape(method, 2), jnp.float32)
  try:
    jax.eval_shape(generator.init, jax.random.key(0), latents)
  except Exception as error:  # a width of 0, or of another type, may raise anything
    raise wrong_value('generator.options', method.generator.options, 'options with which generator '
                      f'{method.generator.name!r} makes images {shape}: {error}') from error


def _check_arguments(settings: Settings) -> Iterator[FieldError]:
  """Yields the errors of the method's constructor, called again without each refused number."""
  method, numbers = settings.method, dict(settings.method.numbers)
  while True:
    try:
      build_method.synthesizer(
          method._replace(numbers=numbers), build.make_mesh(settings).size)(None)
      return
    except FieldError as error:
      yield error
      if numbers.pop(error.field.removeprefix('method.'), None) is None:
        return
    except Exception as error:  # a number of another type may raise anything
      yield FieldError('method', f'Cannot create method {method.name!r} from {numbers}: {error}')
      return


def _check_augmentations(settings: Settings, problems: Problems) -> Iterator[FieldError]:
  """Yields options of the augmentations that do not suit the images."""
  synthesised = settings.method.generator.image_shape
  learnt = synthesised if settings.job == 'distill' else settings.dataset.image_shape
  for shape, field, options, jobs in (
      (synthesised, 'augment.synthesis', settings.method.augment, ['distill']),
      (learnt, 'augment.student', settings.augment, ['distill', 'train'])):
    if settings.job not in jobs or problems.affect(field):
      continue
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


def _check_data_set(settings: Settings, problems: Problems) -> None:
  """Checks that the splits that the job reads are prepared."""
  name, data_dir = settings.dataset.name, settings.dataset.data_dir
  if settings.job == 'check' or name is None:
    return
  is_prepared = data.is_prepared(name, data_dir)
  for which in ('test', 'train') if settings.job == 'train' else ('test',):
    field, split = f'dataset.{which}_split', getattr(settings.dataset, f'{which}_split')
    problems.run(data.find_prepared, name, split, data_dir, reads=[field],
                 field=field if is_prepared else 'dataset.name')
