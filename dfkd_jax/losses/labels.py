"""Losses of supervised training: by labels, with classes weighed and hard examples stressed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dfkd_jax.types import Array


def focal(logits: Array, labels: Array, *, gamma: float = 0.0, smoothing: float = 0.0) -> Array:
  """(1 - p)^gamma times the cross-entropy, where p is the probability of the label.

  Lin et al. (arXiv:1708.02002, equation 4). A gamma of 0 is the cross-entropy; `smoothing` is of
  its labels. Logits [..., K] and integers [...] give [...]. A label outside of 0..K-1 gives 0.
  """
  one_hot = jax.nn.one_hot(labels, logits.shape[-1])
  losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, smoothing))
  losses = jnp.where((labels >= 0) & (labels < logits.shape[-1]), losses, 0.0)
  if not gamma:
    return losses
  # The probability itself: its power has a NaN gradient at 1 if it is computed from the loss.
  probability = (jax.nn.softmax(logits) * one_hot).sum(-1)
  return jnp.maximum(1 - probability, 1e-6)**gamma * losses


def median_frequency(labels: np.ndarray, num_classes: int, ignore: int) -> np.ndarray:
  """Weight of each class: the median of the classes' frequencies over its own, float32 [K].

  Eigen and Fergus (arXiv:1411.4734, section 4.3.2). The frequency of a class is its share of the
  pixels of the images that have it, or of all images if there is one label an image. Classes
  without a label, and `ignore`, have a weight of 0. `labels` are integers [N, H, W], or [N].
  """
  labels = labels[None] if labels.ndim == 1 else labels.reshape(len(labels), -1)
  counts = np.stack([np.bincount(image[image != ignore], minlength=num_classes)[:num_classes]
                     for image in labels])
  pixels = (counts > 0).T @ counts.sum(1)  # labelled pixels of the images that have the class
  is_seen = pixels > 0
  frequencies = counts.sum(0)[is_seen] / pixels[is_seen]
  weights = np.zeros(num_classes, np.float32)
  weights[is_seen] = np.median(frequencies) / frequencies
  return weights
