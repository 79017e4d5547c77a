"""What failed reads and writes leave behind is not echoed; what others have to say is."""

import gc
import logging
import sys
import warnings

import pytest

from dfkd_jax import complaints

COROUTINE = """
async def wait(thing):
  try:
    await thing
  except BaseException as error:
    raise Exception('Encountered error while reading array index') from error
"""
FULL = "RESOURCE_EXHAUSTED: Error writing \"a/b/0\" in OCDBT database: Failed to write 9 bytes: No space left on device"


class Never:
  """Of which nothing ever comes."""

  def __await__(self):
    yield


@pytest.fixture
def heard(monkeypatch):
  """What is reported while Orbax is silenced, in two lists: of objects thrown away, and of logs."""
  logs, hooked = [], []
  monkeypatch.setattr(sys, 'unraisablehook', lambda unraisable: hooked.append(str(unraisable.exc_value)))
  handler = logging.Handler()
  handler.emit = lambda record: logs.append(record.getMessage())
  loggers = [logging.getLogger(name) for name in ('absl', 'asyncio')]
  for logger in loggers:
    monkeypatch.setattr(logger, 'filters', [])
    logger.addHandler(handler)
  with warnings.catch_warnings():
    warnings.simplefilter('default')  # As it is but in tests.
    complaints.silence()
    yield hooked, logs
  for logger in loggers:
    logger.removeHandler(handler)


@pytest.mark.parametrize('begun', [True, False])
@pytest.mark.parametrize(('path', 'reported'), [('/a/orbax/checkpoint/serialization.py', 0), ('/a/ours/orbax.py', 1)])
def test_a_coroutine_that_is_thrown_away(heard, path, reported, begun):
  found = {}
  exec(compile(COROUTINE, path, 'exec'), found)
  coroutine = found['wait'](Never())
  if begun:
    coroutine.send(None)
  del coroutine
  gc.collect()
  assert len(heard[0]) == reported
  assert all(('reading array index' if begun else "'wait' was never awaited") in text for text in heard[0])


@pytest.mark.parametrize(('future', 'reported'), [
    (f'<Future finished exception=ValueError({FULL!r})>', False),
    (f'<_GatheringFuture finished exception=ValueError({FULL!r})>', False),
    ("<Future finished exception=ValueError('Cannot read. [tensorstore_spec={}]')>", False),
    ("<Task finished exception=ValueError('STATUS: no more')>", True),
    ("<Task finished exception=KeyError('RESOURCE_EXHAUSTED')>", True)])
def test_a_future_that_nobody_waits_for(heard, future, reported):
  logging.getLogger('asyncio').error(f'Future exception was never retrieved\nfuture: {future}')
  assert bool(heard[1]) == reported


def test_other_errors_of_asyncio_are_told(heard):
  logging.getLogger('asyncio').error('Cannot connect: tensorstore_spec')
  assert len(heard[1]) == 1


def test_being_silenced_twice_is_being_silenced_once(heard):
  hook = sys.unraisablehook
  complaints.silence()
  assert sys.unraisablehook is hook


@pytest.mark.parametrize(('error', 'passing'), [
    (ValueError('DATA_LOSS: Error decoding'), False), (ValueError(FULL), True), (MemoryError(), True),
    (OSError('[Errno 13] Permission denied'), True), (ValueError('NOT_FOUND: no such file'), False)])
def test_what_says_nothing_of_the_file(error, passing):
  assert complaints.is_passing(error) == passing


def test_a_reason_is_one_line_without_internals():
  text = """\n  Failed to open "/a/b": No space left on device [os_error_code='28'] [tensorstore_spec='{}']\nand more"""
  assert complaints.reason(ValueError(text)) == 'Failed to open "/a/b": No space left on device'
  assert complaints.reason(KeyError()) == 'KeyError'
  cut = complaints.reason(ValueError('a' * 500 + 'full'))
  assert len(cut) < 300
  assert cut.endswith('full')
