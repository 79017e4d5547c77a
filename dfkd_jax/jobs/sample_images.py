"""The images at the end of a run: a picture of them, and the opinion of a judge."""

import numpy as np

from dfkd_jax import evaluate, parallel, report
from dfkd_jax.config.records import Grid
from dfkd_jax.jobs import samples
from dfkd_jax.models.network import Network
from dfkd_jax.runs.loop import Experiment
from dfkd_jax.runs.programs import Plan
from dfkd_jax.types import PRNGKey, PyTree

JUDGED = 1000  # images that a judge sees at least


def show(experiment: Experiment, plan: Plan, grid: Grid, synthesis: PyTree, teacher: Network,
         student: Network, judge: Network | None, key: PRNGKey) -> dict[str, float] | None:
  """Writes images.png, with images in turn from every class, and the teacher's labels.

  In segmentation, rows of images alternate with rows of the teacher's and the student's masks.
  With a judge, returns the fractions of at least 1,000 images on which the teacher's class is the
  judge's top-1, or in its top-5; in segmentation the fraction of pixels of the same class.
  """
  number = max(4 * grid.columns * grid.rows, 0 if judge is None else JUDGED)

  def label(images, teacher):  # labels in the buffer describe augmented views
    return images, experiment.task.predicted(teacher(images).logits)

  images, labels = samples.draw(plan, synthesis, key, number + 1, label, teacher)
  order = _in_turn(labels)
  if experiment.task.label_axes:
    shown = order[:grid.columns * max(1, grid.rows // 3)]
    _show_masks(experiment, 'images.png', images[shown], {'teacher': teacher, 'student': student},
                grid.columns)
  else:
    shown, names = order[:grid.columns * grid.rows], _class_names(experiment)
    with parallel.raise_on_all_processes():
      report.image_grid(experiment.workdir / 'images.png', images[shown],
                        [names[label] for label in labels[shown]], grid.columns)
  return None if judge is None else _judge(experiment, images, labels, teacher, judge)


def show_test_images(experiment: Experiment, networks: dict[str, Network], columns: int) -> None:
  """Writes test_images.png: test images from all over the split, their masks, and predictions."""
  test = experiment.test
  rows = np.linspace(0, len(test.images) - 1, min(columns, len(test.images))).round().astype(int)
  _show_masks(experiment, 'test_images.png', test.images[rows], networks, columns,
              truth=test.labels[rows])


def _in_turn(labels: np.ndarray) -> np.ndarray:
  """Returns an order of images in which every class has its turn."""
  turn = np.zeros(len(labels), int)  # 0 for the first image of a class, 1 for the second, ...
  for label in np.unique(labels):
    turn[labels == label] = np.arange((labels == label).sum())
  return np.lexsort((labels, turn))


def _show_masks(
    experiment: Experiment, file: str, images: np.ndarray, networks: dict[str, Network],
    columns: int, truth: np.ndarray | None = None) -> None:
  """Writes a file of images with their masks, true (if given) and predicted by each network."""
  batch_size = experiment.settings.evaluate_batch_size
  masks = {} if truth is None else {'labels': truth}
  masks |= {name: evaluate.predict(network, images, batch_size=batch_size, shared=True)
            for name, network in networks.items()}
  with parallel.raise_on_all_processes():
    report.mask_grid(
        experiment.workdir / file, images, masks, columns, _class_names(experiment),
        ignore=-1 if truth is None else experiment.task.ignore)


def _judge(experiment: Experiment, images: np.ndarray, labels: np.ndarray, teacher: Network,
           judge: Network) -> dict[str, float]:
  """Compares a judge with the teacher, on images and the teacher's labels of them."""
  batch_size = experiment.settings.evaluate_batch_size
  if experiment.task.label_axes:
    answers, masks = (
        evaluate.predict(network, images, batch_size=batch_size) for network in (judge, teacher))
    return {'judge_top1': float((answers == masks).mean()), 'count': len(images)}
  metrics = evaluate.evaluate(judge, (images, labels), task=experiment.task, batch_size=batch_size)
  return {'judge_top1': metrics['top1'], 'judge_top5': metrics['top5'], 'count': metrics['count']}


def _class_names(experiment: Experiment) -> list[str]:
  """Returns the names of the data set's classes, or numbers; further classes are numbers too."""
  names = list(experiment.test.class_names) if experiment.test is not None else []
  return names + [str(label) for label in range(len(names), experiment.task.num_classes)]
