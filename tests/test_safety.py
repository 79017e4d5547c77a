"""Nothing in the package runs the content of a file or a name: no eval and no shell.

One reader alone reads pickles.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / 'dfkd_jax').rglob('*.py'), ROOT / 'main.py'])
RUNS = {'eval', 'exec', 'compile', '__import__'}
MODULES = {  # None of which has any use here; others import them, and these are not looked at.
    'subprocess', 'pty', 'marshal', 'shelve', 'dill', 'joblib', 'cloudpickle', 'pickle', '_pickle',
    'yaml', 'runpy', 'code', 'codeop', 'ctypes', 'builtins', 'commands', 'popen2', 'torch',
    'importlib'}
OF_OS = ('system', 'popen', 'exec', 'spawn', 'posix_spawn', 'fork', 'startfile')
LOADS = {'numpy.load', 'numpy.lib.format.read_array', 'numpy.lib.npyio.load'}  # Which may unpickle.
# What is wanted of these in one file each, and why.
ALLOWED = {
    # Its find_class has a list of its own.
    'dfkd_jax/weights/formats/pytorch.py': {'pickle._Unpickler'},
    'dfkd_jax/report/ledger.py': {'importlib.metadata'},  # Versions.
    'dfkd_jax/data/tfds.py': {'importlib.util'},  # Whether TensorFlow is installed.
    'dfkd_jax/spline/__main__.py': {'importlib.util'},  # Whether matplotlib is installed.
    # Finds a method by the name of a file in synth/methods, and checks the name.
    'dfkd_jax/synth/__init__.py': {'importlib'},
    'dfkd_jax/cli.py': {'runpy'},  # A config is a program of the user's own.
}


def unsafe(text):
  """(line, what) of all that is unsafe in a program."""
  tree, aliases = ast.parse(text), {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      aliases |= {
          each.asname or each.name.split('.')[0]:
          each.name if each.asname else each.name.split('.')[0] for each in node.names}
      for each in node.names:
        if each.name.split('.')[0] in MODULES - {'pickle'}:
          yield node.lineno, each.name
    elif isinstance(node, ast.ImportFrom):
      aliases |= {each.asname or each.name: f'{node.module}.{each.name}' for each in node.names}
      if (node.module or '').split('.')[0] in MODULES:
        yield node.lineno, node.module
      yield from ((node.lineno, f'{node.module}.{each.name}') for each in node.names
                  if node.module == 'os' and each.name.startswith(OF_OS))
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and (name := dotted(node, aliases)):
      if name.startswith('pickle.') or (name.startswith('os.') and name[3:].startswith(OF_OS)):
        yield node.lineno, name
    elif isinstance(node, ast.Name) and node.id in RUNS and isinstance(node.ctx, ast.Load):
      yield node.lineno, node.id
    if isinstance(node, ast.Call):
      given = {each.arg: each.value for each in node.keywords}
      name = dotted(node.func, aliases)
      pickles = given.get(
          'allow_pickle', ast.Constant(name in LOADS and name != 'numpy.lib.format.read_array'))
      if not (isinstance(pickles, ast.Constant) and pickles.value is False):
        yield node.lineno, f'{name}(allow_pickle)'
      if 'shell' in given and not (
          isinstance(given['shell'], ast.Constant) and given['shell'].value is False):
        yield node.lineno, f'{name}(shell)'


def dotted(node, aliases):
  """'numpy.lib.format' of np.lib.format; None of anything else."""
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  if not isinstance(node, ast.Name):
    return None
  return '.'.join([aliases.get(node.id, node.id), *reversed(parts)])


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_runs_what_it_is_given(path):
  allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
  found = [(line, what) for line, what in unsafe(path.read_text(encoding='utf-8'))
           if what not in allowed]
  assert found == []


def test_all_files_are_looked_at():
  assert len(FILES) > 70
  assert {ROOT / name for name in ALLOWED} <= set(FILES)


@pytest.mark.parametrize('path', ALLOWED)
def test_no_exception_is_left_over(path):
  assert ALLOWED[path] <= {what for _, what in unsafe((ROOT / path).read_text(encoding='utf-8'))}


def test_the_one_unpickler_has_a_list_of_names():
  """test_pytorch tries the list; this test finds code that drops it or calls pickle elsewhere."""
  tree = ast.parse((ROOT / 'dfkd_jax/weights/formats/pytorch.py').read_text(encoding='utf-8'))
  own = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
         and any(isinstance(base, ast.Attribute) and base.attr == '_Unpickler'
                 for base in node.bases)]
  assert [each.name for each in own] == ['_Unpickler']
  assert {'find_class', 'persistent_load'} <= {
      each.name for each in own[0].body if isinstance(each, ast.FunctionDef)}


@pytest.mark.parametrize('text', [
    'eval("1")', 'exec("a = 1")', 'compile("1", "", "eval")', 'run = eval', '__import__("os")',
    'import pickle\npickle.loads(b"")', 'import pickle as p\np.Unpickler(file)',
    'from pickle import load', 'import numpy as np\nnp.load("a.npy")',
    'import numpy as np\nnp.load("a.npy", allow_pickle=True)',
    'from numpy import load\nload("a.npy", allow_pickle=wanted)', 'import yaml',
    'import os\nos.system("ls")', 'import os\nos.popen("ls")', 'from os import system',
    'import os as o\no.execv("a", [])', 'import subprocess', 'from subprocess import run',
    'run("ls", shell=True)', 'import marshal', 'import shelve', 'import dill', 'import joblib',
    'import cloudpickle', 'from importlib import import_module', 'import builtins',
    'import numpy as np\nnp.lib.format.read_array(file, allow_pickle=True)'])
def test_what_is_unsafe_is_found(text):
  assert list(unsafe(text))


@pytest.mark.parametrize('text', [
    'program.lower(x).compile()', 're.compile("a")', 'import re\nre.compile("a")',
    'import os\nos.path.exists("a")', 'import numpy as np\nnp.load("a.npy", allow_pickle=False)',
    'json.load(file)', 'model.eval()'])
def test_what_is_safe_is_not(text):
  assert not list(unsafe(text))
