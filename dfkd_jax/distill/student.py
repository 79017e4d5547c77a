"""The student: its optimizers, its divergence from the teacher, and one training step."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.tree_util import DictKey

from dfkd_jax import parallel
from dfkd_jax.losses import divergence as divergences
from dfkd_jax.messages import check_option
from dfkd_jax.models.network import Network
from dfkd_jax.types import Array, Outputs, PyTree

REPLACED = 'replaced layers'  # Label of a part of an optimizer, see `replace_layers`.


class Student(struct.PyTreeNode):
  """A network in training."""

  network: Network
  opt_state: PyTree
  step: Array  # [] int32


def init(network: Network, tx: optax.GradientTransformation) -> Student:
  """Makes a student before its first step."""
  return Student(network, tx.init(network.params), jnp.int32(0))


def replace_layers(
    student: Student, layers: dict[str, PyTree], tx: optax.GradientTransformation) -> Student:
  """Replaces the parameters of some layers, and resets their part of the optimizer's state.

  Adam divides moments by a bias that depends on the count of steps. With moments of zero and a
  large count, steps would be up to 6.5 times the learning rate. So everything in a part of
  `optax.partition` with the label REPLACED is reset, also its count. Other counts stay.

  Args:
    student: Its other arrays stay as they are.
    layers: Parameters by name of a submodule of the network, of the same shapes.
    tx: The student's optimizer.
  """
  params = dict(student.network.params)
  for name, layer in layers.items():
    params[name] = jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), params[name], layer)
  replaced = {tuple(key.key for key in path) for path, _ in jax.tree.leaves_with_path(layers)}

  def reset(path, old, new):
    # A leaf for a parameter ends with the keys of its path; fields and indices come before.
    keys = itertools.takewhile(lambda key: isinstance(key, DictKey), reversed(path))
    is_replaced = tuple(key.key for key in keys)[::-1] in replaced or DictKey(REPLACED) in path
    return new if is_replaced else old

  opt_state = jax.tree.map_with_path(reset, student.opt_state, tx.init(params))
  return student.replace(network=student.network.replace(params=params), opt_state=opt_state)


def divergence(kind: str, logits: Array, targets: Array, temperature: float) -> Array:
  """Divergence of the student's logits [B, ..., K] from the teacher's `targets`, per sample [B].

  `kind` is 'kl' at a temperature T, or 'l1' or 'l2' between logits; otherwise raises a ValueError.
  """
  kinds = {'kl': functools.partial(divergences.kl, temperature=temperature),
           'l1': divergences.l1, 'l2': divergences.l2}
  check_option('divergence', kind, tuple(kinds))
  per_element = kinds[kind](logits, targets)
  return per_element.reshape(per_element.shape[0], -1).mean(1)


def train_step(
    student: Student, images: Array, loss_fn: Callable[[Outputs], tuple[Array, PyTree]],
    tx: optax.GradientTransformation, axis: str | None = None) -> tuple[Student, Array, PyTree]:
  """Trains the student for one step. Returns it with the loss [] and aux.

  `images` [B, H, W, C] in [0, 1] are this device's share of the batch. `loss_fn` maps the student's
  outputs to (loss [], aux), a mean over this share. Gradients and moments are averaged over `axis`.
  """
  params = student.network.params

  def objective(params):
    network = student.network.replace(params=params)
    outputs, batch_stats = network.forward(images, train=True, axis=axis)
    loss, aux = loss_fn(outputs)
    return loss, (batch_stats, aux)

  (loss, (batch_stats, aux)), grads = jax.value_and_grad(objective, has_aux=True)(params)
  loss, grads = parallel.pmean((loss, grads), axis)
  updates, opt_state = tx.update(grads, student.opt_state, params)
  network = student.network.replace(
      params=optax.apply_updates(params, updates), batch_stats=batch_stats)
  return Student(network, opt_state, student.step + 1), loss, aux


def cosine_by_round(
    init_value: float, rounds: int, steps_per_round: int, end_value: float = 0.0) -> optax.Schedule:
  """Cosine from `init_value` to `end_value` over `rounds`, constant within a round, then constant.

  PyTorch's CosineAnnealingLR stepped once per epoch, as in the published recipe (arXiv:2112.06253).
  """
  cosine = optax.cosine_decay_schedule(init_value, rounds, end_value / init_value)
  return lambda step: cosine(step // steps_per_round)


def coupled_sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float, weight_decay: float,
    nesterov: bool = False) -> optax.GradientTransformation:
  """SGD as in PyTorch: weight decay is added to every parameter's gradient before momentum."""
  return optax.chain(
      optax.add_decayed_weights(weight_decay),
      optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov))
