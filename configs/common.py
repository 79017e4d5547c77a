"""Every field that a run reads, and the arguments after the colon of `--config=FILE:ARGUMENTS`."""

from ml_collections import config_dict

from dfkd_jax import messages


def base() -> config_dict.ConfigDict:
  """All fields; what has no meaning without a data set or a method is None."""
  config = config_dict.create(
      job='distill',  # 'distill' without data, or 'train' on real data
      seed=0,
      num_devices=config_dict.placeholder(int),  # None: as many as method.num_tasks can be spread over
      precision=config_dict.placeholder(str),  # of matrix products, 'highest' against TF32; None: JAX's default
      compute_dtype=config_dict.placeholder(str),  # of networks and generator, 'bfloat16'; what is kept is float32
      remat=False,  # compute maps within blocks again in the backward pass, instead of keeping them
      buffer='auto',  # where the images are kept: 'device', 'host', or on the host if the devices' memory is too small
      device_memory_gb=config_dict.placeholder(float),  # that 'auto' reckons with; None: what a device says it has
      dataset=dict(  # for evaluation, and for training teachers; never seen by a distillation
          name=config_dict.placeholder(str),  # None: no real images; held-out synthetic ones take their place
          data_dir=config_dict.placeholder(str),  # None: what the package embeds, then the default of TFDS
          image_shape=(32, 32, 3), num_classes=10, train_split='train', test_split='test',
          crop=config_dict.placeholder(float)),  # share of the short side of photos of any size, ImageNet's 0.875
      teacher=_network(source=config_dict.placeholder(str)),  # weights: file, folder, hf:..., embedded:...
      student=_network(),
      judge=_network(source=config_dict.placeholder(str)),  # looks at the images, if it is named
      generator=dict(name='generator', options={}),
      method=dict(name=config_dict.placeholder(str)),  # and the numbers of that method
      factors=dict(one_hot=0.0, batch_norm=0.0, relative_batch_norm=0.0, adversarial=0.0, balance=0.0, activation=0.0,
                   total_variation=0.0, l2=0.0, student_batch_norm=0.0, contrast=0.0),
      preflight=dict(  # looks at the teacher before anything is spent on it
          enabled=True, batch_size=32,
          fallback=False),  # whether to go on by priors of images where the teacher has no moments to match
      labels='uniform',  # the classes asked for: 'uniform', 'stratified' or 'balanced'
      augment=dict(synthesis=_augmentation(), student=_augmentation()),
      distill=dict(  # a round: calls of the method, each followed by its share of the student's steps
          rounds=220, calls_per_round=1, steps_per_round=400, distill_after=20, batch_size=256, temperature=20.0,
          divergence='kl', attention_factor=0.0),
      train=dict(network='student', epochs=200, batch_size=128, label_factor=1.0, teacher_factor=0.0,
                 temperature=1.0, label_smoothing=0.0),
      optimizer=dict(name='sgd', learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4,
                     schedule='cosine_by_round', end_value=0.0, warmup_steps=0, milestones=(), gamma=0.1),
      control=False,  # train a control student on noise as well
      evaluate=dict(every=1, batch_size=500),
      checkpoint=dict(
          every=10, max_to_keep=2,
          keep_best=True),  # the best student too: in the checkpoints, and at the end in a file of its own
      budget=dict(  # what may be spent; the run ends after the round that does, and may be gone on with
          minutes=config_dict.placeholder(float),  # of each start, which does a round at least
          images=config_dict.placeholder(int)),  # synthesised, in the whole run
      faults=dict(reseed=0),  # how often a round with a number that is not finite is done again with other keys
      init_from=dict(  # an old run's folder, in which to look for what a new run begins with
          student=config_dict.placeholder(str),  # or a file of weights
          generator=config_dict.placeholder(str)),
      grid=dict(columns=10, rows=5),
      compilation_cache=config_dict.placeholder(str),  # a folder for compiled programs
      distributed=dict(  # several processes; on SLURM, Open MPI and TPU pods on Kubernetes they find each other
          coordinator=config_dict.placeholder(str),  # 'host:port' of the first process; 'auto': as JAX finds out
          num_processes=config_dict.placeholder(int),  # 1: by itself, whatever a cluster says
          process_id=config_dict.placeholder(int),
          timeout=300),  # seconds to wait for the others
  )
  return config


def _network(**more) -> dict:
  """A network; images in [0, 1] are resized to `resize`, normalised, and with `bgr` their channels turned around."""
  return dict(
      name=config_dict.placeholder(str), options={}, mean=(0.0,), std=(1.0,), bgr=False,
      resize=config_dict.placeholder(tuple), **more)


def _augmentation() -> dict:
  """A function of dfkd_jax/augment.py and its arguments; None: as that has them, and where it has them."""
  return dict(
      name='crop_and_flip', pad=config_dict.placeholder(int), scale=config_dict.placeholder(tuple),
      align_corners=config_dict.placeholder(bool))


def averaged() -> dict:
  """Fields of a method whose generator may have a moving average; None: it has not, and a share of a half."""
  return dict(ema_decay=config_dict.placeholder(float), ema_share=config_dict.placeholder(float))


def pick(arguments: str, **choices: tuple[str, ...]) -> dict[str, str]:
  """Sorts comma-separated arguments into groups; the first of a group is its default.

  Args:
    arguments: Such as 'fast_dfkd,fast5,wrn40_2-wrn16_1', in any order; each may be left out.
    **choices: What is allowed, by group; None where a group has no default.

  Raises:
    ValueError: An argument that no group has, or two of one group.
  """
  picked = {}
  for argument in filter(None, arguments.split(',')):
    groups = [group for group, allowed in choices.items() if argument in allowed]
    known = [choice for allowed in choices.values() for choice in allowed if choice]
    if not groups:
      messages.check_choice(argument, known, 'config argument')
    if groups[0] in picked:
      raise ValueError(f'Config arguments {picked[groups[0]]!r} and {argument!r} exclude each other.')
    picked[groups[0]] = argument
  return {group: allowed[0] for group, allowed in choices.items()} | picked
