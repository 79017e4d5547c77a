"""VGG with batch norm for small images (Simonyan & Zisserman, arXiv:1409.1556)."""

from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array


class VGG(nn.Module):
  """Groups of 3x3 convolutions, a 2x2 max-pooling after each of the first three, a dense layer.

  As in CRD (arXiv:1910.10699) and FastDFKD, only images of height 64 are pooled once more after
  the fourth group. Then the pixels are averaged.

  Attributes:
    num_classes: Number of logits.
    groups: Widths of the convolutions of each group.
    dtype: Dtype of the computation. None uses the dtype of parameters and inputs.
  """

  num_classes: int
  groups: tuple[tuple[int, ...], ...] = ((64,), (128,), (256, 256), (512, 512), (512, 512))
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    conv_norm = layers.conv_norm(train, self.dtype, use_bias=True)
    num_pools = 4 if x.shape[1] == 64 else 3
    for group, widths in enumerate(self.groups):
      for i, width in enumerate(widths):
        names = (f'block{group}_{3 * i}', f'block{group}_{3 * i + 1}')
        x = nn.relu(conv_norm(x, width, 3, names=names))
      self.sow('intermediates', f'stage_{group + 1}', x)
      if group < num_pools:
        x = nn.max_pool(x, (2, 2), (2, 2))
    x = layers.pool_features(self, x)
    init = nn.initializers.normal(0.01)
    return nn.Dense(self.num_classes, kernel_init=init, name='classifier')(x)
