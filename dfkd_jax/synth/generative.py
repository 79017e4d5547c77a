"""What methods with a generator share: drawing its variables, rendering, the one-time reset, its moving average."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from dfkd_jax.models.network import Network
from dfkd_jax.synth.objective import Factors
from dfkd_jax.types import Array, Batch, Outputs, PRNGKey, PyTree


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


def check(
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


def check_batch_norm(factors: Factors, teacher: Network) -> None:
  """Raises a ValueError if a term of moments is wanted and the teacher has none to match."""
  for term in ('batch_norm', 'relative_batch_norm'):
    if factors.active(term) and not teacher.running():
      raise ValueError(f'The teacher has no BatchNorm: the term {term} has nothing to match, its factor must be 0.')


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


def num_averaged(ema_decay: float | None, ema_share: float, number: int) -> int:
  """How many of the student's `number` images the moving average of a generator makes; 0 if there is none.

  The average follows the generator as theta' <- ema_decay theta' + (1 - ema_decay) theta, and the student learns from
  the images of both, so that it does not forget what the generator made before (MAD: Do et al., Momentum Adversarial
  Distillation, NeurIPS 2022, https://arxiv.org/abs/2209.10359, with a decay of 0.95, second hand). There each has a
  batch of its own; here they share one, so that the student's step costs what it did.

  Raises:
    ValueError: The decay is not in [0, 1), or the share leaves no image to one of the two.
  """
  if ema_decay is None:
    return 0
  if not 0 <= ema_decay < 1:
    raise ValueError(f'ema_decay is {ema_decay}, must be in [0, 1), or None for no moving average.')
  found = round(ema_share * number)
  if not 1 <= found < number:
    raise ValueError(
        f'ema_share is {ema_share}, must leave of the {number} images of a task in one student step at least one to '
        'the generator and one to its moving average.')
  return found


def beside(batch: Batch, images: Array) -> Batch:
  """A batch of M tasks with further images [M, n, H, W, C], each task's behind its own; they are from nowhere, -1.

  A batch whose images are elsewhere gets none, but their slots.
  """
  num_tasks, number = images.shape[:2]

  def joined(own: Array, further: Array) -> Array:
    by_task = own.reshape(num_tasks, -1, *own.shape[1:])
    return jnp.concatenate([by_task, further.astype(own.dtype)], axis=1).reshape(-1, *own.shape[1:])

  nowhere = jnp.full((num_tasks, number), -1, jnp.int32)
  images = None if batch.images is None else joined(batch.images, images)
  return Batch(images, joined(batch.labels, nowhere), joined(batch.slots, nowhere))
