"""Thin residual networks for small images (He et al., arXiv:1512.03385, section 4.2)."""

from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers, resnet
from dfkd_jax.types import Array


class ThinResNet(nn.Module):
  """ResNet of 6n + 2 layers in three stages, such as ResNet-20, -32, -56 and -110.

  Attributes:
    num_classes: Number of logits.
    depth: Number of layers, 6n + 2.
    widths: Channels of the stem, then of the three stages.
    shortcut: 'projection' (as in CRD, arXiv:1910.10699, and FastDFKD) or 'pad', which has no
      parameters (option A of the paper).
    dtype: Dtype of the computation. None uses the dtype of parameters and inputs.

  Raises:
    ValueError: `depth` is not 6n + 2, or `shortcut` is unknown.
  """

  num_classes: int
  depth: int = 20
  widths: tuple[int, int, int, int] = (16, 16, 32, 64)
  shortcut: str = 'projection'
  dtype: Any = None

  def __post_init__(self) -> None:
    if self.depth < 8 or self.depth % 6 != 2:
      raise ValueError(f'A thin ResNet has 6n + 2 layers (8, 14, 20, ...), not {self.depth}.')
    if self.shortcut not in resnet.SHORTCUTS:
      names = ', '.join(resnet.SHORTCUTS)
      raise ValueError(f'Unknown shortcut {self.shortcut!r}; there are {names}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    conv_norm = layers.conv_norm(train, self.dtype)
    x = nn.relu(conv_norm(x, self.widths[0], 3, names=('conv1', 'bn1')))
    for stage, width in enumerate(self.widths[1:], 1):
      for i in range((self.depth - 2) // 6):
        x = resnet.Block(
            width, 2 if stage > 1 and not i else 1, shortcut=self.shortcut,
            projection_name='downsample', kernel_init=layers.he_fan_out, dtype=self.dtype,
            name=f'layer{stage}_{i}')(x, train)
      self.sow('intermediates', f'stage_{stage}', x)
    x = layers.pool_features(self, x)
    return layers.dense(self.num_classes, x.shape[-1], name='fc')(x)
