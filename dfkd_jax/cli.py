r"""The command line: python main.py [--config=FILE[:ARGUMENTS]] [--config.FIELD=VALUE ...]."""

import argparse
import ast
import logging
import os
import pathlib
import re
import runpy
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from absl import logging as absl_logging
from ml_collections import ConfigDict

from dfkd_jax.config import docs
from dfkd_jax.config.fields import BY_NAME, leaves
from dfkd_jax.messages import nearest, one_line
from dfkd_jax.runs import signals as run_signals

ROOT = pathlib.Path(__file__).resolve().parents[1]  # of a clone: the folder of configs/
_HELP = """Runs a config, such as the embedded quick start or CIFAR-10 at the paper's scale:

  python main.py
  python main.py --config=configs/cifar10.py:fast_dfkd,fast5,wrn40_2-wrn16_1 --workdir=runs/fast5 \\
    --config.teacher.source=weights.safetensors --config.seed=1

Each file in configs/ explains its arguments, which follow the colon. --config.FIELD=VALUE sets any
field of the config; all are listed below.

Run the same command again to resume, bit for bit. Ctrl-C (exit status 130), SIGTERM and budgets (0)
stop after the current round; before there is anything to save, a signal stops at once. After any
other end the run resumes from its last checkpoint.

On several machines, start the same command on each, with a --workdir that all see. Under SLURM,
Open MPI up to 4 and TPU pods on Kubernetes the processes find each other. Elsewhere add
--config.distributed.coordinator=HOST:PORT (of the first), --config.distributed.num_processes=N and
--config.distributed.process_id=0 (to N - 1), or on other TPU pods
--config.distributed.coordinator=auto.
"""
_FLAG = re.compile(r'--?(no)?config\.([\w.]+)')
_BOOLS = {'true': True, 't': True, '1': True, 'false': False, 'f': False, '0': False}
_PARSERS = {str: str, float: float, int: lambda text: int(text, 0),
            bool: lambda text: _BOOLS[text.lower()]}
_STATUS = {'SIGTERM': 0, 'SIGINT': 130}  # a scheduler's request is no error; 130 as in shells
_MACHINE_ERRORS = ('JaxRuntimeError', 'MemoryError')  # such as a device without room


def main(argv: Sequence[str]) -> int:
  """Runs a command line; returns 0, 1 for a machine's error, 2 for wrong input, 130 for Ctrl-C."""
  options = None
  try:
    with run_signals.signals() as stop_request:
      options, overrides = _parse(argv)
      config = load(options.config)
      override(config, [*_init_from(config, options.init_from), *overrides])
      from dfkd_jax import train  # takes seconds, so arguments are checked first

      workdir = default_workdir(options.config) if options.workdir is None else options.workdir
      summary = train.run(config, workdir, command=shlex.join(['python', *argv]),
                          resume=options.resume, signals=stop_request)
    return _STATUS.get(summary.get('stopped'), 0)
  except KeyboardInterrupt as error:
    name = str(error) if isinstance(error, run_signals.Interrupted) else 'SIGINT'
    print(f'Stopped by {name}. The same command goes on from the last checkpoint, if there is one.',
          file=sys.stderr)
    return _STATUS[name]
  except (ValueError, argparse.ArgumentError) as error:
    if options and options.traceback:
      raise
    lines = [one_line(problem) for problem in getattr(error, 'problems', (error,))]
    for line in filter(None, (*lines[:2], ' '.join(lines[2:]))):  # three lines at most
      print(f'error: {line}', file=sys.stderr)
    return 2
  except Exception as error:
    if not options or options.traceback or type(error).__name__ not in _MACHINE_ERRORS:
      raise  # a bug, which needs its traceback
    print(f'error: {type(error).__name__}: {one_line(error)} (--traceback shows where.)',
          file=sys.stderr)
    return 1


