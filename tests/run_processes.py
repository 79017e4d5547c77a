"""Helpers of the tests with several processes."""

import socket

import toy_runs


def config(**changes):
  """Three rounds of four tasks, in which the student's agreement and accuracy change."""
  return toy_runs.config(**{**dict(
      seed=2, num_devices=None, distill__rounds=3, distill__distill_after=0, distill__batch_size=8,
      method__num_steps=2,
      method__num_tasks=4, method__capacity=32, checkpoint__every=1, optimizer__momentum=0.9,
      optimizer__learning_rate=0.1, method__adversarial_after=1, student__head_init='ridge',
      student__head_images=21), **changes})


def free_port() -> int:
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]
