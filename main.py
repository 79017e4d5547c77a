r"""Runs a config, such as the embedded quick start (without arguments) or CIFAR-10 at the paper's scale:

  python main.py
  python main.py --config=configs/cifar10.py:fast_dfkd,fast5,wrn40_2-wrn16_1 --workdir=runs/fast5 \
    --config.teacher.source=weights.safetensors --config.seed=1

What follows the colon are arguments, which each file in configs/ explains. Any field of the config may be set by
--config.FIELD=VALUE; configs/common.py lists them all. The same command goes on where a run was stopped, bit for
bit: by Ctrl-C (exit status 130), SIGTERM (0) or a budget (0) after the round that is under way, by a signal at once
where there is nothing to save yet, or by anything else after the last checkpoint. --resume=force:FIELD,... goes on with
these fields of the config changed, --resume=force with any; --init_from=FOLDER begins a new run with the student and
the generator of an old one.

On several machines the same command is started once on each, with a --workdir that all see, and with
--config.distributed.coordinator=HOST:PORT (of the first) --config.distributed.num_processes=N
--config.distributed.process_id=0 (to N - 1); under SLURM's srun, Open MPI up to 4 and TPU pods on
Kubernetes it needs none of these, and on other TPU pods --config.distributed.coordinator=auto.
"""

import argparse
import importlib.util
import inspect
import logging
import os
import pathlib
import re
import shlex
import sys
import traceback
import types
import warnings
from collections.abc import Sequence

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_dict, config_flags
from ml_collections.config_flags import config_path

from dfkd_jax import messages
from dfkd_jax.messages import nearest
from dfkd_jax.runs import signals as run_signals

HERE = pathlib.Path(__file__).resolve().parent
_STATUS = {'SIGTERM': 0, 'SIGINT': 130}  # Exit status: what schedulers ask for is no error; the habit of shells.
_LINES = 3  # That an error has at most.
_OF_MACHINES = ('JaxRuntimeError', 'MemoryError')  # Such as a device that has no room.
_LONGEST = 1_000  # Letters of each.
_KINDS = {int: 'a whole number', float: 'a number', bool: 'True or False', tuple: "a tuple such as '(1, 2)'"}


class _Parser(argparse.ArgumentParser):
  """Raises where argparse would print its usage and exit."""

  def error(self, message: str) -> None:
    raise ValueError(f'{message}; see --help.')


def main(argv: Sequence[str]) -> int:
  """Runs what the arguments name; returns the exit status: 2 after one line on what is wrong with them."""
  try:
    with run_signals.signals() as asked:
      return _main(argv, asked)
  except KeyboardInterrupt as error:
    name = error.name if isinstance(error, run_signals.Interrupted) else 'SIGINT'
    print(f'Stopped by {name}. The same command goes on from the last checkpoint, if there is one.', file=sys.stderr)
    return _STATUS[name]


def _main(argv: Sequence[str], asked: run_signals.StopRequest) -> int:
  wanted = None
  try:
    wanted, overrides = _arguments(argv)
    config = load(wanted.config)
    override(config, [*_begun_from(config, wanted.init_from), *overrides])
    from dfkd_jax import train  # Arguments are checked before the seconds that this import takes.

    workdir = default_workdir(wanted.config) if wanted.workdir is None else wanted.workdir
    found = train.run(
        config, workdir, command=shlex.join(['python', *argv]), resume=wanted.resume, signals=asked)
  except ValueError as error:
    if wanted and wanted.traceback:
      raise
    for line in _lines(error):
      print(f'error: {line}', file=sys.stderr)
    return 2
  except Exception as error:
    if not wanted or wanted.traceback or type(error).__name__ not in _OF_MACHINES:
      raise  # A mistake of ours, which its place tells.
    print(f'error: {type(error).__name__}: {_printable(str(error))} (--traceback says where.)', file=sys.stderr)
    return 1
  return _STATUS.get(found.get('stopped'), 0)


def _silence_libraries() -> None:
  """Hides the reports of Orbax and asyncio on a failed read or write: the error has one line."""
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
  sys.unraisablehook = lambda unraisable: None


def _lines(error: ValueError) -> list[str]:
  """A line for each thing that is wrong; three at most, the last of which has all that are left."""
  problems = [_printable(str(problem)) for problem in getattr(error, 'problems', (error,))]
  return [*problems[:_LINES - 1], *filter(None, [' '.join(problems[_LINES - 1:])])]


