"""Rounds of several calls, and of methods that keep no images."""

import pytest
import toy_runs

from dfkd_jax import train


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


def test_a_round_may_have_several_calls(tmp_path):
  """Two calls a round, three steps after each: as many of both as in twice the rounds."""
  summary, state, _ = toy_runs.observed(
      toy_runs.config(distill__rounds=3, distill__calls_per_round=2, distill__steps_per_round=6),
      tmp_path / 'run')
  assert int(state.synthesis.step) == 6
  assert int(state.student.step) == 12
  assert summary['student']['last']['round'] == 3
  with pytest.raises(
      ValueError, match=r'distill\.steps_per_round is 5, must be a multiple of 2, distill\.calls'):
    train.run(toy_runs.config(distill__calls_per_round=2, distill__steps_per_round=5),
        tmp_path / 'odd')
  assert not (tmp_path / 'odd').exists()


def test_images_of_a_generator_have_the_teachers_labels(tmp_path):
  """A method without buffer and labels, with attention transfer and its own schedule."""
  config = toy_runs.config(distill__rounds=2, distill__attention_factor=1.0)
  config.method = dict(
      name='cu_dfkd', num_steps=1, latent_dim=7, batch_size=4, num_tasks=1, balance_temperature=2.0,
      adversary=dict(divergence='kl', temperature=3.0, masked=True),
      adversarial=dict(init_value=0.5, slope=0.1, begin=0, end=2, every=1))
  _, state, _ = toy_runs.observed(config, tmp_path / 'run')
  assert int(state.synthesis.student_step) == int(state.student.step) == 3
  assert (tmp_path / 'run' / 'images.png').exists()
