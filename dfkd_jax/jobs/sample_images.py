"""What the images look like at the end of a run: to a reader, and to a network that had no part in them."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from dfkd_jax import evaluate, parallel, report
from dfkd_jax.models.network import Network
from dfkd_jax.runs.loop import Experiment
from dfkd_jax.runs.programs import Make
from dfkd_jax.synth import host_replay, replay
from dfkd_jax.types import Batch, PRNGKey, PyTree

_JUDGED = 1000


def write(
    experiment: Experiment, mesh: Mesh, make: Make, synthesis: PyTree, teacher: Network, judge: Network | None,
    key: PRNGKey,
) -> dict[str, float] | None:
  """Writes images.png, a grid of samples, first of every class one, with the teacher's labels.

  Returns:
    With a judge, in what shares of at least 1,000 samples the teacher's class is that of the judge, or among its five.
  """
  section = experiment.config.grid
  wanted, batch_size = section.columns * section.rows, experiment.config.distill.batch_size
  sample = _sampler(mesh, make, synthesis, experiment.task)
  number = max(4 * wanted, 0 if judge is None else _JUDGED)  # So many that most classes have enough.
  batches = [
      parallel.gather(sample(synthesis, jax.random.fold_in(key, index), teacher))
      for index in range(1 + number // batch_size)]
  drawn = Batch(*map(np.concatenate, zip(*batches, strict=True)))
  turn = np.zeros(len(drawn.labels), int)  # The how-manieth of its class each image is.
  for label in np.unique(drawn.labels):
    turn[drawn.labels == label] = np.arange((drawn.labels == label).sum())
  order = np.lexsort((drawn.labels, turn))[:wanted]
  names = [experiment.class_name(label) for label in drawn.labels[order]]
  with parallel.raise_on_all_processes():
    report.image_grid(experiment.workdir / 'images.png', drawn.images[order], names, section.columns)
  if judge is None or drawn.labels.ndim > 1:
    return None
  found = evaluate.evaluate(
      judge, (drawn.images, drawn.labels), task=experiment.task, batch_size=experiment.config.evaluate.batch_size)
  return {'judge_top1': found['top1'], 'judge_top5': found['top5'], 'count': found['count']}


def _sampler(mesh: Mesh, make: Make, synthesis: PyTree, task) -> Callable[[PyTree, PRNGKey, Network], Batch]:
  """(state, key, teacher) -> a batch labelled by what the teacher sees in the images themselves.

  The buffer's own labels are of the augmented views by which they were made, and some methods know none.
  """

  def slots(synthesis, key, *, axis):
    return make(axis).sample(synthesis, key).slots

  def labelled(synthesis, key, images, teacher, *, axis):
    batch = make(axis).sample(replay.with_batch(synthesis, images), key)
    return batch._replace(labels=task.predicted(teacher(batch.images).logits))

  one, split, spread = parallel.REPLICATED, parallel.SPREAD, parallel.specs(host_replay.device_view(synthesis))
  return host_replay.with_host_sample(
      parallel.each_device(slots, mesh, (spread, one), split),
      parallel.each_device(labelled, mesh, (spread, one, split, one), split))
