"""The table of config fields: one row a field. Defaults, checks, --help and docs come from it."""

import functools
from collections.abc import Iterator
from typing import Any

from ml_collections import config_dict

from dfkd_jax.config.field import ABOVE_0, ANY, DECAY, FROM_0, FROM_1, NO_DEFAULT, SHARE, Field
from dfkd_jax.models import GENERATORS
from dfkd_jax.spline import head_init

PRECISIONS = ('default', 'high', 'highest', 'bfloat16', 'tensorfloat32', 'float32')
HEADS = ('random', *head_init.KINDS)
SCHEDULES = ('cosine_by_round', 'cosine_by_step', 'steps', 'constant')


def _network(role: str, doc: str, is_trained: bool = True) -> tuple[Field, ...]:
  """Rows of a network's section."""
  source = Field(f'{role}.source', None, str, '',
                 'weights: a file, a folder, hf:OWNER/REPO or embedded:NAME', 'none path')
  return (
      Field(f'{role}.name', None, str, '', f'{doc}, one of `models.names()`', 'none'),
      Field(f'{role}.options', {}, dict, '', 'further arguments of the model'),
      Field(f'{role}.mean', (0.0,), float, ANY, 'mean of images in [0, 1], by channel', '', 0),
      Field(f'{role}.std', (1.0,), float, ABOVE_0, 'standard deviation, by channel', '', 0),
      Field(f'{role}.bgr', False, bool, '', 'whether it takes channels in reverse order'),
      Field(f'{role}.resize', None, int, FROM_1, '(height, width) of its images', 'none', 2),
      *[source] * is_trained)


def _augmentation(name: str) -> tuple[Field, ...]:
  """Rows of an augmentation; a number of None has the default of the function."""
  return (
      Field(f'{name}.name', 'crop_and_flip', str, '', 'a function of dfkd_jax/augment.py'),
      Field(f'{name}.pad', None, int, FROM_0, 'pixels of its border', 'none'),
      Field(f'{name}.size', None, int, FROM_1, '(height, width) of a crop', 'none', 2),
      Field(f'{name}.scale', None, float, SHARE, '(least, most) area of a crop', 'none', 2),
      Field(f'{name}.align_corners', None, bool, '', 'how it resizes a crop', 'none'))


