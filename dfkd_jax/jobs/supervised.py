"""Training on real data: teachers, students from scratch, and distillation with data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfkd_jax import augment, distill, parallel
from dfkd_jax.config import build
from dfkd_jax.config.records import Settings
from dfkd_jax.losses import divergence
from dfkd_jax.losses import labels as label_losses
from dfkd_jax.runs import init_from, non_finite
from dfkd_jax.runs.loop import Experiment, Start, round_key
from dfkd_jax.types import Array, PRNGKey


def run(settings: Settings, start: Start) -> dict[str, Any]:
  """Trains the network that `train.network` names on the training images.

  Writes metrics.jsonl, summary.json, weights.safetensors, weights_best.safetensors and checkpoints.
  In the summary, `student` is the trained network, and `network` its role.
  """
  with parallel.raise_on_all_processes():
    job = _Training(settings, start)
    if (summary := job.store.finished_summary()) is not None:
      return summary
    student = job.load_images_and_student()
  job.compile(student)
  with job.experiment.open():  # nothing is written before
    return job.run_epochs(student)


class _Training:
  """The stages of a training, in order; each sets what later ones need."""

  def __init__(self, settings: Settings, start: Start):
    self.settings, self.train, self.role = settings, settings.train, settings.train.network
    self.task, self.class_weights = settings.task, None
    self.network = getattr(settings, self.role)
    self.init_key, self.run_key = jax.random.split(jax.random.key(settings.run.seed))
    self.experiment = experiment = Experiment(settings, start, 'epoch')
    self.mesh, self.ledger, self.store = experiment.mesh, experiment.ledger, experiment.store
    self.teacher, digest = None, None
    with self.ledger.part('setup'):
      if self.train.teacher_factor:
        teacher = build.trained_network(self.settings.teacher)
        digest = build.make_card(teacher, self.settings.teacher.source).sha256
        self.teacher = parallel.place(self.mesh, teacher)
      self.unread = self.store.check_identity(self.settings, digest)

  def load_images_and_student(self) -> distill.Student:
    """Loads the training images onto the devices; returns the network before its first step."""
    with self.ledger.part('setup'):
      dataset = self.settings.dataset
      images = build.load_split(dataset, self.task, dataset.train_split)
      self.num_images, batch_size = len(images.labels), self.train.batch_size
      self.steps = self.num_images // batch_size
      if not self.steps:
        raise ValueError(f'train.batch_size is {batch_size}, must be at most {self.num_images} '
                         'images.')
      if self.train.class_weights == 'median_frequency':
        self.class_weights = jnp.asarray(label_losses.median_frequency(
            images.labels, self.task.num_classes, self.task.ignore))
      self.images, self.labels = parallel.place(
          self.mesh, (images.images, images.labels), parallel.REPLICATED)
      network = init_from.load_student(self.network, self.init_key, self.unread.student)
      self.tx = build.optimizer(self.settings.optimizer, self.train.epochs, self.steps)
      return parallel.place(self.mesh, distill.init(network, self.tx))

  def compile(self, student: distill.Student) -> None:
    """Compiles an epoch."""
    parallel.check_same_on_all(str(self.store.meta['weights']), "The teacher's weights")
    with self.ledger.part('compile'):
      self.check_state = non_finite.compile_check(student)
      one = parallel.REPLICATED
      program = parallel.each_device(
          self._epoch, self.mesh, (one, one, one, parallel.BATCHES, one, one), one, donate=(0,))
      self.program = program.lower(
          student, self.images, self.labels, self.draw_order(self.run_key), self.run_key,
          self.teacher).compile()

  def draw_order(self, key: PRNGKey) -> Array:
    """Returns indices of an epoch's images, [steps, B] int32 on their devices, none twice."""
    order = jax.random.permutation(key, self.num_images)
    order = order[:self.steps * self.train.batch_size].reshape(self.steps, -1)
    return parallel.place(self.mesh, order, parallel.BATCHES)

  def run_epochs(self, student: distill.Student) -> dict[str, Any]:
    """Runs all epochs that are not done; writes the network and the summary."""
    build.note_idle_devices(self.settings, self.mesh.size)
    student, done = self.store.resume(student, 'epoch', self.train.epochs)
    if self.teacher is not None:
      self.experiment.cache_teacher_predictions(self.teacher)
    student = self.experiment.loop(student, done, self.train.epochs, self.advance,
                                   lambda state, _: self.experiment.evaluate(state.network))
    files = self.experiment.write_networks('weights', student.network, self.network)
    parameters = {'student': student.network.num_params(),
                  'teacher': self.teacher and self.teacher.num_params()}
    return self.experiment.write_summary(
        files, network=self.role, synthetic=False, parameters=parameters)

  def advance(self, student: distill.Student, index: int, reseeded: int):
    """Runs an epoch; returns the student and the numbers to log."""
    key = round_key(self.run_key, index, reseeded)
    key_order, key_augment = jax.random.split(key)
    with self.ledger.part('student'):
      student, metrics = self.program(student, self.images, self.labels,
                                      self.draw_order(key_order), key_augment, self.teacher)
      losses = np.asarray(metrics.pop('losses'))
    self.ledger.count('seen', self.steps * self.train.batch_size)
    non_finite.check_series('student', {'loss': losses}, key)
    self.check_state(student, key)
    return student, {name: float(value) for name, value in metrics.items()}

  def _epoch(self, student, images, labels, order, key, teacher, *, axis):
    """Trains on uint8 images [N, H, W, C] in the order [steps, B]."""
    train, accuracy = self.train, 'train_pixels' if self.task.label_axes else 'train_top1'

    def step(student, inputs):
      indices, step_key = inputs
      key, = parallel.task_keys(step_key, 1, axis)
      batch, known = self._augment(
          key, (images[indices].astype(jnp.float32) / 255, labels[indices]))
      targets = teacher(batch).logits if teacher is not None else None

      def loss_fn(outputs):
        # label_factor CE + teacher_factor T^2 KL(teacher || student)
        losses = label_losses.focal(outputs.logits, known, gamma=train.focal_gamma,
                                    smoothing=train.label_smoothing)
        loss = train.label_factor * self._weighted_mean(losses, known, axis)
        if targets is not None:
          kl = divergence.kl(outputs.logits, targets, train.temperature)
          loss += train.teacher_factor * kl.mean()
        is_known = known != self.task.ignore
        hits = (outputs.logits.argmax(-1) == known) & is_known
        return loss, hits.sum() / jnp.maximum(is_known.sum(), 1)

      student, loss, hits = distill.train_step(student, batch, loss_fn, self.tx, axis)
      return student, {'loss': loss, accuracy: parallel.pmean(hits, axis)}

    student, metrics = lax.scan(step, student, (order, jax.random.split(key, order.shape[0])))
    return student, jax.tree.map(jnp.mean, metrics) | {'losses': metrics['loss']}

  def _augment(self, key, batch):
    """Augments images, and their labels if these are masks."""
    images, labels = batch
    function = augment.create(**self.settings.augment)
    if not self.task.label_axes:
      return function(key, images), labels
    return augment.with_masks(function, key, images, labels, num_classes=self.task.num_classes,
                              ignore=self.task.ignore)

  def _weighted_mean(self, losses, labels, axis):
    """Averages losses over the labelled pixels of all devices, weighed by class."""
    if not self.task.label_axes and self.class_weights is None:
      return losses.mean()
    weights = jnp.ones(self.task.num_classes) if self.class_weights is None else self.class_weights
    weights = jnp.where(labels == self.task.ignore, 0.0, weights[labels.clip(0, len(weights) - 1)])
    total = parallel.pmean(weights.sum(), axis)
    return (weights * losses).sum() / jnp.maximum(total, 1e-6)
