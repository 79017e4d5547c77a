"""Training on real data: teachers, students from scratch, and distillation with data (the published baselines)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dfkd_jax import build, data, distill, parallel, synth
from dfkd_jax.experiment import Experiment
from dfkd_jax.losses import divergence
from dfkd_jax.models import pretrained
from dfkd_jax.models.network import Network
from dfkd_jax.types import Array, Metrics, PRNGKey


def run(config: build.Config, workdir: str) -> dict:
  """Trains `config.train.network` on `config.dataset`; writes weights.safetensors and summary.json."""
  which = synth.known(config.train.network, ('teacher', 'student'), 'train.network')
  mesh = build.mesh(config)
  with Experiment(config, workdir, 'epoch') as experiment:
    with experiment.ledger.part('setup'):
      train = data.load(
          config.dataset.name, config.dataset.train_split, config.dataset.data_dir,
          image_shape=tuple(config.dataset.image_shape))
      batch_size = config.train.batch_size
      parallel.even_share(batch_size, mesh.size, 'train.batch_size')
      steps = len(train.labels) // batch_size
      if not steps:
        raise ValueError(f'train.batch_size is {batch_size}, must be at most the {len(train.labels)} training images.')
      teacher = build.teacher(config) if config.train.teacher_factor else None
      init_key, run_key = jax.random.split(jax.random.key(config.seed))
      tx = build.optimizer(config, config.train.epochs, steps)
      student = parallel.place(mesh, distill.init(build.network(config, which, init_key), tx))
      images, labels = jax.device_put((train.images, train.labels), parallel.replicated(mesh))
    metrics_of_teacher = experiment.follow(teacher) if teacher is not None else None
    student, done = experiment.resume(student)
    epoch = functools.partial(
        _epoch, tx=tx, section=config.train, augment=build.augmentation(config.augment.student))
    program = parallel.each_device(
        epoch, mesh, (parallel.specs(student), parallel.REPLICATED, parallel.REPLICATED, parallel.BATCHES,
                      parallel.REPLICATED, parallel.REPLICATED), parallel.REPLICATED, donate=(0,))
    order_of = jax.jit(lambda key: jax.random.permutation(key, len(train.labels))[:steps * batch_size].reshape(
        steps, batch_size))

    def advance(student, index):
      key_order, key_augment = jax.random.split(jax.random.fold_in(run_key, index))
      with experiment.ledger.part('student'):
        student, metrics = program(student, images, labels, order_of(key_order), key_augment, teacher)
        return student, {name: float(value) for name, value in metrics.items()}

    student = experiment.loop(student, done, config.train.epochs, advance, lambda state: state.network)
    write_weights(experiment.workdir / 'weights.safetensors', student.network, config[which].name)
    return experiment.summary(
        student={'last': experiment.last, 'best': experiment.best}, teacher=metrics_of_teacher,
        parameters={'student': student.network.num_params(), 'teacher': teacher and teacher.num_params()})


def _epoch(
    student: distill.Student, images: Array, labels: Array, order: Array, key: PRNGKey, teacher: Network | None, *,
    tx: optax.GradientTransformation, section: build.Config, augment, axis: str | None,
) -> tuple[distill.Student, Metrics]:
  """One pass: order [steps, B] of images [N, H, W, C] uint8. Loss: label_factor CE + teacher_factor T^2 KL."""
  augment = parallel.by_task(augment, 1, axis)

  def step(student, inputs):
    chosen, step_key = inputs
    batch = augment(step_key, images[chosen].astype(jnp.float32) / 255)
    wanted = teacher(batch).logits if teacher is not None else None

    def loss_fn(logits):
      targets = optax.smooth_labels(jax.nn.one_hot(labels[chosen], logits.shape[-1]), section.label_smoothing)
      loss = section.label_factor * optax.softmax_cross_entropy(logits, targets).mean()
      if wanted is not None:
        loss += section.teacher_factor * divergence.kl(logits, wanted, section.temperature).mean()
      return loss, (logits.argmax(-1) == labels[chosen]).mean()

    student, loss, hits = distill.train_step(student, batch, loss_fn, tx, axis)
    return student, {'loss': loss, 'train_top1': parallel.pmean(hits, axis)}

  student, metrics = lax.scan(step, student, (order, jax.random.split(key, order.shape[0])))
  return student, jax.tree.map(jnp.mean, metrics)


def write_weights(path: pathlib.Path, network: Network, name: str) -> None:
  """Variables of a network as safetensors, which `teacher.source` takes."""
  variables = jax.device_get({'params': network.params, 'batch_stats': network.batch_stats})
  pretrained.save_safetensors(path, variables, {'model': name, 'mean': str(network.mean), 'std': str(network.std)})
