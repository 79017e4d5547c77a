"""What methods with a generator share: drawing its variables, rendering, the one-time reset, its moving average."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from dfkd_jax.models.network import Network
from dfkd_jax.synth.objective import Factors
from dfkd_jax.types import Array, Outputs, PRNGKey, PyTree


def variables(generator: nn.Module, key: PRNGKey, latent_shape: tuple[int, ...]) -> PyTree:
  """Of a generator for latents of this shape [B, ...], in the default float type."""
  found = jax.jit(lambda k: generator.init(k, jnp.zeros(latent_shape)))(key)
  # Linen gives float32 under `jax_enable_x64` too; optimizer states would inherit it.
  return jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), found)


def init(generator: nn.Module, key: PRNGKey, latent_shape: tuple[int, ...]) -> PyTree:
  """Parameters of a generator, see `variables`."""
  return variables(generator, key, latent_shape)['params']


def render(generator: nn.Module, params: PyTree, latents: Array) -> Array:
  """Images [B, H, W, C] in (0, 1), normalised by this batch; running moments are neither read nor kept.

  A generator of the user's takes `train=` beside the latents, and for a reset names its `first_layers`.
  """
  return generator.apply({'params': params}, latents, train=True, mutable=['batch_stats'])[0]


def check_shapes(
    generator: nn.Module, params: PyTree, latent_shape: tuple[int, ...], image_shape: tuple[int, ...],
    teacher: Network, num_classes: int,
) -> Outputs:
  """Shapes of what the teacher says of the generator's images, if all fit together.

  Raises:
    ValueError: The images are not `image_shape`, or the teacher has another number of classes.
  """
  images = jax.eval_shape(lambda p, z: render(generator, p, z), params, jnp.zeros(latent_shape))
  if images.shape[1:] != tuple(image_shape):
    raise ValueError(f'image_shape is {tuple(image_shape)}, must be {images.shape[1:]}, as the generator makes.')
  return check_classes(teacher, images, num_classes)


def check_classes(teacher: Network, images: Array, num_classes: int) -> Outputs:
  """Shapes of what the teacher says of images like these; a ValueError if it has another number of classes."""
  outputs = jax.eval_shape(lambda network, x: network(x), teacher, images)
  if outputs.logits.shape[-1] != num_classes:
    raise ValueError(f'The task has {num_classes} classes, must have {outputs.logits.shape[-1]}, as the teacher.')
  return outputs


def check_batch_norm(factors: Factors, teacher: Network, outputs: Outputs) -> None:
  """Raises a ValueError if a term matches moments and the teacher's are missing, or cannot be captured."""
  for term in ('batch_norm', 'relative_batch_norm'):
    if factors.active(term) and not teacher.running():
      raise ValueError(f'The teacher has no BatchNorm: the term {term} has nothing to match, its factor must be 0.')
    if factors.active(term):
      teacher.check_moments(outputs.moments)


def redraw(key: PRNGKey, params: PyTree, std: float = 0.02) -> PyTree:
  """Draws a whole generator anew: kernels from N(0, std^2), scales from N(1, std^2), biases 0.

  What CMI does before each batch (arXiv:2105.08584, its code).
  """
  flat = traverse_util.flatten_dict(params)
  drawn = {}
  for (path, leaf), path_key in zip(sorted(flat.items()), jax.random.split(key, len(flat)), strict=True):
    centre = 1 if path[-1] == 'scale' else 0
    noise = std * jax.random.normal(path_key, leaf.shape, leaf.dtype)
    drawn[path] = jnp.zeros_like(leaf) if path[-1] == 'bias' else centre + noise
  return traverse_util.unflatten_dict(drawn)


def reset(key: PRNGKey, params: PyTree, layers: tuple[str, ...], std: float = 0.02) -> PyTree:
  """Draws the named layers anew: weights from N(0, std^2), biases 0.

  A batch norm's scale is drawn around 0 as well, not around 1, as in the
  published code (which does this once, late in a run, for diversity).
  """
  flat = traverse_util.flatten_dict(params)
  missing = [name for name in layers if not any(path[0] == name for path in flat)]
  if missing:
    raise ValueError(f'The generator has no layer {missing[0]!r} to reset, only {sorted({p[0] for p in flat})}.')
  chosen = sorted(path for path in flat if path[0] in layers)
  for path, path_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
    leaf = flat[path]
    drawn = std * jax.random.normal(path_key, leaf.shape, leaf.dtype)
    flat[path] = jnp.zeros_like(leaf) if path[-1] == 'bias' else drawn
  return traverse_util.unflatten_dict(flat)
