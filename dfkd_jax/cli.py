r"""The command line: python main.py [--config=FILE[:ARGUMENTS]] [--config.FIELD=VALUE ...]."""

import argparse
import importlib.util
import logging
import os
import pathlib
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence

from absl import logging as absl_logging
from ml_collections import ConfigDict

from dfkd_jax.config import docs
from dfkd_jax.config.overrides import override
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
_STATUS = {'SIGTERM': 0, 'SIGINT': 130}  # a scheduler's request is no error; 130 as in shells
_MAX_LINES, _MAX_LETTERS = 3, 1_000  # of all errors; of one line
_MACHINE_ERRORS = ('JaxRuntimeError', 'MemoryError')  # such as a device without room


class _Parser(argparse.ArgumentParser):
  """Raises ValueError instead of exiting."""

  def error(self, message: str) -> None:
    raise ValueError(f'{message}; see --help.')


def main(argv: Sequence[str]) -> int:
  """Runs a command line.

  Returns:
    The exit status: 0, 1 after a machine's error, 2 after wrong input, 130 after Ctrl-C.
  """
  try:
    with run_signals.signals() as stop_request:
      return _main(argv, stop_request)
  except KeyboardInterrupt as error:
    name = str(error) if isinstance(error, run_signals.Interrupted) else 'SIGINT'
    print(f'Stopped by {name}. The same command goes on from the last checkpoint, if there is one.',
          file=sys.stderr)
    return _STATUS[name]


def _main(argv: Sequence[str], stop_request: run_signals.StopRequest) -> int:
  options = None
  try:
    options, overrides = _parse(argv)
    config = load(options.config)
    override(config, [*_init_from(config, options.init_from), *overrides])
    from dfkd_jax import train  # takes seconds, so arguments are checked first

    workdir = default_workdir(options.config) if options.workdir is None else options.workdir
    summary = train.run(config, workdir, command=shlex.join(['python', *argv]),
                        resume=options.resume, signals=stop_request)
  except ValueError as error:
    if options and options.traceback:
      raise
    for line in _lines(error):
      print(f'error: {line}', file=sys.stderr)
    return 2
  except Exception as error:
    if not options or options.traceback or type(error).__name__ not in _MACHINE_ERRORS:
      raise  # a bug, which needs its traceback
    print(f'error: {type(error).__name__}: {_one_line(error)} (--traceback shows where.)',
          file=sys.stderr)
    return 1
  return _STATUS.get(summary.get('stopped'), 0)


def silence_libraries() -> None:
  """Hides reports of Orbax and asyncio on a failed read or write; our error says it in a line."""
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
  sys.unraisablehook = lambda unraisable: None


def _lines(error: ValueError) -> list[str]:
  """Formats each problem as a line; the last line has all that are left."""
  problems = [_one_line(problem) for problem in getattr(error, 'problems', (error,))]
  return [*problems[:_MAX_LINES - 1], *filter(None, [' '.join(problems[_MAX_LINES - 1:])])]


def _one_line(text: object) -> str:
  return one_line(text, _MAX_LETTERS)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Returns the options, and the arguments that set fields of the config."""
  parser = _Parser(
      prog='python main.py', description=_HELP, allow_abbrev=False,
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

  Raises:
    ValueError: There is no such file, or its `get_config` fails or returns no config.
  """
  file, _, arguments = name.partition(':')
  paths = [path for path in (pathlib.Path(file), ROOT / file)
           if os.path.isfile(path) and path.suffix == '.py']
  if not paths:
    known = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / 'configs').glob('*.py'))
             if 'def get_config(' in path.read_text(encoding='utf-8')]
    raise ValueError(f'--config is {file!r}, must be a Python file.{nearest(file, known)}')
  spec = importlib.util.spec_from_file_location(f'{paths[0].stem}_config', paths[0])
  module, before = importlib.util.module_from_spec(spec), sys.dont_write_bytecode
  sys.dont_write_bytecode = True  # leave nothing beside the file
  try:
    spec.loader.exec_module(module)
    if not callable(getattr(module, 'get_config', None)):
      raise ValueError('it has no function get_config.')
    config = module.get_config(*filter(None, [arguments]))
  except (Exception, SystemExit) as error:
    raise ValueError(f'--config is {name!r}: {_origin(error, paths[0])}{error}') from error
  finally:
    sys.dont_write_bytecode = before
  if not isinstance(config, ConfigDict):
    raise ValueError(f'--config is {name!r}: get_config returns a {type(config).__name__}, must '
                     'return a ConfigDict.')
  return config.lock()


def _origin(error: BaseException, path: pathlib.Path) -> str:
  """Returns line and kind of a config file's error; a ValueError explains itself."""
  if isinstance(error, (ValueError, SyntaxError)):
    return ''
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if os.path.abspath(frame.filename) == os.path.abspath(path)]
  return f'{f"line {lines[-1]}: " if lines else ""}{type(error).__name__}: '
