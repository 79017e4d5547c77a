"""Thin residual networks for small images (He et al., arXiv:1512.03385, section 4.2)."""

from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers, resnet
from dfkd_jax.types import Array


class ThinResNet(nn.Module):
  """ResNet of 6n + 2 layers in three stages: ResNet-20, -32, -56, -110 and their kin.

  Attributes:
    num_classes: Of the logits.
    depth: Layers, 6n + 2.
    widths: Channels of the stem, then of the three stages.
    shortcut: 'projection' (as CRD, arXiv:1910.10699, and FastDFKD have it) or
      'pad', without parameters (option A of the paper).
    dtype: Of the computation; None for that of parameters and inputs.

  Raises:
    ValueError: If `depth` is not 6n + 2, or there is no such `shortcut`.
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
      raise ValueError(f'Unknown shortcut {self.shortcut!r}; there are {", ".join(resnet.SHORTCUTS)}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalised images [B, H, W, C] to logits [B, num_classes], at least float32."""
    x = layers.Conv(
        self.widths[0], (3, 3), padding=1, use_bias=False, kernel_init=layers.he_fan_out,
        dtype=self.dtype, name='conv1')(x)
    x = nn.relu(layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name='bn1')(x))
    for stage, width in enumerate(self.widths[1:], 1):
      for i in range((self.depth - 2) // 6):
        x = resnet.Block(
            width, 2 if stage > 1 and not i else 1, shortcut=self.shortcut, projection_name='downsample',
            kernel_init=layers.he_fan_out, dtype=self.dtype, name=f'layer{stage}_{i}')(x, train)
      self.sow('intermediates', f'stage_{stage}', x)
    x = layers.pool_features(self, x)
    return layers.dense(self.num_classes, x.shape[-1], name='fc')(x)
