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
from dfkd_jax.synth import inner_loop, inversion, objective, replay
from dfkd_jax.synth.contrast import Contrast, Head
from dfkd_jax.synth.inner_loop import InnerLoop, StepOutput
from dfkd_jax.synth.inversion import Inversions
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Adversary, Factors
from dfkd_jax.synth.outer_loop import OuterLoop
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, PRNGKey, PyTree


class State(struct.PyTreeNode):
  """The generator, the head, and features of earlier images."""

  inversion: inversion.State
  head: PyTree  # None where the contrast is off
  head_opt_state: PyTree
  bank: Array | None = parallel.sharded()  # [M, N, 2, D]: local and global features
  next: Array  # [] int32, row of each task's bank that is written next
  size: Array  # [] int32, live rows of each


def cmi(
    *, generator: nn.Module, image_shape: tuple[int, int, int], task: Task,
    factors: Factors = Factors(batch_norm=1.0, one_hot=1.0, adversarial=0.5, contrast=0.8),
    contrast: Contrast = Contrast(), latents: Latents = Latents(),
    inner: InnerLoop = InnerLoop(num_steps=200, generator_lr=1e-3, latent_lr=1e-3),
    outer: OuterLoop = OuterLoop(meta='reinit'), layout: Layout = Layout(),
    average: MovingAverage = MovingAverage(), capacity: int = 51_200, moments_momentum: float = 0.0,
    adversarial_after: int = 0, adversary: Adversary = Adversary(),
    augment: Callable[[PRNGKey, Array], Array] = augmentations.crop_and_flip,
) -> Synthesizer:
  """Makes the CMI synthesizer, by default like the published CIFAR script.

  Args:
    factors: Of batch_norm, one_hot, adversarial and contrast.
    contrast: The contrast, its head and its memory bank.
    inner: The inner loop: 200 steps in the script, 500 in the papers' tables.
    outer: 'reinit' draws the generator anew before each call; the others work too.
    layout: Batch sizes, tasks and devices. Each task has its own bank; the head is their average.
    augment: (key, images) -> images, the global view.
    Others: See `fast_dfkd`.
  """
  factors = factors.checked(own=('contrast',))
  compares = factors.active('contrast')
  rows = contrast.rows(layout, compares)
  meta = inversion.MetaGenerator(
      generator=generator, image_shape=image_shape, task=task, latents=latents, inner=inner,
      outer=outer, layout=layout, average=average, capacity=capacity,
      moments_momentum=moments_momentum)
  head = Head(contrast.projection_size)
  head_tx = optax.adam(inner.generator_lr if contrast.head_lr is None else contrast.head_lr)

  def init(key, teacher):
    key_inversion, key_head = jax.random.split(key)
    state = State(
        inversion=meta.init(key_inversion, teacher, factors), head=None, head_opt_state=None,
        bank=None, next=jnp.int32(0), size=jnp.int32(0))
    if not compares:
      return state
    features = jax.eval_shape(lambda: contrast.features(teacher(jnp.zeros((1, *image_shape)))))
    params = jax.jit(head.init)(key_head, jnp.zeros(features.shape, features.dtype))['params']
    params = jax.tree.map(lambda leaf: leaf.astype(features.dtype), params)
    bank = jnp.zeros((layout.num_tasks, rows, 2, features.shape[-1]), features.dtype)
    return state.replace(head=params, head_opt_state=head_tx.init(params), bank=bank)

  def invert(state, key, teacher, student, factors):
    """Runs the inner loops of one call; returns also the trained head and its optimizer state."""
    inputs = meta.draw_inputs(state.inversion, key)
    factors = factors.late_adversary(state.inversion.step, adversarial_after)

    def invert_task(task_inputs):
      latents_of_task, labels, bank, key_task = task_inputs

      def loss_fn(variables, key_step):
        key_view, key_contrast = jax.random.split(key_step) if compares else (key_step, None)
        images = meta.render(variables['params'], variables['latents'], labels)
        views = augment(key_view, images)
        outputs = teacher(views)
        terms = objective.terms(
            factors, outputs, views, task.labels_from(outputs.logits, labels), teacher=teacher,
            student=student, history=inputs.history, adversary=adversary, reduce=task.reduce)
        kept = {'images': images, 'labels': task.predicted(outputs.logits)}
        if compares:
          terms['contrast'], kept['features'] = contrast.compare(
              key_contrast, variables['head'], bank, state.size, teacher, images, outputs)
        loss, metrics = objective.total(terms, factors)
        return loss, StepOutput(kept, outputs.moments, metrics)

      tx, variables = inner.optimizer(), {'params': inputs.params, 'latents': latents_of_task}
      opt_state = tx.init(variables)
      if compares:
        tx, opt_state = beside_head(tx, head_tx), (opt_state, state.head_opt_state)
        variables['head'] = state.head
      minimum = inner_loop.minimize(
          key_task, loss_fn, variables, opt_state, tx=tx, num_steps=inner.num_steps,
          keep=inner.keep)
      trained = (minimum.variables['head'], minimum.opt_state[1]) if compares else (None, None)
      averaged = *meta.results(inputs, minimum), *trained
      return averaged, minimum.kept, minimum.variables['latents']

    averaged, kept, moved = layout.map(
        invert_task, (inputs.latents, inputs.labels, state.bank, inputs.keys))
    *averaged, head, head_opt_state = layout.mean(averaged)
    return Inversions(inputs.params, *averaged, kept, moved), head, head_opt_state

  def synthesize(state, key, teacher, student):
    inversions, head, head_opt_state = invert(state, key, teacher, student, factors)
    new, kept = meta.update(state.inversion, inversions), inversions.kept
    buffer = replay.add(new.buffer, kept['images'], kept['labels'], layout.axis)
    state = state.replace(
        inversion=new.replace(buffer=buffer), head=head, head_opt_state=head_opt_state)
    if compares:  # The features go over the oldest rows of the banks.
      slots = (state.next + jnp.arange(layout.batch_size)) % rows
      state = state.replace(
          bank=state.bank.at[:, slots].set(kept['features']),
          next=(state.next + layout.batch_size) % rows,
          size=jnp.minimum(state.size + layout.batch_size, rows))
    return state, inversions.metrics

  def sample(state, key):
    return meta.sample(state.inversion, key)

  def fresh(state, key, teacher, student=None):
    fresh_state, key = meta.with_fresh_latents(state.inversion, key)
    inversions, *_ = invert(
        state.replace(inversion=fresh_state), key, teacher, student, factors.for_student(student))
    return replay.unsaved(inversions.kept['images'], inversions.kept['labels'])

  def with_generator(state, variables):
    return state.replace(inversion=inversion.with_generator(state.inversion, variables))

  return Synthesizer(
      init, synthesize, sample, fresh=fresh, with_generator=with_generator,
      generator=lambda state: inversion.generator(state.inversion))


def beside_head(
    tx: optax.GradientTransformation, head_tx: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Makes the optimizer of variables with a head; its state is (state of tx, of head_tx)."""

  def split(tree):
    return {name: part for name, part in tree.items() if name != 'head'}, tree['head']

  def init(variables):
    others, head = split(variables)
    return tx.init(others), head_tx.init(head)

  def update(grads, states, _=None):
    others, head = split(grads)
    updates, state = tx.update(others, states[0])
    head_updates, head_state = head_tx.update(head, states[1])
    return {**updates, 'head': head_updates}, (state, head_state)

  return optax.GradientTransformation(init, update)