def silence_libraries() -> None:
  """Hides reports of Orbax and asyncio on a failed read or write; our error says it in a line."""
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
  sys.unraisablehook = lambda unraisable: None


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Returns the options, and the arguments that set fields of the config."""
  parser = argparse.ArgumentParser(
      prog='python main.py', description=_HELP, allow_abbrev=False, exit_on_error=False,
      epilog=f'fields of the config, with defaults and allowed values:\n{docs.as_text()}',
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', metavar='FILE[:ARGUMENTS]', default='configs/default.py',
                      help='what to run; default: %(default)s')
  parser.add_argument('--workdir', metavar='FOLDER',
                      help='where results go; default: runs/ and the name of the config')
  parser.add_argument('--resume', metavar='force[:FIELD,...]',
                      help='resume with another config, or with these fields changed')
  parser.add_argument('--init_from', metavar='FOLDER',
                      help='begin with the student and generator of an old run')
  parser.add_argument('--traceback', action='store_true', help='show where an error comes from')
  return parser.parse_known_args(argv[1:])


def _init_from(config: ConfigDict, source: str | None) -> list[str]:
  """Returns the fields that --init_from sets; a file of weights has no generator."""
  if source is None:
    return []
  is_run = os.path.isdir(os.path.join(os.path.expanduser(source), 'checkpoints'))
  fields = ['student', 'generator'] if is_run and config.job != 'train' else ['student']
  return [f'--config.init_from.{field}={source}' for field in fields]


def default_workdir(name: str) -> str:
  """Returns 'runs/cifar10-kd-fast2' for 'configs/cifar10.py:kd,fast2'."""
  file, _, arguments = name.partition(':')
  return '-'.join([f'runs/{pathlib.Path(file).stem}', *filter(None, arguments.split(','))])


def load(name: str) -> ConfigDict:
  """Loads the locked config of 'FILE' or 'FILE:ARGUMENTS'; FILE may lie here or in the clone.

  Raises a ValueError if there is no such file, or its `get_config` fails or returns no config.
  """
  file, _, arguments = name.partition(':')
  paths = list(filter(os.path.isfile, (file, ROOT / file)))
  if not paths or not file.endswith('.py'):
    known = [f'configs/{path.name}' for path in sorted((ROOT / 'configs').glob('*.py'))
             if 'def get_config(' in path.read_text(encoding='utf-8')]
    raise ValueError(f'--config is {file!r}, must be a Python file.{nearest(file, known)}')
  try:
    get_config = runpy.run_path(str(paths[0])).get('get_config')
    if not callable(get_config):
      raise ValueError('it has no function get_config.')
    config = get_config(*filter(None, [arguments]))
    if not isinstance(config, ConfigDict):
      raise ValueError(f'get_config returns a {type(config).__name__}, must return a ConfigDict.')
    return config.lock()
  except (ValueError, SyntaxError) as error:
    raise ValueError(f'--config is {name!r}: {error}') from error
  except (Exception, SystemExit) as error:  # a mistake in the file
    lines = [f'line {frame.lineno}: ' for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(paths[0])] or ['']
    raise ValueError(
        f'--config is {name!r}: {lines[-1]}{type(error).__name__}: {error}') from error


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
  """Sets fields by arguments such as '--config.seed=1', '--config.control' and '--config.x', '3'.

  Raises a ValueError if there is no such field. Text that is no value of its type stays text, which
  the checks refuse.
  """
  arguments = list(arguments)
  while arguments:
    flag, has_value, value = arguments.pop(0).partition('=')
    match = _FLAG.fullmatch(flag)
    if not match:
      hint = nearest(flag, ['--config', '--workdir']) if flag.startswith('-') else ''
      raise ValueError(f'Unknown argument {flag!r}.{hint} See --help.')
    negated, field = match.groups()
    section, kind = _find_field(config, field)
    if kind is bool and not has_value:
      value = str(not negated)
    elif negated or not (has_value or arguments):
      raise ValueError(f'config.{field} needs a value: --config.{field}=VALUE.')
    elif not has_value:
      value = arguments.pop(0)
    with section.unlocked(), section.ignore_type():
      section[field.rpartition('.')[2]] = _parse_value(kind, value)


def _find_field(config: ConfigDict, field: str) -> tuple[ConfigDict, type | None]:
  """Returns the section of a field and its type; None: any, for an option without a value."""
  known = {'': config, **dict(leaves(config))}
  section, _, name = field.rpartition('.')
  if isinstance(known.get(field), ConfigDict):
    raise ValueError(f'config.{field} is a section; set one of its fields.')
  if field not in known and not (section.endswith('.options') and section in known):
    raise ValueError(f'Unknown config field {field!r}.{nearest(field, known)} '
                     'python main.py --help lists all fields.')
  if row := BY_NAME.get(field):
    return known[section], row.kind if row.length is None else tuple
  return known[section], known[section].get_type(name) if field in known else None


def _parse_value(kind: type | None, text: str) -> Any:
  if text == 'None':
    return None
  try:
    value = _PARSERS.get(kind, ast.literal_eval)(text)
  except (ValueError, SyntaxError, LookupError, MemoryError, RecursionError):
    return text
  return (value,) if kind is tuple and not isinstance(value, tuple) else value
