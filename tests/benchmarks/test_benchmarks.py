"""The benchmark of methods: rows are configs, rounds fill the time, schedules keep their height."""

import importlib.util

import pytest
import toy_runs

from dfkd_jax import synth
from dfkd_jax.synth import schedules

spec = importlib.util.spec_from_file_location(
    'benchmark_of_methods', toy_runs.ROOT / 'benchmarks' / 'methods.py')
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
# Ten rounds, and eight of them with student steps: 0.5 s each.
SHORT = {'seconds': {'synthesis': 5.0, 'student': 4.0}}


def test_every_method_has_a_row():
  assert {method for method, _ in benchmark.ROWS.values()} == set(synth.names()) - {'noise'}


@pytest.mark.parametrize('name', [*benchmark.ROWS, *benchmark.ABLATIONS])
def test_each_row_is_a_config(name):
  method, fields = benchmark.ROWS.get(name) or ('ssd_kd', benchmark.ABLATIONS[name])
  config = benchmark.config_of(f'configs/default.py:{method}', fields)
  assert config.method.name == method
  for field in fields:
    name, _, value = field.removeprefix('method.').partition('=')
    assert str(config.method[name]).lower() == value


def test_rounds_fill_the_time():
  """A round takes a second, but the first ten rounds, without a student, half a second."""
  fields = benchmark.fields_for(100, 'configs/default.py:fast_dfkd', (), SHORT)
  assert set(fields) == {'distill.rounds=105', 'evaluate.every=10'}
  fitted = benchmark.fields_for(
      100, 'configs/default.py:fast_dfkd', (), SHORT | {'head': {'seconds': 7.0}})
  assert set(fitted) == {'distill.rounds=98', 'evaluate.every=9'}


def test_the_schedules_of_cu_dfkd_end_at_the_values_of_the_config():
  path = 'configs/default.py:cu_dfkd'
  fields = benchmark.fields_for(600, path, (), SHORT)
  planned, original = benchmark.config_of(path, fields), benchmark.config_of(path, ())

  def ends(config):
    section, method = config.distill, config.method
    factor = schedules.ramp(**method.adversarial.to_dict())
    steps = section.rounds * section.steps_per_round
    calls = section.rounds * section.calls_per_round
    return method.threshold_start + method.threshold_growth * steps, float(factor(calls))

  assert (planned.distill.rounds, original.distill.rounds) == (600, 250)
  assert ends(planned) == pytest.approx(ends(original), rel=0.01)
