"""VGG with batch norm for small images (Simonyan & Zisserman, arXiv:1409.1556)."""

from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array


class VGG(nn.Module):
  """Groups of 3x3 convolutions, a 2x2 max-pooling after each of the first three, one dense layer.

  As CRD (arXiv:1910.10699) and FastDFKD have it: images 64 high, and only they,
  are pooled once more after the fourth group; then the pixels are averaged.

  Attributes:
    num_classes: Of the logits.
    groups: Widths of the convolutions of each group.
    dtype: Of the computation; None for that of parameters and inputs.
  """

  num_classes: int
  groups: tuple[tuple[int, ...], ...] = ((64,), (128,), (256, 256), (512, 512), (512, 512))
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalised images [B, H, W, C] to logits [B, num_classes], at least float32."""
    num_pools = 4 if x.shape[1] == 64 else 3
    for group, widths in enumerate(self.groups):
      for i, width in enumerate(widths):
        x = layers.Conv(
            width, (3, 3), padding=1, kernel_init=layers.he_fan_out, dtype=self.dtype,
            name=f'block{group}_{3 * i}')(x)
        x = layers.BatchNorm(
            use_running_average=not train, dtype=self.dtype, name=f'block{group}_{3 * i + 1}')(x)
        x = nn.relu(x)
      self.sow('intermediates', f'stage_{group + 1}', x)
      if group < num_pools:
        x = nn.max_pool(x, (2, 2), (2, 2))
    x = layers.pool_features(self, x)
    return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name='classifier')(x)
