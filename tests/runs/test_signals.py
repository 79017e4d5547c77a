"""Runs that are asked to end early: by a signal, or by what they may spend."""

import signal
import threading

import pytest
import toy_runs
from toy_runs import stopped

from dfkd_jax import report, train
from dfkd_jax.runs import programs
from dfkd_jax.runs import signals as run_signals


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_a_signal_ends_a_run_after_its_round(tmp_path, name, capsys, heeded):
  def update(self, **numbers):
    updated(self, **numbers)
    if self._done == 3:
      signal.raise_signal(getattr(signal, name))

  before, updated = [signal.getsignal(number)
      for number in (signal.SIGTERM, signal.SIGINT)], report.Progress.update
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report.Progress, 'update', update)
    found = train.run(toy_runs.config(), tmp_path, signals=True)
  assert (found['stopped'], found['done'], found['total']) == (name, 3, 5)
  assert found['counts'] == {'starts': 1, 'synthesised': 12, 'seen': 2 * 3 * 4, 'reseeded': 0}
  text = f'Stopped by {name} after round 3 of 5, saved in {tmp_path}; the same command goes on.'
  assert text in capsys.readouterr().err
  assert not (tmp_path / 'summary.json').exists()
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
  capsys.readouterr()
  summary = train.run(toy_runs.config(), tmp_path, signals=True)
  assert 'after round 3' in capsys.readouterr().err
  assert summary['counts'] == {'starts': 2, 'synthesised': 20, 'seen': 4 * 3 * 4, 'reseeded': 0}
  assert summary['student'] == toy_runs.whole()[0]['student']
  assert toy_runs.metrics(tmp_path) == toy_runs.whole()[1]


def test_a_second_signal_does_what_it_always_did(heeded):
  with run_signals.signals() as request:
    request.defer()
    assert request.signal is None
    signal.raise_signal(signal.SIGINT)
    assert request.signal == 'SIGINT'
    with pytest.raises(KeyboardInterrupt) as error:
      signal.raise_signal(signal.SIGINT)
  assert not isinstance(error.value, run_signals.Interrupted)


@pytest.mark.parametrize('name', run_signals.NAMES)
def test_a_signal_ends_at_once_what_has_nothing_to_save(heeded, tmp_path, monkeypatch, name):
  """While a run is prepared. The run in the folder stays unchanged."""
  stopped(toy_runs.config(), tmp_path, 3)
  before = toy_runs.tree_of(tmp_path)
  monkeypatch.setattr(programs, 'place_and_compile',
      lambda *arguments, **more: signal.raise_signal(getattr(signal, name)))
  with pytest.raises(run_signals.Interrupted, match=name):
    train.run(toy_runs.config(), tmp_path, signals=True)
  assert toy_runs.tree_of(tmp_path) == before


def test_a_signal_that_is_ignored_stays_so(heeded):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with run_signals.signals() as request:
    request.defer()
    signal.raise_signal(signal.SIGINT)
    assert request.signal is None
    signal.raise_signal(signal.SIGTERM)
    assert request.signal == 'SIGTERM'
  assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_signals_are_left_alone_where_they_are_not_asked_for_or_not_to_be_had():
  before = signal.getsignal(signal.SIGTERM)
  with run_signals.signals(False) as request:
    assert signal.getsignal(signal.SIGTERM) is before
    assert request.signal is None
  found = []
  thread = threading.Thread(target=lambda: found.append(run_signals.signals().__enter__().signal))
  thread.start()
  thread.join()
  assert found == [None]
  assert signal.getsignal(signal.SIGTERM) is before


def test_a_budget_of_images_ends_a_run_that_a_larger_one_goes_on_with(tmp_path, capsys):
  found = train.run(toy_runs.config(budget__images=9), tmp_path)
  assert (found['stopped'], found['done']) == ('budget.images', 3)  # Four a round.
  assert 'a larger config.budget.images goes on' in capsys.readouterr().err
  assert train.run(toy_runs.config(budget__images=9), tmp_path)['done'] == 3  # Nothing more.
  assert train.run(toy_runs.config(budget__images=20),
      tmp_path)['student'] == toy_runs.whole()[0]['student']
  assert toy_runs.metrics(tmp_path) == toy_runs.whole()[1]


def test_a_budget_of_time_ends_each_start(tmp_path):
  config = toy_runs.config(budget__minutes=1e-9)
  # Each start does something, however little it may spend; else none would ever end.
  for done in (1, 2, 3):
    found = train.run(config, tmp_path)
    assert (found['stopped'], found['done']) == ('budget.minutes', done)
  assert train.run(toy_runs.config(budget__minutes=60.0),
      tmp_path)['student'] == toy_runs.whole()[0]['student']
