"""How the work of one call is spread over tasks and devices."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dfkd_jax import parallel
from dfkd_jax.messages import FieldError, check_option
from dfkd_jax.types import Array, PRNGKey, PyTree

TASK_MAPS = ('auto', 'vmap', 'map')


@dataclasses.dataclass(frozen=True)
class Layout:
  """Sizes of one call, and its tasks: inversions that start alike and are averaged afterwards.

  `task_map` is 'vmap', 'map' (one task after the other), or 'auto': `map` on CPU, where the
  convolutions of a vmapped generator become slow grouped ones, and `vmap` elsewhere.
  """

  batch_size: int = 256  # B, images of one task in one call
  sample_batch_size: int = 256  # images for one step of the student, on this device
  num_tasks: int = 1  # M, on this device in one call; 1 is the published algorithm
  task_map: str = 'auto'
  axis: str | None = None  # name of the mapped axis of devices; None on one device

  def __post_init__(self):
    check_option('task_map', self.task_map, TASK_MAPS)
    self.share(self.sample_batch_size, 'sample_batch_size')

  def share(self, total: int, field: str) -> int:
    """Returns `total / num_tasks`; raises a FieldError about `field` unless it is whole."""
    try:
      return parallel.even_share(total, self.num_tasks, field)
    except ValueError as error:
      raise FieldError(field, str(error)) from None

  def keys(self, key: PRNGKey) -> Array:
    """Splits a key into one a task [M], the same however tasks are spread over devices."""
    return parallel.task_keys(key, self.num_tasks, self.axis)

  def draw(self, key: PRNGKey, sample: Callable[[PRNGKey], PyTree]) -> PyTree:
    """Calls `sample(key)` once a task, each with its own key; results are stacked [M, ...]."""
    return jax.vmap(sample)(self.keys(key))

  def map(self, function: Callable[[PyTree], PyTree], inputs: PyTree) -> PyTree:
    """Maps `function` over the tasks, from leaves [M, ...] to leaves [M, ...].

    A single task needs neither a loop nor grouped convolutions.
    """
    if jax.tree.leaves(inputs)[0].shape[0] == 1:
      results = function(jax.tree.map(lambda leaf: leaf[0], inputs))
      return jax.tree.map(lambda leaf: leaf[None], results)
    sequential = self.task_map == 'map' or (
        self.task_map == 'auto' and jax.default_backend() == 'cpu')
    return jax.lax.map(function, inputs) if sequential else jax.vmap(function)(inputs)

  def mean(self, tree: PyTree) -> PyTree:
    """Averages leaves [M, ...] over tasks and devices; see `mean_of_tasks`."""
    return parallel.pmean(self.mean_of_tasks(tree), self.axis)

  def mean_of_tasks(self, tree: PyTree) -> PyTree:
    """Averages leaves [M, ...] over the tasks of this device.

    Integers are counts that agree in all tasks: the first is taken.
    """
    is_inexact = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jax.tree.map(lambda leaf: leaf.mean(0) if is_inexact(leaf) else leaf[0], tree)
