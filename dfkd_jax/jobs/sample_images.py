"""The images at the end of a run: a picture of them, and the opinion of a judge."""

import jax
import numpy as np

from dfkd_jax import evaluate, parallel, report
from dfkd_jax.config.records import Grid
from dfkd_jax.models.network import Network
from dfkd_jax.runs.loop import Experiment
from dfkd_jax.runs.programs import Plan
from dfkd_jax.synth import host_replay, replay
from dfkd_jax.types import PRNGKey, PyTree

JUDGED = 1000  # images that a judge sees at least


def show(experiment: Experiment, plan: Plan, grid: Grid, synthesis: PyTree, teacher: Network,
         judge: Network | None, key: PRNGKey) -> dict[str, float] | None:
  """Writes images.png, with images in turn from every class, and the teacher's labels.

  With a judge, returns the fractions of at least 1,000 images on which the teacher's class is the
  judge's top-1, or in its top-5.
  """
  number = max(4 * grid.columns * grid.rows, 0 if judge is None else JUDGED)
  images, labels = _draw(experiment, plan, synthesis, teacher, key, number)
  turn = np.zeros(len(labels), int)  # 0 for the first image of a class, 1 for the second, ...
  for label in np.unique(labels):
    turn[labels == label] = np.arange((labels == label).sum())
  order = np.lexsort((labels, turn))[:grid.columns * grid.rows]
  names = [str(label) if experiment.test is None else experiment.test.class_names[label]
           for label in labels[order]]
  with parallel.raise_on_all_processes():
    report.image_grid(experiment.workdir / 'images.png', images[order], names, grid.columns)
  if judge is None:
    return None
  metrics = evaluate.evaluate(judge, (images, labels), task=experiment.task,
                              batch_size=experiment.settings.evaluate_batch_size)
  return {'judge_top1': metrics['top1'], 'judge_top5': metrics['top5'], 'count': metrics['count']}


def _draw(experiment, plan, synthesis, teacher, key, number):
  """Draws images, labelled by the teacher: labels in the buffer describe augmented views."""
  buffer, images, batches = replay.find_buffer(synthesis), None, []
  is_on_host = buffer is not None and isinstance(buffer.images, np.ndarray)
  synthesis = host_replay.strip_images(synthesis) if is_on_host else synthesis

  def sample_slots(synthesis, key, *, axis):
    return plan.make(axis).sample(synthesis, key).slots

  def sample(synthesis, key, images, teacher, *, axis):
    batch = plan.make(axis).sample(replay.with_batch(synthesis, images), key)
    return batch.images, experiment.task.predicted(teacher(batch.images).logits)

  one, split, spread = parallel.REPLICATED, parallel.SPREAD, parallel.specs(synthesis)
  draw_slots = parallel.each_device(sample_slots, plan.mesh, (spread, one), split)
  draw = parallel.each_device(sample, plan.mesh, (spread, one, split, one), split)
  for index in range(1 + number // plan.distill.batch_size):
    batch_key = jax.random.fold_in(key, index)
    if is_on_host:
      slots = np.asarray(draw_slots(synthesis, jax.random.clone(batch_key)))  # as `sample` draws
      images = host_replay.gather(buffer.images, slots[None])[0]
    batches.append(parallel.gather(draw(synthesis, batch_key, images, teacher)))
  return map(np.concatenate, zip(*batches, strict=True))
