"""The fields of a config: which there are, of which kind they are, and where their numbers lie."""

import ml_collections

from dfkd_jax.synth import objective

# All fields by section, but for those of a method, of options and of an augmentation, which these know themselves.
_NETWORK = ('name', 'options', 'mean', 'std', 'bgr', 'resize')
FIELDS = {
    '': ('job', 'seed', 'num_devices', 'precision', 'compute_dtype', 'remat', 'buffer', 'device_memory_gb', 'labels',
         'control', 'compilation_cache'),
    'dataset': ('name', 'data_dir', 'image_shape', 'num_classes', 'train_split', 'test_split', 'crop'),
    'teacher': (*_NETWORK, 'source'), 'student': _NETWORK, 'judge': (*_NETWORK, 'source'),
    'generator': ('name', 'options'), 'method': ('name',), 'factors': objective.Factors._fields,
    'preflight': ('enabled', 'batch_size', 'fallback'), 'augment.synthesis': ('name',), 'augment.student': ('name',),
    'distill': ('rounds', 'calls_per_round', 'steps_per_round', 'distill_after', 'batch_size', 'temperature',
                'divergence', 'attention_factor'),
    'train': ('network', 'epochs', 'batch_size', 'label_factor', 'teacher_factor', 'temperature', 'label_smoothing'),
    'optimizer': ('name', 'learning_rate', 'momentum', 'nesterov', 'weight_decay', 'schedule', 'end_value',
                  'warmup_steps', 'milestones', 'gamma'),
    'evaluate': ('every', 'batch_size'), 'checkpoint': ('every', 'max_to_keep', 'keep_best'),
    'budget': ('minutes', 'images'), 'faults': ('reseed',), 'init_from': ('student', 'generator'),
    'grid': ('columns', 'rows'),
    'distributed': ('coordinator', 'num_processes', 'process_id', 'timeout'),
}
OPEN = ('method', 'augment.synthesis', 'augment.student', 'generator.options',
         *(f'{which}.options' for which in ('teacher', 'student', 'judge')))
TEXTS = (
    'job', 'buffer', 'labels', 'precision', 'compute_dtype', 'compilation_cache', 'dataset.name', 'dataset.data_dir',
    'dataset.train_split', 'dataset.test_split', 'teacher.name', 'teacher.source', 'student.name', 'judge.name',
    'judge.source', 'generator.name', 'method.name', 'augment.synthesis.name', 'augment.student.name',
    'distill.divergence', 'train.network', 'optimizer.name', 'optimizer.schedule', 'distributed.coordinator',
    'init_from.student', 'init_from.generator')
FLAGS = (
    'remat', 'control', 'teacher.bgr', 'student.bgr', 'judge.bgr', 'preflight.enabled', 'preflight.fallback',
    'optimizer.nesterov', 'checkpoint.keep_best')
VALUES = (str, bool, int, float, ml_collections.ConfigDict)  # Those of JSON, by themselves and in tuples.
NONE = (  # May be left open.
    'precision', 'compute_dtype', 'compilation_cache', 'dataset.name', 'dataset.data_dir', 'teacher.name',
    'teacher.source', 'student.name', 'judge.name', 'judge.source', 'method.name', 'distributed.coordinator',
    'num_devices', 'device_memory_gb', 'dataset.crop', 'teacher.resize', 'student.resize', 'judge.resize',
    'distributed.num_processes', 'distributed.process_id', 'init_from.student', 'init_from.generator',
    'budget.minutes', 'budget.images')
# Where a number must lie; what a method or an augmentation does not have, or leaves open, is passed over.
RANGES = {
    '[0, 4294967296)': ('seed',),
    '[2, inf)': ('dataset.num_classes',),
    '[1, inf)': (
        'num_devices', 'distributed.num_processes', 'distributed.timeout',
        'dataset.image_shape', 'distill.rounds', 'distill.calls_per_round', 'distill.steps_per_round',
        'distill.batch_size',
        'train.epochs', 'train.batch_size', 'evaluate.every', 'evaluate.batch_size', 'checkpoint.every',
        'checkpoint.max_to_keep', 'budget.images', 'grid.columns', 'grid.rows', 'method.num_steps', 'method.batch_size',
        'method.capacity', 'method.num_tasks', 'method.latent_dim', 'method.bank_size', 'method.num_negatives',
        'method.projection_size', 'method.redraw_every', 'method.restart_every', 'preflight.batch_size',
        'method.adversarial.every', 'teacher.resize', 'student.resize', 'judge.resize'),
    '[0, inf)': (
        'distributed.process_id', 'faults.reseed',
        'distill.distill_after', 'train.label_factor', 'train.teacher_factor', 'optimizer.weight_decay',
        'optimizer.end_value', 'optimizer.warmup_steps', 'optimizer.milestones', 'method.adversarial_after',
        'augment.synthesis.pad', 'augment.student.pad', 'method.adversarial.init_value', 'method.adversarial.slope',
        'method.adversarial.begin', 'method.adversarial.end', 'method.reset_after', 'method.gamma',
        'method.beta', 'method.threshold_growth', 'distill.attention_factor',
        *(f'factors.{name}' for name in objective.Factors._fields)),
    '(0, inf)': (
        'device_memory_gb', 'budget.minutes', 'teacher.std', 'student.std', 'judge.std', 'distill.temperature',
        'train.temperature', 'optimizer.learning_rate',
        'method.generator_lr', 'method.latent_lr', 'method.meta_lr', 'method.learning_rate', 'method.head_lr',
        'method.contrast_temperature', 'method.threshold_start', 'method.balance_temperature', 'method.epsilon',
        'method.adversary.temperature', 'method.init_std', 'method.redraw_std', 'method.clip_weights'),
    '[0, 1)': (
        'train.label_smoothing', 'optimizer.momentum', 'method.adam_b1', 'method.adam_b2', 'method.moments_momentum',
        'method.ema_decay'),
    '(0, 1]': ('optimizer.gamma', 'dataset.crop', 'augment.synthesis.scale', 'augment.student.scale'),
    '(0, 1)': ('method.ema_share',),
    '(-inf, inf)': ('teacher.mean', 'student.mean', 'judge.mean'),
}
# Those that count something.
WHOLE = (
    'seed', 'dataset.num_classes', *RANGES['[1, inf)'], 'distributed.process_id', 'distill.distill_after',
    'optimizer.warmup_steps', 'optimizer.milestones', 'method.adversarial_after', 'method.reset_after',
    'faults.reseed', 'method.adversarial.begin', 'method.adversarial.end')
MOST = 2**31 - 1  # Of what is counted, where JAX counts in 32 bits.
PATHS = (
    'dataset.data_dir', 'dataset.name', 'teacher.source', 'judge.source', 'init_from.student', 'init_from.generator',
    'compilation_cache', 'method.embeddings')
NO_PATHS = ('hf:', 'embedded:')  # What a source begins with that is none.
NEEDED = ('method.batch_size', 'method.num_steps', 'method.num_tasks')  # Of a method that has them.


def every() -> list[str]:
  """Dotted names of all of FIELDS."""
  return [f'{section}.{field}'.lstrip('.') for section, fields in FIELDS.items() for field in fields]