def _printable(text: str) -> str:
  """One line that ends within a screen: names in it may be those of a foreign file."""
  return messages.one_line(text, _LONGEST)


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Our arguments, and those that set fields of the config."""
  parser = _Parser(
      prog='python main.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False)
  parser.add_argument(
      '--config', metavar='FILE[:ARGUMENTS]', default='configs/default.py', help='what to run; default: %(default)s')
  parser.add_argument('--workdir', metavar='FOLDER', help='where results go; default: runs/ and the name of the config')
  parser.add_argument('--resume', metavar='force[:FIELDS]', help='go on with a config that differs, in these fields')
  parser.add_argument('--init_from', metavar='FOLDER', help='begin with the student and generator of an old run')
  parser.add_argument('--traceback', action='store_true', help='say where an error comes from')
  return parser.parse_known_args(argv[1:])


def _begun_from(config: config_dict.ConfigDict, place: str | None) -> list[str]:
  """The fields that `--init_from` stands for: of a file, which holds no generator, the student alone."""
  if place is None:
    return []
  is_run = os.path.isdir(os.path.join(os.path.expanduser(place), 'checkpoints'))
  fields = ['student', 'generator'] if is_run and config.job != 'train' else ['student']
  return [f'--config.init_from.{field}={place}' for field in fields]


def default_workdir(name: str) -> str:
  """`configs/cifar10.py:kd,fast2` -> `runs/cifar10-kd-fast2`."""
  file, _, arguments = name.partition(':')
  return '-'.join([f'runs/{pathlib.Path(file).stem}', *filter(None, arguments.split(','))])


def load(name: str) -> config_dict.ConfigDict:
  """The locked config of `FILE[:ARGUMENTS]`, FILE being looked for here and beside this program.

  Raises:
    ValueError: There is no such file, it has no `get_config`, or it does not know the arguments.
  """
  file, _, arguments = name.partition(':')
  paths = [path for path in (pathlib.Path(file), HERE / file) if os.path.isfile(path) and path.suffix == '.py']
  if not paths:
    known = [path.relative_to(HERE).as_posix() for path in sorted((HERE / 'configs').glob('*.py'))
             if 'def get_config(' in path.read_text(encoding='utf-8')]
    raise ValueError(f'--config is {file!r}, must be a Python file that is there.{nearest(file, known)}')
  module = _module(paths[0], file)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'--config is {file!r}, which has no get_config.')
  given = [arguments] if arguments else []
  try:
    inspect.signature(module.get_config).bind(*given)
  except TypeError as error:
    raise ValueError(f'--config is {name!r}, whose get_config is not for {given}: {error}.') from error
  try:
    config = module.get_config(*given)
  except (Exception, SystemExit) as error:
    raise ValueError(f'--config is {name!r}: {_of_file(error, paths[0])}{error}') from error
  if not isinstance(config, config_dict.ConfigDict):
    raise ValueError(f'--config is {file!r}, whose get_config gives a {type(config).__name__}, must be a ConfigDict.')
  return config.lock()


def _module(path: pathlib.Path, file: str) -> types.ModuleType:
  """The module of a config file, run; nothing is left beside it."""
  spec = importlib.util.spec_from_file_location(f'{path.stem}_config', path)
  module, before = importlib.util.module_from_spec(spec), sys.dont_write_bytecode
  sys.dont_write_bytecode = True
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    raise ValueError(
        f'--config is {file!r}, which is no Python file that can be run: {_of_file(error, path)}{error}') from error
  finally:
    sys.dont_write_bytecode = before
  return module


def _of_file(error: BaseException, path: pathlib.Path) -> str:
  """What kind of error a config file raised, and where in it; nothing of a ValueError, which says what is wrong."""
  if isinstance(error, (ValueError, SyntaxError)):
    return ''
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if os.path.abspath(frame.filename) == os.path.abspath(path)]
  return f'{f"line {lines[-1]}: " if lines else ""}{type(error).__name__}: '


def override(config: config_dict.ConfigDict, arguments: Sequence[str]) -> None:
  """Sets fields by `--config.FIELD=VALUE`.

  Raises:
    ValueError: There is no such field, or its values are of another type.
  """
  fields = [_field(config, argument) for argument in arguments if argument.startswith('-')]
  values, argv = flags.FlagValues(), ['main.py', *arguments]
  try:
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
    left = values(argv)[1:]
  except flags.Error as error:
    for field in fields:
      if match := re.match(rf'flag --config\.{re.escape(field)}=(.*?): ', str(error)):
        kind = config_path.get_type(field, config)
        raise ValueError(f'config.{field} is {match[1]!r}, must be {_KINDS.get(kind, kind.__name__)}.') from error
    raise ValueError(str(error)) from error
  except (LookupError, TypeError, ArithmeticError, MemoryError, RecursionError) as error:  # Of how Python reads it.
    raise ValueError(f'{" ".join(arguments)!r} has a value that its field cannot take: {error}') from error
  if left:
    raise ValueError(f'Unknown argument {left[0]!r}; see --help.')


def _field(config: config_dict.ConfigDict, argument: str) -> str:
  """The field that an argument sets, which must be there."""
  match = re.fullmatch(r'--?(?:no)?config\.([\w.]+)((?:\[\d+\])*)(?:=.*)?', argument, re.DOTALL)
  if not match:
    name = argument.split('=')[0]
    raise ValueError(f'Unknown argument {name!r}.{nearest(name, ["--config", "--workdir"])} See --help.')
  known = _fields(config)
  if match[1] in known and match[2]:
    raise ValueError(f'config.{match[1]}{match[2]} is set, must be the whole tuple: --config.{match[1]}=(...).')
  if match[1] in known:
    return match[1]
  section = match[1].rpartition('.')[0]
  while section and section not in known:
    section = section.rpartition('.')[0]
  there = [name for name in known if name.rpartition('.')[0] == section]
  raise ValueError(
      f'Unknown config field {match[1]!r}.{nearest(match[1], known)} '
      f'{f"config.{section}" if section else "config"} has: {", ".join(there) or "no fields"}.')


def _fields(section: config_dict.ConfigDict, prefix: str = '') -> list[str]:
  """Dotted names of all fields and sections."""
  names = []
  for name, value in section.items():
    names.append(prefix + name)
    if isinstance(value, config_dict.ConfigDict):
      names += _fields(value, f'{prefix}{name}.')
  return names


if __name__ == '__main__':
  _silence_libraries()
  sys.exit(main(sys.argv))
