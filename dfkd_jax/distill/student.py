"""The student and one training step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import parallel
from dfkd_jax.models.network import Network
from dfkd_jax.types import Array, Outputs, PyTree


class Student(struct.PyTreeNode):
  """A network in training."""

  network: Network
  opt_state: PyTree
  step: Array  # [] int32


def init(network: Network, tx: optax.GradientTransformation) -> Student:
  """A student before its first step."""
  return Student(network, tx.init(network.params), jnp.int32(0))


def train_step(
    student: Student,
    images: Array,
    loss_fn: Callable[[Outputs], tuple[Array, PyTree]],
    tx: optax.GradientTransformation,
    axis: str | None = None,
) -> tuple[Student, Array, PyTree]:
  """One step on a batch.

  Args:
    student: Before the step.
    images: [B, H, W, C] in [0, 1], this device's share of the batch.
    loss_fn: The student's outputs -> (loss [], aux): mean over this device's share.
    tx: The student's optimizer.
    axis: The mapped axis of devices; gradients and moments are averaged over it.

  Returns:
    The student after the step, the loss [], and aux.
  """

  def objective(params):
    outputs, batch_stats = student.network.replace(params=params).forward(images, train=True, axis=axis)
    loss, aux = loss_fn(outputs)
    return loss, (batch_stats, aux)

  (loss, (batch_stats, aux)), grads = jax.value_and_grad(objective, has_aux=True)(student.network.params)
  loss, grads = parallel.pmean((loss, grads), axis)
  updates, opt_state = tx.update(grads, student.opt_state, student.network.params)
  network = student.network.replace(
      params=optax.apply_updates(student.network.params, updates), batch_stats=batch_stats)
  return Student(network, opt_state, student.step + 1), loss, aux
