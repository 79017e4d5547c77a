"""CMI: a generator drawn anew for each batch, whose images are to differ from all that came before.

FastDFKD's loop without anything learnt from call to call, and with one more term:
each image's local view must be nearest to its own global view among the images of
the batch and of a memory bank, as projections of the teacher's features by a head
that is trained along.

References:
  Fang et al., Contrastive Model Inversion for Data-Free Knowledge Distillation,
  IJCAI 2021, https://arxiv.org/abs/2105.08584, equations 3 to 9, and the published CIFAR
  scripts for numbers. Their bank yields NaN whenever it is just full, and they cannot
  do without the contrast; here both work.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from dfkd_jax import augment, parallel, tasks
from dfkd_jax.losses import contrast
from dfkd_jax.models.network import Network
from dfkd_jax.synth import inversion as inversions
from dfkd_jax.synth import objective, replay
from dfkd_jax.synth.synthesizer import Synthesizer, passes_on
from dfkd_jax.types import Array, Batch, Metrics, Outputs, PRNGKey, PyTree


class Head(nn.Module):
  """Features [B, D] to projections [B, size] of norm 1."""

  size: int

  @nn.compact
  def __call__(self, features: Array) -> Array:
    """[B, D] to [B, size]."""
    x = nn.relu(nn.Dense(features.shape[-1], name='head_0')(features))
    x = nn.Dense(self.size, name='head_2')(x)
    return x / optax.safe_norm(x, 1e-12, axis=-1, keepdims=True)


class State(struct.PyTreeNode):
  """The loop's state, the head, and features of former images."""

  inversion: inversions.State
  head: PyTree  # None where the contrast is off
  head_opt_state: PyTree
  bank: Array | None = parallel.sharded()  # [M, N, 2, D]: local and global features
  next: Array  # [] int32, slot of each task's bank that is written next
  size: Array  # [] int32, live slots of each


def random_rows(key: PRNGKey, size: Array, capacity: int, number: int) -> tuple[Array, Array]:
  """Slots [number] of live rows without replacement, and whether each is live [number]."""
  chances = jnp.where(jnp.arange(capacity) < size, jax.random.uniform(key, (capacity,)), -1.0)
  found, slots = jax.lax.top_k(chances, number)
  return slots, found >= 0


