"""CMI: a generator drawn anew for each batch makes images that differ from all earlier ones.

FastDFKD's inner loop without anything learnt from call to call, and with one more term: each
image's local view must be nearest to its own global view among the images of the batch and of a
memory bank. Views are compared as projections of the teacher's features by a head that is
trained along.

References:
  Fang et al., Contrastive Model Inversion for Data-Free Knowledge Distillation, IJCAI 2021,
  https://arxiv.org/abs/2105.08584, equations 3 to 9, and the published CIFAR scripts for numbers.
  Their bank yields NaN whenever it is just full, and they cannot do without the contrast; here
  both work.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from dfkd_jax import augment as augmentations
from dfkd_jax import parallel
from dfkd_jax.models.network import Network
from dfkd_jax.synth import (
  generators,
  inner_loop,
  inversion,
  moving_average,
  objective,
  outer_loop,
  replay,
)
from dfkd_jax.synth.contrast import Contrast, Head
from dfkd_jax.synth.inversion import InnerLoop
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Adversary, Factors, History
from dfkd_jax.synth.outer_loop import OuterLoop
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey, PyTree


class State(struct.PyTreeNode):
  """The generator, the head, and features of earlier images."""

  inversion: outer_loop.State
  head: PyTree  # None where the contrast is off
  head_opt_state: PyTree
  bank: Array | None = parallel.sharded()  # [M, N, 2, D]: local and global features
  next: Array  # [] int32, row of each task's bank that is written next
  size: Array  # [] int32, live rows of each


def cmi(
    *,
    generator: nn.Module,
    image_shape: tuple[int, int, int],
    task: Task,
    factors: Factors = Factors(batch_norm=1.0, one_hot=1.0, adversarial=0.5, contrast=0.8),
    contrast: Contrast = Contrast(),
    latents: Latents = Latents(),
    inner: InnerLoop = InnerLoop(num_steps=200, generator_lr=1e-3, latent_lr=1e-3),
    outer: OuterLoop = OuterLoop(meta='reinit'),
    layout: Layout = Layout(),
    average: MovingAverage = MovingAverage(),
    capacity: int = 51_200,
    moments_momentum: float = 0.0,
    adversarial_after: int = 0,
    adversary: Adversary = Adversary(),
    augment: Callable[[PRNGKey, Array], Array] = augmentations.crop_and_flip,
) -> Synthesizer:
  """Makes the CMI synthesizer, by default like the published CIFAR script.

  Args:
    generator: Maps latents [B, Z] (or [B, h, w, Z]) to images [B, H, W, C] in (0, 1).
    image_shape: [H, W, C] of its images.
    task: Task of the teacher.
    factors: Of batch_norm, one_hot, adversarial and contrast.
    contrast: The contrast, its head and its memory bank.
    inner: The inner loop: 200 steps in the script, 500 in the papers' tables.
    outer: 'reinit' draws the generator anew before each call; the others work too.
    layout: Batch sizes, tasks and devices. Each task has its own bank; the head is their average.
    augment: (key, images) -> images, the global view.
    latents, average, capacity, moments_momentum, adversarial_after, adversary: See `fast_dfkd`.
  """
  factors = factors.checked(own=('contrast',))
  inversion.check_momentum(moments_momentum)
  compares = factors.active('contrast')
  rows = contrast.rows(layout, compares)
  stripe = layout.share(capacity, 'capacity')
  num_averaged = average.num_images(layout, outer.is_new_every_call)
  latent_shape = latents.batch_shape(layout.batch_size)
  meta_tx = outer.optimizer(inner)
  head = Head(contrast.projection_size)
  head_tx = optax.adam(inner.generator_lr if contrast.head_lr is None else contrast.head_lr)

  def init(key: PRNGKey, teacher: Network) -> State:
    key_inversion, key_head = jax.random.split(key)
    key_params, key_latents = jax.random.split(key_inversion)
    params = generators.init(generator, key_params, latent_shape)
    outputs = generators.check(
        generator, params, latent_shape, image_shape, teacher, task.num_classes, factors)
    state = State(
        inversion=outer_loop.State(
            latents=latents.start(key_latents, layout), step=jnp.int32(0), meta_params=params,
            meta_opt_state=meta_tx.init(params),
            past=jax.tree.map(jnp.zeros_like, outputs.moments),
            buffer=replay.create(stripe, image_shape, task.num_classes, layout.num_tasks),
            ema=average.init(params)),
        head=None, head_opt_state=None, bank=None, next=jnp.int32(0), size=jnp.int32(0))
    if not compares:
      return state
    features = jax.eval_shape(lambda: contrast.features(teacher(jnp.zeros((1, *image_shape)))))
    params = jax.jit(head.init)(key_head, jnp.zeros(features.shape, features.dtype))['params']
    params = jax.tree.map(lambda leaf: leaf.astype(features.dtype), params)
    bank = jnp.zeros((layout.num_tasks, rows, 2, features.shape[-1]), features.dtype)
    return state.replace(head=params, head_opt_state=head_tx.init(params), bank=bank)

  def advance(
      state: State, key: PRNGKey, teacher: Network, student: Network | None, factors: Factors
  ) -> tuple[State, dict[str, PyTree], Metrics]:
    """Runs one call; returns the next state, the kept values of each task, and metrics."""
    old = state.inversion
    key_latents, key_labels, key_steps, key_renew = jax.random.split(key, 4)
    params = outer.renew(key_renew, old.meta_params, old.step, generator, latent_shape)
    start = latents.of_call(key_latents, old.latents, old.step, layout)
    labels = layout.draw(
        key_labels,
        lambda k: task.sample_labels(k, layout.batch_size, old.buffer.histogram))
    factors = inversion.with_late_adversary(factors, old.step, adversarial_after)
    history = History(old.past, inversion.momentum_at(old.step, moments_momentum))

    def invert_task(inputs):
      latents_of_task, labels, bank, key_task = inputs

      def loss_fn(variables, key_step):
        key_view, key_contrast = jax.random.split(key_step) if compares else (key_step, None)
        inputs = latents.decode(variables['latents'], labels)
        images = generators.render(generator, variables['params'], inputs)
        views = augment(key_view, images)
        outputs = teacher(views)
        terms = objective.terms(
            factors, outputs, views, task.labels_from(outputs.logits, labels), teacher=teacher,
            student=student, history=history, adversary=adversary, reduce=task.reduce)
        kept = {'images': images, 'labels': task.predicted(outputs.logits)}
        if compares:
          terms['contrast'], kept['features'] = contrast.compare(
              key_contrast, variables['head'], bank, state.size, teacher, images, outputs)
        loss, metrics = objective.total(terms, factors)
        return loss, inner_loop.StepOutput(kept, outputs.moments, metrics)

      tx, variables = inner.optimizer(), {'params': params, 'latents': latents_of_task}
      opt_state = tx.init(variables)
      if compares:
        tx, opt_state = beside_head(tx, head_tx), (opt_state, state.head_opt_state)
        variables['head'] = state.head
      found = inner_loop.minimize(
          key_task, loss_fn, variables, opt_state, tx=tx, num_steps=inner.num_steps,
          keep=inner.keep)
      trained = (found.variables['head'], found.opt_state[1]) if compares else (None, None)
      averaged = (outer.gradient(params, found), found.aux, found.metrics,
                  found.variables['params'], *trained)
      return averaged, found.kept, found.variables['latents']

    averaged, kept, moved = layout.map(
        invert_task, (start, labels, state.bank, layout.keys(key_steps)))
    meta_grads, moments, metrics, moved_params, head, head_opt_state = layout.mean(averaged)
    opt_state = latents.restart_optimizer(meta_tx, old.meta_opt_state, params, old.step)
    meta_params, opt_state = outer.update(meta_tx, meta_grads, opt_state, params)
    new = old.replace(
        step=old.step + 1, meta_params=meta_params, meta_opt_state=opt_state,
        past=inversion.average_moments(old.past, moments, old.step, moments_momentum),
        latents=latents.carried(moved),
        ema=average.update(old.ema, moved_params, outer.is_new(old.step)))
    return state.replace(inversion=new, head=head, head_opt_state=head_opt_state), kept, metrics

  def synthesize(
      state: State, key: PRNGKey, teacher: Network, student: Network | None
  ) -> tuple[State, Metrics]:
    state, kept, metrics = advance(state, key, teacher, student, factors)
    buffer = replay.add(state.inversion.buffer, kept['images'], kept['labels'], layout.axis)
    state = state.replace(inversion=state.inversion.replace(buffer=buffer))
    if compares:  # The features go over the oldest rows of the banks.
      slots = (state.next + jnp.arange(layout.batch_size)) % rows
      state = state.replace(
          bank=state.bank.at[:, slots].set(kept['features']),
          next=(state.next + layout.batch_size) % rows,
          size=jnp.minimum(state.size + layout.batch_size, rows))
    return state, metrics

  def sample(state: State, key: PRNGKey) -> Batch:
    buffer, ema = state.inversion.buffer, state.inversion.ema
    return moving_average.sample(
        key, layout, num_averaged,
        lambda key, number: replay.sample(key, buffer, number, layout.axis),
        lambda key_latents, key_labels, number: layout.map(
            lambda inputs: generators.render(generator, ema, latents.decode(*inputs)),
            latents.draw_with_labels(
                key_latents, key_labels, number, task, buffer.histogram, layout)))

  def fresh(
      state: State, key: PRNGKey, teacher: Network, student: Network | None = None
  ) -> Batch:
    key_latents, key = jax.random.split(key)
    start = state.inversion.replace(latents=latents.start(key_latents, layout))
    _, kept, _ = advance(
        state.replace(inversion=start), key, teacher, student,
        inversion.for_student(factors, student))
    return replay.unsaved(kept['images'], kept['labels'])

  def with_generator(state: State, variables: PyTree) -> State:
    return state.replace(inversion=state.inversion.replace(meta_params=variables['params']))

  return Synthesizer(
      init, synthesize, sample, fresh=fresh,
      generator=lambda state: {'params': state.inversion.meta_params},
      with_generator=with_generator)


def beside_head(
    tx: optax.GradientTransformation, head_tx: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Makes the optimizer of variables with a head; its state is (state of tx, of head_tx)."""

  def split(tree):
    return {name: part for name, part in tree.items() if name != 'head'}, tree['head']

  def init(variables):
    others, head = split(variables)
    return tx.init(others), head_tx.init(head)

  def update(grads, states, variables=None):
    del variables
    others, head = split(grads)
    updates, state = tx.update(others, states[0])
    head_updates, head_state = head_tx.update(head, states[1])
    return {**updates, 'head': head_updates}, (state, head_state)

  return optax.GradientTransformation(init, update)
