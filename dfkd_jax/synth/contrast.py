"""Contrast of image views against a memory bank of earlier images, for CMI.

Fang et al., Contrastive Model Inversion, IJCAI 2021 (arXiv:2105.08584), equations 5 to 8.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dfkd_jax import augment
from dfkd_jax.losses import inversion
from dfkd_jax.messages import FieldError
from dfkd_jax.models.network import Network
from dfkd_jax.synth.layout import Layout
from dfkd_jax.types import Array, Outputs, PRNGKey, PyTree

quarter_crop = functools.partial(augment.resized_crop_and_flip, scale=(0.25, 1.0))


class Head(nn.Module):
  """Projects features [B, D] to [B, size], of norm 1."""

  size: int

  @nn.compact
  def __call__(self, features: Array) -> Array:
    """Maps [B, D] to [B, size]."""
    x = nn.relu(nn.Dense(features.shape[-1], name='head_0')(features))
    x = nn.Dense(self.size, name='head_2')(x)
    return x / optax.safe_norm(x, 1e-12, axis=-1, keepdims=True)


def random_rows(key: PRNGKey, size: Array, capacity: int, number: int) -> tuple[Array, Array]:
  """Draws slots [number] of live rows without replacement, and whether each is live [number]."""
  chances = jnp.where(jnp.arange(capacity) < size, jax.random.uniform(key, (capacity,)), -1.0)
  highest, slots = jax.lax.top_k(chances, number)
  return slots, highest >= 0


@dataclasses.dataclass(frozen=True)
class Contrast:
  """The contrast, its head and its memory bank.

  The features of an image are the pooled inputs of batch norms, D 2,704 for all of WRN-40-2. A row
  of the bank has 2 D numbers. Each task's bank must exceed its batch.
  """

  contrast_temperature: float = 0.2  # published as 0.2 or 0.1
  bank_size: int = 40_960  # rows of the memory banks on this device
  num_negatives: int = 4_096  # rows of its bank that a task's inner step draws
  projection_size: int = 256  # of the head's output
  feature_layers: tuple[str, ...] | None = None  # paths of the batch norms; None: all
  head_lr: float | None = None  # of the head, whose optimizer state lasts; None: `generator_lr`
  local_view: Callable[[PRNGKey, Array], Array] = quarter_crop
  # (key, live rows, rows of the bank, number) -> (slots, whether each is live)
  sample_rows: Callable[[PRNGKey, Array, int, int], tuple[Array, Array]] = random_rows

  def rows(self, layout: Layout, is_used: bool) -> int:
    """Returns the rows of a task's bank; raises a FieldError if they do not suffice."""
    rows = layout.share(self.bank_size, 'bank_size')
    if is_used and rows <= layout.batch_size:
      raise FieldError('bank_size', f'bank_size is {self.bank_size}, must be above '
                       f'{layout.num_tasks * layout.batch_size}, the images of one call.')
    if is_used and not 1 <= self.num_negatives <= rows:
      raise FieldError('num_negatives', f'num_negatives is {self.num_negatives}, must be in '
                       f'1..{rows}, the bank of a task.')
    return rows

  def features(self, outputs: Outputs) -> Array:
    """Concatenates the pooled inputs of the chosen batch norms, [B, D]."""
    paths = sorted(outputs.pooled) if self.feature_layers is None else self.feature_layers
    missing = [path for path in paths if path not in outputs.pooled]
    if missing or not paths:
      raise FieldError('feature_layers', f'feature_layers has {missing}, must be batch norms of '
                       f'the teacher: {sorted(outputs.pooled)}.')
    return jnp.concatenate([outputs.pooled[path] for path in paths], axis=-1)

  def compare(
      self, key: PRNGKey, head: PyTree, bank: Array, size: Array, teacher: Network, images: Array,
      outputs: Outputs) -> tuple[Array, Array]:
    """Returns the contrast [B] of images, and the features of both their views [B, 2, D].

    Local views are drawn from `images` [B, H, W, C]; `outputs` are the teacher's of global views.
    The bank [N, 2, D] has features of earlier images; its first `size` [] rows are live. `head` has
    the parameters of the head.
    """
    key_view, key_rows = jax.random.split(key)
    local_features = self.features(teacher(self.local_view(key_view, images)))
    views = jnp.stack([local_features, self.features(outputs)], axis=1)
    slots, is_live = self.sample_rows(key_rows, size, bank.shape[0], self.num_negatives)
    project = lambda view: Head(self.projection_size).apply(
        {'params': head}, jnp.concatenate([views[:, view], bank[slots, view]]))
    (local, global_), batch = (project(0), project(1)), images.shape[0]
    term = inversion.contrast(
        local[:batch], global_[:batch], local[batch:], global_[batch:],
        self.contrast_temperature, is_live)
    return term, views