RUN_FIELDS = (
    Field('job', 'distill', str, ('distill', 'train', 'check'),
          'distil without data, train on real data, or only measure the teacher'),
    Field('task', 'classification', str, ('classification', 'segmentation'),
          'a class for each image, or for each pixel'),
    Field('seed', 0, int, '[0, 4294967296)', 'seed of all random numbers'),
    Field('num_devices', None, int, FROM_1, 'None: as many as the tasks fill', 'none free'),
    Field('precision', None, str, PRECISIONS, "of matrix products; None: JAX's default", 'none'),
    Field('compute_dtype', None, str, ('float32', 'bfloat16'),
          'dtype in networks and generator; parameters stay float32', 'none'),
    Field('remat', False, bool, '', 'whether the backward pass recomputes the maps within blocks'),
    Field('buffer', 'auto', str, ('auto', 'device', 'host'),
          'memory for the images; auto: the host if no device has room', 'free'),
    Field('device_memory_gb', None, float, ABOVE_0, 'None: as a device reports', 'none free'),
    Field('dataset.name', None, str, '', 'real images; a distillation only evaluates on them; '
          'None: fresh synthetic images replace them', 'none path'),
    Field('dataset.data_dir', None, str, '', "folder of data sets; None: the embedded ones, then "
          "TFDS' folder", 'none path free'),
    Field('dataset.image_shape', (32, 32, 3), int, FROM_1, '(height, width, channels)', '', 3),
    Field('dataset.num_classes', 10, int, '[2, inf)', 'number of classes'),
    Field('dataset.ignore', 255, int, '[0, 255]', 'label of unlabelled pixels, in masks'),
    Field('dataset.train_split', 'train', str, '', 'split to train on'),
    Field('dataset.test_split', 'test', str, '', 'split to evaluate on'),
    Field('dataset.count_void', False, bool, '',
          'whether mean_iou_void picks the best round: unlabelled pixels are false positives'),
    Field('dataset.crop', None, float, SHARE, 'share of the short side of photos', 'none'),
    Field('dataset.resize', False, bool, '', 'whether images and masks are resized to image_shape'),
    *_network('teacher', 'the teacher'), *_network('student', 'the student', is_trained=False),
    Field('student.head_width', None, int, FROM_1,
          'units of a hidden layer before its last dense layer; None: no such layer', 'none'),
    Field('student.head_init', 'random', str, HEADS,
          'how its head begins: random, or fitted once in closed form'),
    Field('student.head_round', None, int, FROM_1, 'rounds before that fit; None: '
          'distill.distill_after and a quarter of the rounds with student steps', 'none'),
    Field('student.head_images', 4096, int, FROM_1, 'synthesised images of that fit'),
    *_network('judge', 'a second trained network that looks at the images'),
    Field('generator.name', 'generator', str, tuple(GENERATORS), 'the generator'),
    Field('generator.options', {}, dict, '', 'further arguments of the generator'),
    Field('generator.image_shape', None, int, FROM_1,
          'shape of synthesised images; None: dataset.image_shape', 'none', 3),
    Field('method.name', None, str, '', 'the method, one of `synth.names()`', 'none'),
    Field('factors.one_hot', 0.0, float, FROM_0, 'of the cross-entropy with requested classes'),
    Field('factors.batch_norm', 0.0, float, FROM_0, "of the distance from the teacher's moments"),
    Field('factors.relative_batch_norm', 0.0, float, FROM_0, 'of the same, relative to each layer'),
    Field('factors.adversarial', 0.0, float, FROM_0, 'of the disagreement of student and teacher'),
    Field('factors.balance', 0.0, float, FROM_0, 'of the balance of classes in a batch'),
    Field('factors.activation', 0.0, float, FROM_0, "of the size of the teacher's features"),
    Field('factors.total_variation', 0.0, float, FROM_0, 'of the total variation of images'),
    Field('factors.l2', 0.0, float, FROM_0, 'of the norm of images'),
    Field('factors.student_batch_norm', 0.0, float, FROM_0,
          "of the distance from the student's moments, negated"),
    Field('factors.contrast', 0.0, float, FROM_0, "of CMI's contrast"),
    Field('preflight.enabled', True, bool, '', 'whether to measure the teacher before a run'),
    Field('preflight.batch_size', 32, int, FROM_1, 'images to measure it on'),
    Field('preflight.fallback', False, bool, '', 'whether smoothness may replace missing moments'),
    Field('labels', 'uniform', str, ('uniform', 'stratified', 'balanced'), 'requested classes'),
    *_augmentation('augment.synthesis'), *_augmentation('augment.student'),
    Field('distill.rounds', 220, int, FROM_1, 'rounds: calls of the method and student steps'),
    Field('distill.calls_per_round', 1, int, FROM_1, 'calls of the method in a round'),
    Field('distill.steps_per_round', 400, int, FROM_1, 'student steps, shared by the calls'),
    Field('distill.distill_after', 20, int, FROM_0, 'rounds before the first student step'),
    Field('distill.batch_size', 256, int, FROM_1, 'images of a student step, on all devices'),
    Field('distill.temperature', 20.0, float, ABOVE_0, 'temperature of the divergence kl'),
    Field('distill.divergence', 'kl', str, ('kl', 'l1', 'l2'), "the student's loss"),
    Field('distill.mosaic', 1, int, FROM_1,
          'images on a side of the mosaics that the networks see; above 1 in segmentation only'),
    Field('distill.attention_factor', 0.0, float, FROM_0, "factor of ZSKT's attention transfer"),
    Field('train.network', 'student', str, ('teacher', 'student'), 'network to train'),
    Field('train.epochs', 200, int, FROM_1, 'epochs'),
    Field('train.batch_size', 128, int, FROM_1, 'images of a step, on all devices'),
    Field('train.label_factor', 1.0, float, FROM_0, 'factor of the cross-entropy with labels'),
    Field('train.teacher_factor', 0.0, float, FROM_0, 'factor of the divergence from a teacher'),
    Field('train.temperature', 1.0, float, ABOVE_0, 'temperature of that divergence'),
    Field('train.label_smoothing', 0.0, float, DECAY, 'smoothing of labels'),
    Field('train.class_weights', 'none', str, ('none', 'median_frequency'),
          'weights of the cross-entropy by class'),
    Field('train.focal_gamma', 0.0, float, FROM_0, 'exponent of the focal loss; 0: cross-entropy'),
    Field('optimizer.name', 'sgd', str, ('sgd', 'adam'), 'the optimizer'),
    Field('optimizer.learning_rate', 0.1, float, ABOVE_0, 'its highest learning rate'),
    Field('optimizer.momentum', 0.9, float, DECAY, 'momentum of sgd'),
    Field('optimizer.nesterov', False, bool, '', "whether sgd's momentum is Nesterov's"),
    Field('optimizer.weight_decay', 1e-4, float, FROM_0, 'coupled weight decay'),
    Field('optimizer.schedule', 'cosine_by_round', str, SCHEDULES, 'schedule of the learning rate'),
    Field('optimizer.end_value', 0.0, float, FROM_0, 'learning rate at the end of a cosine'),
    Field('optimizer.warmup_steps', 0, int, FROM_0, 'steps of warm-up before cosine_by_step'),
    Field('optimizer.milestones', (), int, FROM_0, 'epochs of the schedule steps', '', 0),
    Field('optimizer.gamma', 0.1, float, SHARE, 'multiplier of the rate at each milestone'),
    Field('control', False, bool, '', 'whether to train a second student on noise, for comparison'),
    Field('evaluate.every', 1, int, FROM_1, 'rounds or epochs between evaluations'),
    Field('evaluate.batch_size', 500, int, FROM_1, 'images of an evaluation batch'),
    Field('checkpoint.every', 10, int, FROM_1, 'rounds or epochs between checkpoints'),
    Field('checkpoint.max_to_keep', 2, int, FROM_1, 'checkpoints to keep'),
    Field('checkpoint.keep_best', True, bool, '', 'whether to keep the best student too'),
    Field('budget.minutes', None, float, ABOVE_0, 'of one start; ends a run early', 'none free'),
    Field('budget.images', None, int, FROM_1, 'synthesised images of the run', 'none free'),
    Field('faults.reseed', 0, int, FROM_0, 'repeats of a round with non-finite numbers', 'free'),
    Field('init_from.student', None, str, '', "an old run's folder, or weights", 'none path'),
    Field('init_from.generator', None, str, '', "an old run's folder", 'none path'),
    Field('grid.columns', 10, int, FROM_1, 'columns of images.png'),
    Field('grid.rows', 5, int, FROM_1, 'rows of images.png'),
    Field('compilation_cache', None, str, '', 'folder of compiled programs', 'none path free'),
    Field('distributed.coordinator', None, str, '', 'host:port of process 0, or auto', 'none free'),
    Field('distributed.num_processes', None, int, FROM_1, '1: this process alone', 'none free'),
    Field('distributed.process_id', None, int, FROM_0, 'number of this process', 'none free'),
    Field('distributed.timeout', 300, int, FROM_1, 'seconds to wait for the others', 'free'),
)
# In a config if its method has them. None: the method's own default.
METHOD_FIELDS = tuple(Field(f'method.{name}', NO_DEFAULT, *row) for name, *row in (
    ('num_steps', int, FROM_1, 'inner steps of a call'),
    ('batch_size', int, FROM_1, 'images of a task in a call'),
    ('num_tasks', int, FROM_1, 'inversions in a call, on all devices'),
    ('capacity', int, FROM_1, 'images in the replay buffer, on all devices', 'none'),
    ('latent_dim', int, FROM_1, 'size of a latent', 'none'),
    ('adversarial_after', int, FROM_0, 'calls before the adversarial term starts', 'none'),
    ('generator_lr', float, ABOVE_0, 'learning rate of the generator', 'none'),
    ('generator_schedule', str, ('constant', 'cosine', 'steps'), 'its schedule', 'none'),
    ('generator_milestones', int, FROM_0, 'rounds of its schedule steps', '', 0),
    ('generator_gamma', float, SHARE, 'multiplier of its rate at each milestone', 'none'),
    ('latent_lr', float, ABOVE_0, 'learning rate of the latents', 'none'),
    ('learning_rate', float, ABOVE_0, 'learning rate of the pixels', 'none'),
    ('adam_b1', float, DECAY, "decay of Adam's first moment", 'none'),
    ('adam_b2', float, DECAY, "decay of Adam's second moment", 'none'),
    ('moments_momentum', float, DECAY, 'share of former calls in the matched moments', 'none'),
    ('ema_decay', float, DECAY, "decay of the generator's moving average", 'none'),
    ('ema_share', float, '(0, 1)', "share of the student's images from that average", 'none'),
    ('meta_lr', float, ABOVE_0, 'learning rate of the meta-generator', 'none'),
    ('reset_after', int, FROM_0, 'calls before the first layers are redrawn', 'none'),
    ('restart_every', int, FROM_1, 'calls between fresh latents, if latents are carried', 'none'),
    ('redraw_every', int, FROM_1, 'calls that a redrawn generator lasts', 'none'),
    ('redraw_std', float, ABOVE_0, 'standard deviation of redrawn weights', 'none'),
    ('init_std', float, ABOVE_0, "standard deviation of the generator's first weights", 'none'),
    ('adversary.temperature', float, ABOVE_0, 'temperature of the adversarial term'),
    ('adversary.divergence', str, ('kl', 'js', 'l1', 'log_l1'), 'its divergence'),
    ('adversary.masked', bool, '', 'whether only images of agreement count'),
    ('adversary.train_mode', bool, '', "whether the student's batch norms take batch moments"),
    ('adversarial.init_value', float, FROM_0, 'first factor of a ramp', 'none'),
    ('adversarial.slope', float, FROM_0, 'increase of the factor in an epoch', 'none'),
    ('adversarial.begin', int, FROM_0, 'epoch after which the ramp rises', 'none'),
    ('adversarial.end', int, FROM_0, 'epoch in which the ramp ends', 'none'),
    ('adversarial.every', int, FROM_1, 'calls of an epoch', 'none'),
    ('balance_temperature', float, ABOVE_0, 'temperature of the balance term', 'none'),
    ('bank_size', int, FROM_1, 'images in the memory bank, on all devices', 'none'),
    ('num_negatives', int, FROM_1, 'rows of the bank in a contrast', 'none'),
    ('projection_size', int, FROM_1, 'size of a projected feature', 'none'),
    ('contrast_temperature', float, ABOVE_0, 'temperature of the contrast', 'none'),
    ('head_lr', float, ABOVE_0, 'learning rate of the projection head', 'none'),
    ('embeddings', str, '', 'file with an embedding of each class', 'none path'),
    ('gamma', float, FROM_0, 'exponent of the difficulty', 'none'),
    ('beta', float, FROM_0, 'exponent of the importance weights', 'none'),
    ('epsilon', float, ABOVE_0, 'least priority', 'none'),
    ('clip_weights', float, ABOVE_0, 'largest importance weight', 'none'),
    ('threshold_start', float, ABOVE_0, "the curriculum's first threshold", 'none'),
    ('threshold_growth', float, FROM_0, 'growth of the threshold in a step', 'none'),
))
BY_NAME = {field.name: field for field in (*RUN_FIELDS, *METHOD_FIELDS)}
FREE = frozenset(field.name for field in RUN_FIELDS if 'free' in field.flags)
# Sections that may have other fields too: arguments of a method, an augmentation or a network.
OPEN = ('method', 'augment.synthesis', 'augment.student',
        *(field.name for field in RUN_FIELDS if field.kind is dict))


def base() -> config_dict.ConfigDict:
  """Returns a config with all fields at their defaults, without the numbers of any method."""
  sections: dict[str, Any] = {}
  for field in RUN_FIELDS:
    *parents, name = field.name.split('.')
    section = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, sections)
    kind = field.kind if field.length is None else tuple
    section[name] = config_dict.placeholder(kind) if field.default is None else field.default
  return config_dict.create(**sections)


def leaves(section: config_dict.ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the dotted names and values of all fields and sections."""
  for name, value in section.items():
    yield prefix + name, value
    if isinstance(value, config_dict.ConfigDict):
      yield from leaves(value, f'{prefix}{name}.')
