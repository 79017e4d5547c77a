"""Docstrings, messages and Markdown are plain English, with few chains of relative clauses."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BANNED = re.compile(
    r'\b(those of|that of|of which|of whose|whose|that which|as it is|else\b|of those|for what|'
    r'in what|with what|what (?:is|of|a|an|the|they|it|no|was|were|has|have|can|may))\b',
    re.IGNORECASE)
MOST = 0.02  # Share of the sentences of a group.
CODE = {
    **{path.name: [*path.rglob('*.py')] for path in sorted((ROOT / 'dfkd_jax').iterdir())
       if path.is_dir() and any(path.rglob('*.py'))},
    'top level': [*(ROOT / 'dfkd_jax').glob('*.py'), ROOT / 'main.py'],
    'configs': [*(ROOT / 'configs').rglob('*.py')]}
PAGES = [*ROOT.glob('*.md'), *sorted((ROOT / 'docs').glob('*.md'))]
MESSAGES = {'note', 'print', 'add_argument', 'ArgumentParser'}  # Calls whose strings people read.


def docstrings(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
      yield ast.get_docstring(node) or ''
    body = getattr(node, 'body', None) if isinstance(node, ast.ClassDef) else None
    for item in body or ():  # A string below a field documents it.
      value = getattr(getattr(item, 'value', None), 'value', None)
      if isinstance(item, ast.Expr) and isinstance(value, str):
        yield value


def messages(tree):
  """Texts of errors and of calls that print, with a letter for each value in them."""
  for node in ast.iter_child_nodes(tree):
    function = getattr(node, 'func', None)
    name = getattr(function, 'attr', getattr(function, 'id', ''))
    is_message = isinstance(node, ast.Raise) or name in MESSAGES or name.endswith('Error')
    yield from texts(node) if is_message else messages(node)


def texts(node):
  if isinstance(node, ast.JoinedStr):
    yield ''.join(part.value if isinstance(part, ast.Constant) else 'X' for part in node.values)
    for part in node.values:
      if isinstance(part, ast.FormattedValue):
        yield from texts(part.value)
  elif isinstance(node, ast.Constant):
    yield node.value if isinstance(node.value, str) else ''
  else:
    for child in ast.iter_child_nodes(node):
      yield from texts(child)


def prose(text):
  """Markdown without code blocks, and without HTML comments and addresses of links."""
  text = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
  return re.sub(r'\]\([^)]*\)', ']', text)


def sentences(text):
  """Sentences, headings, items of lists and cells of tables; code in them is no English."""
  text = re.sub(r'`[^`\n]*`', 'X', text)
  text = re.sub(r'^\s*([-*#>]+|\d+\.|\w+:)\s', '. ', text, flags=re.MULTILINE)
  parts = re.split(r'[.!?:;]["\')*]*(?:\s|$)|\n\s*\n|\|', text)
  return [' '.join(part.split()) for part in parts if re.search(r'[A-Za-z]{2}', part)]


def check(found):
  bad = [sentence for sentence in found if BANNED.search(sentence)]
  assert len(bad) <= MOST * len(found), f'{len(bad)} of {len(found)} sentences:\n' + '\n'.join(bad)


@pytest.mark.parametrize('kind', [docstrings, messages], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize('group', CODE)
def test_code_speaks_plain_english(group, kind):
  trees = [ast.parse(path.read_text()) for path in CODE[group]]
  check([sentence for tree in trees for text in kind(tree) for sentence in sentences(text)])


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_pages_are_plain_english(path):
  check(sentences(prose(path.read_text())))


@pytest.mark.parametrize(('text', 'number'), [
    ('Runs a check. Records an error.\n\nArgs:\n  fields: Names of the fields.', 0),
    ('What is kept of a run, of which no word is lost. Only `x if y else z` is code.', 1),
    ('| of whose kind | it is as it is | plain |', 2)])
def test_banned_patterns_are_found(text, number):
  assert sum(bool(BANNED.search(sentence)) for sentence in sentences(text)) == number
