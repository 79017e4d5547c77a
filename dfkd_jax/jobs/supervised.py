"""Training on real data: teachers, students from scratch, and distillation with data (the published baselines)."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from dfkd_jax import distill, parallel, report, weights
from dfkd_jax.config import build, records
from dfkd_jax.losses import divergence
from dfkd_jax.messages import check_choice
from dfkd_jax.models.network import Network
from dfkd_jax.runs import init_from, non_finite
from dfkd_jax.runs import signals as run_signals
from dfkd_jax.runs.loop import Experiment
from dfkd_jax.types import Array, Metrics, PRNGKey


def run(
    config: build.Config, workdir: str, command: str | None = None, resume: str | None = None,
    asked: run_signals.StopRequest | None = None,
) -> dict[str, Any]:
  """Trains `config.train.network` on `config.dataset`.

  Writes metrics.jsonl, summary.json, weights.safetensors, weights_best.safetensors and checkpoints. In the summary
  `student` is the network that was trained, `network` says whether the config calls it teacher or student, and
  `teacher` is whom it follows.
  """
  section = config.train
  which = check_choice(section.network, ('teacher', 'student'), 'train.network')
  mesh = build.mesh(config)
  parallel.even_share(section.batch_size, mesh.size, 'train.batch_size')
  with parallel.raise_on_all_processes():
    experiment = Experiment(config, workdir, 'epoch', command, resume, asked)
    with experiment.ledger.part('setup'):
      teacher = build.teacher(config) if section.teacher_factor else None
      sources, stored = records.InitFrom(**config.init_from), experiment.store.stored
      unread = init_from.unread_sources(sources, stored, config.control)
      experiment.store.check_identity(
          teacher=teacher and build.card(teacher, config.teacher.source).sha256,
          **init_from.source_digests(sources, unread, stored))
    if (summary := experiment.store.finished_summary()) is not None:
      return summary
    with experiment.ledger.part('setup'):
      train = experiment.load(config.dataset.train_split)
      steps = len(train.labels) // section.batch_size
      if not steps:
        raise ValueError(
            f'train.batch_size is {section.batch_size}, must be at most {len(train.labels)}, all training images.')
      init_key, run_key = jax.random.split(jax.random.key(config.seed))
      teacher = teacher and parallel.place(mesh, teacher)
      tx = build.optimizer(config, section.epochs, steps)
      network = init_from.load_student(
          build.network(config, which, init_key), unread.student, tuple(config.dataset.image_shape))
      student = parallel.place(mesh, distill.init(network, tx))
      images, labels = parallel.place(mesh, (train.images, train.labels), parallel.REPLICATED)
  parallel.check_same_on_all(json.dumps(experiment.store.meta['weights']), "The teacher's weights")
  with experiment.ledger.part('compile'):
    order_of = _orders(len(train.labels), steps, section.batch_size, mesh)
    finite = non_finite.compile_finite_check(student)
    program = _compiled_epoch(config, mesh, tx, (student, images, labels, order_of(run_key), run_key, teacher))
  with experiment:  # All that can be wrong was found by now.
    build.tell_unused_devices(config, mesh.size)
    student, done = experiment.store.resume(student, 'epoch', section.epochs)
    metrics_of_teacher = experiment.follow(teacher) if teacher is not None else None

    def advance(student, index, reseeded):
      key = round_key(run_key, index, reseeded)
      key_order, key_augment = jax.random.split(key)
      with experiment.ledger.part('student'):
        student, metrics = program(student, images, labels, order_of(key_order), key_augment, teacher)
        losses = np.asarray(metrics.pop('losses'))
      experiment.ledger.count('seen', steps * section.batch_size)
      with non_finite.attach_key(key):
        non_finite.check_series('student', {'loss': losses})
        finite.check(student)
      return student, {name: float(value) for name, value in metrics.items()}

    student = experiment.loop(
        student, done, section.epochs, advance, lambda state, _: experiment.evaluate(state.network))
    files = write_students(experiment, 'weights', student.network, which)
    return experiment.summary(
        num_devices=mesh.size, files=files, network=which, synthetic=False,
        teacher=metrics_of_teacher,
        parameters={'student': student.network.num_params(), 'teacher': teacher and teacher.num_params()})


def _orders(num_images: int, steps: int, batch_size: int, mesh: Mesh) -> Callable[[PRNGKey], Array]:
  """From a key, the images of an epoch: [steps, B] int32, none twice, each device's on it."""

  @jax.jit
  def order_of(key):
    return jax.random.permutation(key, num_images)[:steps * batch_size].reshape(steps, batch_size)

  return lambda key: parallel.place(mesh, order_of(key), parallel.BATCHES)


def _compiled_epoch(config: build.Config, mesh, tx: optax.GradientTransformation, arguments: tuple):
  epoch = functools.partial(
      _epoch, tx=tx, section=config.train, augment=build.augmentation(config.augment.student))
  one = parallel.REPLICATED
  program = parallel.each_device(epoch, mesh, (one, one, one, parallel.BATCHES, one, one), one, donate=(0,))
  return program.lower(*arguments).compile()


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

    def loss_fn(outputs):
      logits = outputs.logits
      targets = optax.smooth_labels(jax.nn.one_hot(labels[chosen], logits.shape[-1]), section.label_smoothing)
      loss = section.label_factor * optax.softmax_cross_entropy(logits, targets).mean()
      if wanted is not None:
        loss += section.teacher_factor * divergence.kl(logits, wanted, section.temperature).mean()
      return loss, (logits.argmax(-1) == labels[chosen]).mean()

    student, loss, hits = distill.train_step(student, batch, loss_fn, tx, axis)
    return student, {'loss': loss, 'train_top1': parallel.pmean(hits, axis)}

  student, metrics = lax.scan(step, student, (order, jax.random.split(key, order.shape[0])))
  return student, jax.tree.map(jnp.mean, metrics) | {'losses': metrics['loss']}


def round_key(run_key: PRNGKey, number: int, reseeded: int) -> PRNGKey:
  """Of a round or call; another one each time that it is done again."""
  key = jax.random.fold_in(run_key, number)
  return jax.random.fold_in(key, reseeded) if reseeded else key


def write_students(experiment: Experiment, stem: str, network: Network, which: str = 'student') -> tuple[str, ...]:
  """The last network and, where it is kept, the best one; returns the names of the files."""
  found = {f'{stem}.safetensors': network, f'{stem}_best.safetensors': experiment.store.best_network}
  with parallel.raise_on_all_processes():
    for name, each in found.items():
      if each is not None:
        write_weights(experiment.workdir / name, each, experiment.config[which].name,
                      tuple(experiment.config.dataset.image_shape))
  return tuple(name for name, each in found.items() if each is not None)


def write_weights(path: pathlib.Path, network: Network, name: str, image_shape: tuple[int, int, int]) -> None:
  """Variables of a network as safetensors, which `teacher.source` takes; the file is replaced in one go.

  It carries what the network wants of images, and a probe by which whoever reads it may tell that it computes the same.
  """
  if not parallel.is_first():
    return
  network = jax.device_get(parallel.local_copy(network))
  about = {'model': name, 'mean': network.mean, 'std': network.std, 'bgr': network.bgr, 'resize': network.resize}
  data = weights.to_safetensors(
      {'params': network.params, 'batch_stats': network.batch_stats}, {'network': json.dumps(about)},
      probe=weights.make_probe(network, image_shape))
  with report.reporting_disk_errors(path), report.replace_file(path) as file:
    file.write(data)
