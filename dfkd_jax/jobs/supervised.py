"""Training on real data: teachers, students from scratch, and distillation with data."""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from dfkd_jax import augment, distill, parallel
from dfkd_jax.config import build, build_optimizer
from dfkd_jax.config.records import Settings, Train
from dfkd_jax.jobs.round import round_key
from dfkd_jax.losses import divergence
from dfkd_jax.models.network import Network
from dfkd_jax.runs import init_from, non_finite
from dfkd_jax.runs.loop import Experiment, Start
from dfkd_jax.runs.results import write_networks
from dfkd_jax.types import Array, Metrics, PRNGKey


def run(settings: Settings, start: Start) -> dict[str, Any]:
  """Trains the network that `train.network` names on the training images.

  Writes metrics.jsonl, summary.json, weights.safetensors, weights_best.safetensors and checkpoints.
  In the summary `student` is the trained network, `network` its role, and `teacher` the network
  that it learns from.
  """
  section, role, mesh = settings.train, settings.train.network, build.make_mesh(settings)
  with parallel.raise_on_all_processes():
    experiment = Experiment(settings, start, 'epoch')
    store = experiment.store
    with experiment.ledger.part('setup'):
      teacher = build.trained_network(settings.teacher) if section.teacher_factor else None
      card = teacher and build.make_card(teacher, settings.teacher.source)
      unread = init_from.unread_sources(settings.init_from, store.stored, settings.control)
      store.check_identity(
          teacher=card and card.sha256,
          **init_from.source_digests(settings.init_from, unread, store.stored))
    if (summary := store.finished_summary()) is not None:
      return summary
    with experiment.ledger.part('setup'):
      train = build.load_split(settings.dataset, settings.dataset.train_split)
      steps = len(train.labels) // section.batch_size
      if not steps:
        raise ValueError(f'train.batch_size is {section.batch_size}, must be at most '
                         f'{len(train.labels)}, all training images.')
      init_key, run_key = jax.random.split(jax.random.key(settings.run.seed))
      teacher = teacher and parallel.place(mesh, teacher)
      network = build.fresh_network(getattr(settings, role), init_key)
      network = init_from.load_student(network, unread.student, settings.dataset.image_shape)
      tx = build_optimizer.optimizer(settings.optimizer, section.epochs, steps)
      student = parallel.place(mesh, distill.init(network, tx))
      images, labels = parallel.place(mesh, (train.images, train.labels), parallel.REPLICATED)
  parallel.check_same_on_all(json.dumps(store.meta['weights']), "The teacher's weights")
  with experiment.ledger.part('compile'):
    draw_order = _order_sampler(len(train.labels), steps, section.batch_size, mesh)
    finite = non_finite.compile_finite_check(student)
    epoch = functools.partial(_epoch, tx=tx, settings=section,
                              augment=augment.create(**settings.augment))
    program = _compile_epoch(
        epoch, mesh, (student, images, labels, draw_order(run_key), run_key, teacher))

  def advance(student, index, reseeded):
    key = round_key(run_key, index, reseeded)
    key_order, key_augment = jax.random.split(key)
    with experiment.ledger.part('student'):
      student, metrics = program(
          student, images, labels, draw_order(key_order), key_augment, teacher)
      losses = np.asarray(metrics.pop('losses'))
    experiment.ledger.count('seen', steps * section.batch_size)
    with non_finite.attach_key(key):
      non_finite.check_series('student', {'loss': losses})
      finite.check(student)
    return student, {name: float(value) for name, value in metrics.items()}

  with experiment:  # nothing is written before
    build.note_idle_devices(settings, mesh.size)
    student, done = store.resume(student, 'epoch', section.epochs)
    teacher_metrics = teacher and experiment.cache_teacher_predictions(teacher)
    student = experiment.loop(student, done, section.epochs, advance,
                              lambda state, _: experiment.evaluate(state.network))
    files = write_networks(experiment.workdir, 'weights', student.network, store.best_network,
                           getattr(settings, role))
    return experiment.write_summary(
        num_devices=mesh.size, files=files, network=role, synthetic=False, teacher=teacher_metrics,
        parameters={'student': student.network.num_params(),
                    'teacher': teacher and teacher.num_params()})


def _order_sampler(
    num_images: int, steps: int, batch_size: int, mesh: Mesh) -> Callable[[PRNGKey], Array]:
  """Returns key -> indices of an epoch's images, [steps, B] int32 on their devices, none twice."""

  @jax.jit
  def draw(key):
    order = jax.random.permutation(key, num_images)
    return order[:steps * batch_size].reshape(steps, batch_size)

  return lambda key: parallel.place(mesh, draw(key), parallel.BATCHES)


def _compile_epoch(epoch: Callable, mesh: Mesh, arguments: tuple) -> Any:
  one = parallel.REPLICATED
  places = (one, one, one, parallel.BATCHES, one, one)
  return parallel.each_device(epoch, mesh, places, one, donate=(0,)).lower(*arguments).compile()


def _epoch(
    student: distill.Student, images: Array, labels: Array, order: Array, key: PRNGKey,
    teacher: Network | None, *, tx: optax.GradientTransformation, settings: Train,
    augment: Callable, axis: str | None) -> tuple[distill.Student, Metrics]:
  """One pass over the images [N, H, W, C] uint8 in the order [steps, B].

  Loss: label_factor CE + teacher_factor T^2 KL(teacher || student).
  """
  augment = parallel.by_task(augment, 1, axis)

  def step(student, inputs):
    indices, step_key = inputs
    batch = augment(step_key, images[indices].astype(jnp.float32) / 255)
    targets = teacher(batch).logits if teacher is not None else None

    def loss_fn(outputs):
      logits = outputs.logits
      one_hot = jax.nn.one_hot(labels[indices], logits.shape[-1])
      smoothed = optax.smooth_labels(one_hot, settings.label_smoothing)
      loss = settings.label_factor * optax.softmax_cross_entropy(logits, smoothed).mean()
      if targets is not None:
        kl = divergence.kl(logits, targets, settings.temperature).mean()
        loss += settings.teacher_factor * kl
      return loss, (logits.argmax(-1) == labels[indices]).mean()

    student, loss, hits = distill.train_step(student, batch, loss_fn, tx, axis)
    return student, {'loss': loss, 'train_top1': parallel.pmean(hits, axis)}

  student, metrics = lax.scan(step, student, (order, jax.random.split(key, order.shape[0])))
  return student, jax.tree.map(jnp.mean, metrics) | {'losses': metrics['loss']}
