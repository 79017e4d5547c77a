"""A second student that learns from noise: its score shows how much the images are worth."""

import jax

from dfkd_jax import distill, parallel, report, synth
from dfkd_jax.models.network import Network
from dfkd_jax.runs import programs
from dfkd_jax.runs.loop import Experiment
from dfkd_jax.types import PRNGKey


def run(experiment: Experiment, plan: programs.Plan, student: Network, teacher: Network,
        image_shape: tuple[int, int, int], key: PRNGKey) -> dict[str, float]:
  """Trains the first `student` for as many steps as the run's, and evaluates it on test images.

  Saves it as often as the run, and resumes from there. Raises run_signals.Stopped to end early.
  """
  rounds = plan.distill
  plan = plan._replace(make=lambda axis: synth.create(
      'noise', image_shape=image_shape, sample_batch_size=rounds.batch_size // plan.mesh.size,
      num_tasks=plan.num_tasks, axis=axis))
  with experiment.ledger.part('compile'):
    state = programs.State(programs.init(plan.make, plan.mesh, key, teacher),
                           parallel.place(plan.mesh, distill.init(student, plan.tx)))
    program = programs.compile_steps(plan, state, teacher)
  total = rounds.learning_rounds * rounds.calls_per_round
  save_every = experiment.settings.save_every * rounds.calls_per_round
  state, done = experiment.store.resume_control(state)
  with experiment.ledger.part('control'), report.Progress(
      total, initial=done, unit='call of the control') as progress:
    for index in range(done, total):
      learner, synthesis, _ = program(
          state.student, state.synthesis, jax.random.fold_in(key, index), teacher)
      jax.block_until_ready(learner.step)  # so that a stop request does not find calls queued
      state, done = programs.State(synthesis, learner), index + 1
      progress.update()
      reason = experiment.stop_reason(minutes=done < total)
      if reason or done == total or done % save_every == 0:
        experiment.store.save_control(done, state)
      experiment.stop(reason, rounds.rounds, rounds.rounds,
                      f' and call {done} of {total} of the control')
  return experiment.evaluate(state.student.network)
