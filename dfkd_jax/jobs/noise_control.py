"""What the images of a run are worth: the difference to a student that learns as long from noise."""

import jax
from jax.sharding import Mesh

from dfkd_jax import distill, parallel, synth
from dfkd_jax.config import build
from dfkd_jax.models.network import Network
from dfkd_jax.runs import programs
from dfkd_jax.runs.loop import Experiment
from dfkd_jax.types import PRNGKey


def run(experiment: Experiment, mesh: Mesh, tx, network: Network, teacher: Network, key: PRNGKey) -> dict[str, float]:
  """Trains it, in as many steps as the student has, and scores it on the test images.

  It is saved as often as the run is, in a folder of its own, and goes on where it stopped.

  Args:
    experiment: Of the run, entered.
    mesh: Of its devices.
    tx: The student's optimizer.
    network: What the student began as.
    teacher: On the devices.
    key: Of the noise.

  Raises:
    stopping.Stopped: The run was asked to end early, and is saved.
  """
  config = experiment.config
  section, num_tasks = config.distill, build.local_tasks_of(config, mesh.size)
  make = lambda axis: synth.create(
      'noise', image_shape=tuple(config.dataset.image_shape), sample_batch_size=section.batch_size // mesh.size,
      num_tasks=num_tasks, axis=axis)
  with experiment.ledger.part('compile'):
    state = programs.State(programs.init(make, mesh, key, teacher), parallel.place(mesh, distill.init(network, tx)))
    program = programs.compiled_steps(config, mesh, make, tx, state, teacher)
  total = (section.rounds - section.distill_after) * section.calls_per_round
  every = config.checkpoint.every * section.calls_per_round
  state, done = experiment.store.resume_control(state)
  with experiment.ledger.part('control'):
    student, synthesis = state.student, state.synthesis
    for index in range(done, total):
      student, synthesis, _ = program(student, synthesis, jax.random.fold_in(key, index), teacher)
      jax.block_until_ready(student.step)  # Else many calls were under way when the run is asked to end.
      done = index + 1
      reason = experiment.reason(minutes=done < total)
      if reason or done == total or done % every == 0:
        experiment.store.save_control(done, programs.State(synthesis, student))
      experiment.stop(reason, section.rounds, section.rounds, f' and call {done} of {total} of the control')
  return experiment.evaluate(student.network)
