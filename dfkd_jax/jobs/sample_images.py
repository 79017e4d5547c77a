"""The images at the end of a run: a picture of them, and the opinion of a judge."""

import jax
import numpy as np

from dfkd_jax import evaluate, parallel, report
from dfkd_jax.config.records import Grid
from dfkd_jax.models.network import Network
from dfkd_jax.runs.loop import Experiment
from dfkd_jax.runs.programs import Plan
from dfkd_jax.synth import host_replay, replay
from dfkd_jax.types import Batch, PRNGKey, PyTree

JUDGED = 1000  # images that a judge sees at least


def show(
    experiment: Experiment, plan: Plan, grid: Grid, synthesis: PyTree, teacher: Network,
    judge: Network | None, key: PRNGKey) -> dict[str, float] | None:
  """Writes images.png, with images in turn from every class, and the teacher's labels.

  Returns:
    With a judge, the fractions of at least 1,000 images on which the teacher's class is the judge's
    top-1, or in its top-5.
  """
  number = max(4 * grid.columns * grid.rows, 0 if judge is None else JUDGED)
  batch = _draw(experiment, plan, synthesis, teacher, key, number)
  turn = np.zeros(len(batch.labels), int)  # 0 for the first image of a class, 1 for the second, ...
  for label in np.unique(batch.labels):
    turn[batch.labels == label] = np.arange((batch.labels == label).sum())
  order = np.lexsort((batch.labels, turn))[:grid.columns * grid.rows]
  names = [experiment.class_name(label) for label in batch.labels[order]]
  with parallel.raise_on_all_processes():
    report.image_grid(experiment.workdir / 'images.png', batch.images[order], names, grid.columns)
  if judge is None:
    return None
  metrics = evaluate.evaluate(judge, (batch.images, batch.labels), task=experiment.task,
                              batch_size=experiment.settings.evaluate_batch_size)
  return {'judge_top1': metrics['top1'], 'judge_top5': metrics['top5'], 'count': metrics['count']}


def _draw(experiment: Experiment, plan: Plan, synthesis: PyTree, teacher: Network, key: PRNGKey,
          number: int) -> Batch:
  """Draws at least `number` samples, labelled by the teacher's view of the images themselves.

  Labels in the buffer describe augmented views, and some methods know no labels.
  """

  def sample_slots(synthesis, key, *, axis):
    return plan.make(axis).sample(synthesis, key).slots

  def sample(synthesis, key, images, teacher, *, axis):
    batch = plan.make(axis).sample(replay.with_batch(synthesis, images), key)
    return batch._replace(labels=experiment.task.predicted(teacher(batch.images).logits))

  one, split = parallel.REPLICATED, parallel.SPREAD
  spread = parallel.specs(host_replay.device_view(synthesis))
  program = host_replay.with_host_sample(
      parallel.each_device(sample_slots, plan.mesh, (spread, one), split),
      parallel.each_device(sample, plan.mesh, (spread, one, split, one), split))
  batches = [
      parallel.gather(program(synthesis, jax.random.fold_in(key, index), teacher))
      for index in range(1 + number // plan.distill.batch_size)]
  return Batch(*map(np.concatenate, zip(*batches, strict=True)))
