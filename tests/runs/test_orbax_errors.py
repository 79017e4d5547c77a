"""What failed reads and writes leave behind is not echoed; what others have to say is."""

import asyncio
import gc
import logging
import sys

import pytest

from dfkd_jax.runs import orbax_errors

COROUTINE = """
async def wait(thing):
  try:
    await thing
  except BaseException as error:
    raise OSError('Encountered error while reading array index') from error


def fail(error):
  raise error
"""
ORBAX, OURS = '/a/site-packages/orbax/checkpoint/serialization.py', '/home/orbax/train.py'
FULL = 'RESOURCE_EXHAUSTED: Error writing "a/b/0" in OCDBT database: Failed to write 9 bytes: No space left on device'


def functions(path):
  """Those above, as if they were in another file."""
  found = {}
  exec(compile(COROUTINE, path, 'exec'), found)
  return found


def raised(error, path):
  """The error, after it was raised in a file."""
  try:
    functions(path)['fail'](error)
  except Exception as found:
    return found


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
  orbax_errors.silence_orbax()
  yield hooked, logs
  for logger in loggers:
    logger.removeHandler(handler)


@pytest.mark.parametrize(('path', 'reported'), [(ORBAX, 0), (OURS, 1)])
def test_a_coroutine_that_is_thrown_away(heard, path, reported):
  coroutine = functions(path)['wait'](Never())
  coroutine.send(None)
  del coroutine
  gc.collect()
  assert heard[0] == ['Encountered error while reading array index'] * reported


class Unraisable:
  """As Python 3.14 has it, which does not say what was thrown away."""

  object = None

  def __init__(self, error):
    self.exc_value, self.exc_traceback = error, error.__traceback__


@pytest.mark.parametrize(('path', 'reported'), [(ORBAX, 0), (OURS, 1)])
def test_an_error_without_an_object(heard, path, reported):
  sys.unraisablehook(Unraisable(raised(ValueError('x'), path)))
  assert len(heard[0]) == reported


@pytest.mark.parametrize(('text', 'reported'), [('x', ['x']), ('Event loop is closed', [])])
def test_an_error_without_a_place(heard, text, reported):
  sys.unraisablehook(Unraisable(RuntimeError(text)))
  assert heard[0] == reported


@pytest.mark.parametrize(('error', 'reported'), [
    (ValueError(FULL), False), (ValueError('Cannot read\nit. [tensorstore_spec={}]'), False),
    (raised(ValueError(FULL), ORBAX), False), (raised(OSError(28, 'No space left on device'), ORBAX), False),
    (raised(ValueError(FULL), OURS), True), (raised(OSError(28, 'No space left on device'), OURS), True),
    (RuntimeError('RESOURCE_EXHAUSTED: Out of memory'), True), (ValueError('STATUS: no more'), True)])
def test_a_future_that_nobody_waits_for(heard, error, reported):
  async def fail():
    future = asyncio.get_running_loop().create_future()
    future.set_exception(error)

  with asyncio.Runner() as runner:
    runner.run(fail())
    gc.collect()
  assert ['was never retrieved' in text for text in heard[1]] == [True] * reported


def test_other_errors_of_asyncio_are_told(heard):
  logger = logging.getLogger('asyncio')
  logger.error('Cannot connect', exc_info=raised(OSError(), ORBAX))
  logger.error('Cannot connect: was never retrieved')
  assert len(heard[1]) == 2


def test_being_silenced_twice_is_being_silenced_once(heard):
  hook = sys.unraisablehook
  orbax_errors.silence_orbax()
  assert sys.unraisablehook is hook


@pytest.mark.parametrize(('error', 'passing'), [
    (ValueError('DATA_LOSS: Error decoding'), False), (ValueError(FULL), True), (MemoryError(), True),
    (OSError('[Errno 13] Permission denied'), True), (ValueError('NOT_FOUND: no such file'), False)])
def test_what_says_nothing_of_the_file(error, passing):
  assert orbax_errors.is_transient(error) == passing


def test_a_reason_is_one_line_without_internals():
  text = """\n  Failed to open "/a/b": No space left on device [os_error_code='28'] [tensorstore_spec='{}']\nand more"""
  assert orbax_errors.reason(ValueError(text)) == 'Failed to open "/a/b": No space left on device'
  assert orbax_errors.reason(KeyError()) == 'KeyError'
  cut = orbax_errors.reason(ValueError('a' * 500 + 'full'))
  assert len(cut) < 300
  assert cut.endswith('full')
