"""Inversions into a buffer from which the student draws uniformly: FastDFKD and NAYER share it."""

from dfkd_jax import parallel, tasks
from dfkd_jax.models.network import Network
from dfkd_jax.synth import inversion as inversions
from dfkd_jax.synth import replay
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Batch, Metrics, PRNGKey


def synthesizer(
    loop: inversions.Loop, *, image_shape: tuple[int, int, int], task: tasks.Task, capacity: int, num_tasks: int,
    axis: str | None,
) -> Synthesizer:
  """Makes a synthesizer of a loop whose images are kept, the oldest going first.

  Args:
    loop: Of these tasks and on this axis.
    image_shape: [H, W, C].
    task: What the teacher was trained for.
    capacity: Images that the buffer holds on this device, a multiple of `num_tasks`.
    num_tasks: M, inversions on this device in one call.
    axis: The mapped axis of devices, if any.
  """
  share = parallel.even_share(capacity, num_tasks, 'capacity')

  def init(key: PRNGKey, teacher: Network) -> inversions.State:
    return loop.init(key, teacher, replay.create(share, image_shape, task.num_classes, num_tasks))

  def synthesize(
      state: inversions.State, key: PRNGKey, teacher: Network, student: Network | None
  ) -> tuple[inversions.State, Metrics]:
    state, found = loop.invert(state, key, teacher, student)
    buffer = replay.add(state.buffer, found.kept['images'], found.kept['labels'], axis)
    return state.replace(buffer=buffer), found.metrics

  def sample(state: inversions.State, key: PRNGKey) -> Batch:
    return loop.sample(state, key, lambda k, number: replay.sample(k, state.buffer, number, axis))

  return Synthesizer(init, synthesize, sample)