@passes_on(inversions.loop, without=('companion_terms',))
def cmi(
    *,
    image_shape: tuple[int, int, int],
    task: tasks.Task,
    factors: objective.Factors = objective.Factors(batch_norm=1.0, one_hot=1.0, adversarial=0.5, contrast=0.8),
    num_steps: int = 200,
    generator_lr: float = 1e-3,
    latent_lr: float = 1e-3,
    meta: str = 'reinit',
    moments_momentum: float = 0.0,
    contrast_temperature: float = 0.2,
    bank_size: int = 40_960,
    num_negatives: int = 4_096,
    projection_size: int = 256,
    feature_layers: tuple[str, ...] | None = None,
    head_lr: float | None = None,
    local_view: Callable[[PRNGKey, Array], Array] | None = None,
    sample_rows: Callable[[PRNGKey, Array, int, int], tuple[Array, Array]] = random_rows,
    batch_size: int = 256,
    capacity: int = 51_200,
    num_tasks: int = 1,
    axis: str | None = None,
    **numbers: Any,
) -> Synthesizer:
  """Makes the CMI synthesizer; defaults are those of the published CIFAR script.

  Args:
    image_shape: [H, W, C].
    task: What the teacher was trained for.
    factors: Of batch_norm, one_hot, adversarial and contrast.
    num_steps: Inner steps, 200 in the script, 500 in the papers' tables.
    generator_lr: Adam's, for the generator.
    latent_lr: Adam's, for the latents; published as that of the generator.
    meta: 'reinit' draws the generator anew before each call; FastDFKD's others work too.
    moments_momentum: Share of former calls in the moments that are matched.
    contrast_temperature: T of the contrast, 0.2 or 0.1.
    bank_size: Former images on this device whose features are kept: 2 D numbers each, with D 2,704 for all of WRN-40-2;
      more for each task than its batch, else only the last call's would be left.
    num_negatives: Of these, how many a task's inner step draws; at most the bank of a task.
    projection_size: Of the head's output.
    feature_layers: Batch norms whose input's mean over pixels makes up the features; None: all, by path.
    head_lr: Adam's, for the head, whose state lasts; None: `generator_lr`.
    local_view: (key, images) -> images; None: crops of a quarter up to all of the image, and flips.
    sample_rows: (key, live rows, rows of the bank, number) -> (slots [number], which are live [number]).
    batch_size: B, images of one task in one call.
    capacity: Images that the buffer holds on this device.
    num_tasks: M, inversions on this device in one call, each with a bank of its own; the head is their average.
    axis: The mapped axis of devices, if any.
    **numbers: Of `meta.loop`; `augment` makes the global view.
  """
  loop = inversions.loop(
      image_shape=image_shape, task=task, factors=factors, num_steps=num_steps, generator_lr=generator_lr,
      latent_lr=latent_lr, meta=meta, moments_momentum=moments_momentum, batch_size=batch_size, num_tasks=num_tasks,
      axis=axis, companion_terms=('contrast',), **numbers)
  local_view = local_view or (lambda key, images: augment.resized_crop_and_flip(key, images, scale=(0.25, 1.0)))
  share = parallel.even_share(capacity, num_tasks, 'capacity')
  rows = parallel.even_share(bank_size, num_tasks, 'bank_size')
  if factors.active('contrast') and rows <= batch_size:
    raise ValueError(f'bank_size is {bank_size}, must be above {num_tasks * batch_size}, the images of one call.')
  if factors.active('contrast') and not 1 <= num_negatives <= rows:
    raise ValueError(f'num_negatives is {num_negatives}, must be in 1..{rows}, the bank of a task.')
  head, tx = Head(projection_size), optax.adam(generator_lr if head_lr is None else head_lr)

  def features_of(outputs: Outputs) -> Array:
    paths = sorted(outputs.pooled) if feature_layers is None else feature_layers
    missing = [path for path in paths if path not in outputs.pooled]
    if missing or not paths:
      raise ValueError(f'feature_layers has {missing}, must be batch norms of the teacher: {sorted(outputs.pooled)}.')
    return jnp.concatenate([outputs.pooled[path] for path in paths], axis=-1)

  def init(key: PRNGKey, teacher: Network) -> State:
    key_loop, key_head = jax.random.split(key)
    inversion = loop.init(key_loop, teacher, replay.create(share, image_shape, task.num_classes, num_tasks))
    state = State(
        inversion=inversion, head=None, head_opt_state=None, bank=None, next=jnp.int32(0), size=jnp.int32(0))
    if not factors.active('contrast'):
      return state
    features = jax.eval_shape(lambda: features_of(teacher(jnp.zeros((1, *image_shape)))))
    params = jax.jit(head.init)(key_head, jnp.zeros(features.shape, features.dtype))['params']
    params = jax.tree.map(lambda leaf: leaf.astype(features.dtype), params)
    bank = jnp.zeros((num_tasks, rows, 2, features.shape[-1]), features.dtype)
    return state.replace(head=params, head_opt_state=tx.init(params), bank=bank)

  def synthesize(
      state: State, key: PRNGKey, teacher: Network, student: Network | None
  ) -> tuple[State, Metrics]:

    def terms(params, bank, images, outputs, step_key):
      """The contrast of one inner step, and both views' features [B, 2, D]."""
      key_view, key_rows = jax.random.split(step_key)
      views = jnp.stack([features_of(teacher(local_view(key_view, images))), features_of(outputs)], axis=1)
      slots, live = sample_rows(key_rows, state.size, rows, num_negatives)
      local, global_ = (
          head.apply({'params': params}, jnp.concatenate([views[:, view], bank[slots, view]])) for view in range(2))
      batch = views.shape[0]
      term = contrast.contrast(
          local[:batch], global_[:batch], local[batch:], global_[batch:], contrast_temperature, live)
      return {'contrast': term}, views

    companion = None
    if factors.active('contrast'):
      companion = inversions.Companion(state.head, state.head_opt_state, tx, state.bank, terms)
    inversion, found = loop.invert(state.inversion, key, teacher, student, companion)
    buffer = replay.add(inversion.buffer, found.kept['images'], found.kept['labels'], axis)
    state = state.replace(inversion=inversion.replace(buffer=buffer))
    if companion is not None:
      state = remember(state, found.kept['companion'])
      state = state.replace(head=found.companion[0], head_opt_state=found.companion[1])
    return state, found.metrics

  def remember(state: State, views: Array) -> State:
    """Writes features [M, B, 2, D] over the oldest rows of the banks."""
    slots = (state.next + jnp.arange(batch_size)) % rows
    return state.replace(
        bank=state.bank.at[:, slots].set(views), next=(state.next + batch_size) % rows,
        size=jnp.minimum(state.size + batch_size, rows))

  def sample(state: State, key: PRNGKey) -> Batch:
    return loop.sample(state.inversion, key, lambda k, number: replay.sample(k, state.inversion.buffer, number, axis))

  return Synthesizer(init, synthesize, sample)
