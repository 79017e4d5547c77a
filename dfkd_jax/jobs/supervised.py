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

from dfkd_jax import augment, distill, parallel
from dfkd_jax.config import build
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
  with parallel.raise_on_all_processes():
    job = _Training(settings, start)
    job.load_teacher()
    if (summary := job.store.finished_summary()) is not None:
      return summary
    job.load_images()
    student = job.init_student()
  job.compile(student)
  with job.experiment:  # nothing is written before
    student = job.run_epochs(student)
    return job.report(student)


class _Training:
  """The stages of a training, in order; each sets what later ones need."""

  def __init__(self, settings: Settings, start: Start):
    self.settings, self.train, self.role = settings, settings.train, settings.train.network
    self.mesh, self.network = build.make_mesh(settings), getattr(settings, self.role)
    self.init_key, self.run_key = jax.random.split(jax.random.key(settings.run.seed))
    self.experiment = Experiment(settings, start, 'epoch')
    self.ledger, self.store = self.experiment.ledger, self.experiment.store

  def load_teacher(self) -> None:
    """Loads the teacher, if the network learns from one; notes which weights the run stands on."""
    settings, self.teacher, card = self.settings, None, None
    with self.ledger.part('setup'):
      if self.train.teacher_factor:
        self.teacher = build.trained_network(settings.teacher)
        card = build.make_card(self.teacher, settings.teacher.source)
        self.teacher = parallel.place(self.mesh, self.teacher)
      sources, stored = settings.init_from, self.store.stored
      self.unread = init_from.unread_sources(sources, stored, settings.control)
      self.store.check_identity(
          teacher=card and card.sha256,
          **init_from.source_digests(sources, self.unread, stored))

  def load_images(self) -> None:
    """Loads the training images onto the devices."""
    with self.ledger.part('setup'):
      images = build.load_split(self.settings.dataset, self.settings.dataset.train_split)
      self.num_images, batch_size = len(images.labels), self.train.batch_size
      self.steps = self.num_images // batch_size
      if not self.steps:
        raise ValueError(f'train.batch_size is {batch_size}, must be at most {self.num_images}, '
                         'all training images.')
      self.images, self.labels = parallel.place(
          self.mesh, (images.images, images.labels), parallel.REPLICATED)

  def init_student(self) -> distill.Student:
    """Returns the network before its first step."""
    with self.ledger.part('setup'):
      network = build.fresh_network(self.network, self.init_key)
      network = init_from.load_student(
          network, self.unread.student, self.settings.dataset.image_shape)
      self.tx = build.optimizer(self.settings.optimizer, self.train.epochs, self.steps)
      return parallel.place(self.mesh, distill.init(network, self.tx))

  def compile(self, student: distill.Student) -> None:
    """Compiles an epoch."""
    parallel.check_same_on_all(json.dumps(self.store.meta['weights']), "The teacher's weights")
    with self.ledger.part('compile'):
      self.finite = non_finite.compile_finite_check(student)
      epoch = functools.partial(_epoch, tx=self.tx, settings=self.train,
                                augment=augment.create(**self.settings.augment))
      one = parallel.REPLICATED
      program = parallel.each_device(
          epoch, self.mesh, (one, one, one, parallel.BATCHES, one, one), one, donate=(0,))
      self.program = program.lower(
          student, self.images, self.labels, self.draw_order(self.run_key), self.run_key,
          self.teacher).compile()

  def draw_order(self, key: PRNGKey) -> Array:
    """Returns indices of an epoch's images, [steps, B] int32 on their devices, none twice."""
    order = jax.random.permutation(key, self.num_images)
    order = order[:self.steps * self.train.batch_size].reshape(self.steps, -1)
    return parallel.place(self.mesh, order, parallel.BATCHES)

  def run_epochs(self, student: distill.Student) -> distill.Student:
    """Runs all epochs that are not done."""
    build.note_idle_devices(self.settings, self.mesh.size)
    student, done = self.store.resume(student, 'epoch', self.train.epochs)
    self.teacher_metrics = None
    if self.teacher is not None:
      self.teacher_metrics = self.experiment.cache_teacher_predictions(self.teacher)
    return self.experiment.loop(student, done, self.train.epochs, self.advance,
                                lambda state, _: self.experiment.evaluate(state.network))

  def advance(
      self, student: distill.Student, index: int, reseeded: int
  ) -> tuple[distill.Student, dict[str, float]]:
    """Runs one epoch."""
    key = round_key(self.run_key, index, reseeded)
    key_order, key_augment = jax.random.split(key)
    with self.ledger.part('student'):
      student, metrics = self.program(student, self.images, self.labels,
                                      self.draw_order(key_order), key_augment, self.teacher)
      losses = np.asarray(metrics.pop('losses'))
    self.ledger.count('seen', self.steps * self.train.batch_size)
    with non_finite.attach_key(key):
      non_finite.check_series('student', {'loss': losses})
      self.finite.check(student)
    return student, {name: float(value) for name, value in metrics.items()}

  def report(self, student: distill.Student) -> dict[str, Any]:
    """Writes the network and the summary."""
    files = write_networks(self.experiment.workdir, 'weights', student.network,
                           self.store.best_network, self.network)
    return self.experiment.write_summary(
        num_devices=self.mesh.size, files=files, network=self.role, synthetic=False,
        teacher=self.teacher_metrics,
        parameters={'student': student.network.num_params(),
                    'teacher': self.teacher and self.teacher.num_params()})


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
