"""How bad input must be refused, and how much of each kind is generated."""

import contextlib
import io
import os
import pathlib
import tempfile

import hypothesis
import toy_runs
from hypothesis import Phase, settings

from dfkd_jax import cli

is_exhaustive = False  # Set by --exhaustive; without it, at most 20 inputs of each kind.
# Bad inputs of each kind; the first half in test_bad_inputs, the other in test_bad_files.
COUNTS = {
    'numbers': 50, 'types': 25, 'names': 40, 'fields': 15, 'pairs': 30, 'config files': 45,
    'workdirs': 14, 'damaged weights': 45, 'unfit weights': 45, 'data sets': 20, 'embeddings': 20,
    'arrays to prepare': 25, 'folders to prepare': 12, 'arguments of prepare': 19}
CONFIG = """
import toy_runs

def get_config(arguments=''):
  changes = {}
  if arguments in ('bare', 'nayer'):
    changes = dict(dataset__name=None, preflight__enabled=False)
  config = toy_runs.config(**changes)
  if arguments == 'nayer':
    config.method.update(name='nayer', meta='reinit', embeddings='')
  if arguments == 'train':
    config.job = 'train'
  return config
"""


def generate(family, strategy, run):
  """Runs up to `COUNTS[family]` different inputs; `run` asserts that each is refused."""
  seen, number = set(), COUNTS[family] if is_exhaustive else min(20, COUNTS[family])

  @settings(max_examples=6 * number, derandomize=True, deadline=None, database=None,
            phases=[Phase.generate], suppress_health_check=list(hypothesis.HealthCheck))
  @hypothesis.given(strategy)
  def each(drawn):
    if repr(drawn) not in seen and len(seen) < number:
      run(drawn)
      seen.add(repr(drawn))

  each()
  assert len(seen) == number


@contextlib.contextmanager
def folder():
  """A new one, which is the working directory too."""
  with tempfile.TemporaryDirectory(prefix='refusals_') as name, contextlib.chdir(name):
    yield pathlib.Path(name)


def state(folder):
  """All that lies in a folder, with what says whether it was touched."""
  found = {}
  for root, folders, files in os.walk(folder):
    for name in (*folders, *files):
      path = os.path.join(root, name)
      about = os.lstat(path)
      found[path] = about.st_mode, about.st_size, about.st_mtime_ns
  return found


def refused(function, folder, *pieces):
  """Asserts that a command is refused in three lines at most with all pieces."""
  before, out, err = state(folder), io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = function()
  text = err.getvalue()
  assert status == 2, text
  assert out.getvalue() == ''
  assert 1 <= len(text.splitlines()) <= 3, text
  assert text.startswith('error: '), text
  assert 'Traceback' not in text
  for piece in pieces:
    assert str(piece) in text, (piece, text)
  assert state(folder) == before, text


def run_main(*arguments, config=None, kind=''):
  """A call of the command line with the toy config, or another."""
  if config is None:
    path = toy_runs.folder() / 'toy.py'
    path.write_text(CONFIG)
    config = f'{path}:{kind}' if kind else str(path)
  return lambda: cli.main(['main.py', f'--config={config}', *map(str, arguments)])
