"""Documents all fields: python -m dfkd_jax.config.docs > docs/configuration.md."""

from dfkd_jax.config.field import NO_DEFAULT, Field
from dfkd_jax.config.fields import BY_NAME, METHOD_FIELDS, RUN_FIELDS

_HEAD = """# Configuration

Any field is a flag of the command line: `--config.distill.rounds=100`, `--config.control`,
`--config.dataset.name=None`. A config file starts from `base()` in
[fields.py](../dfkd_jax/config/fields.py), which has these defaults. Fields marked with * may change
when a run resumes.

`python -m dfkd_jax.config.docs` writes this page.
"""
_METHODS = """
## Numbers of methods

A config has the numbers of its own method only. None is the method's default. Other numbers are
arguments of the functions in [methods](../dfkd_jax/synth/methods), which document them.
"""


def as_text() -> str:
  """Formats all fields for --help."""
  return '\n'.join(
      f'  --config.{field.name}{_default(field, "=")}\n      {field.doc}; {field.describe()}'
      for field in BY_NAME.values())


def as_markdown() -> str:
  """Formats all fields as a page of the documentation."""
  return f'{_HEAD}\n{_table(RUN_FIELDS)}{_METHODS}\n{_table(METHOD_FIELDS)}'


def _table(fields: tuple[Field, ...]) -> str:
  rows = [f'| `{field.name}`{"*" * ("free" in field.flags)} | {_default(field, "`", "`")} | '
          f'{field.describe()} | {field.doc} |' for field in fields]
  return '\n'.join(['| field | default | allowed | meaning |', '|---|---|---|---|', *rows, ''])


def _default(field: Field, before: str, after: str = '') -> str:
  return '' if field.default is NO_DEFAULT else f'{before}{field.default}{after}'


if __name__ == '__main__':
  print(as_markdown(), end='')
