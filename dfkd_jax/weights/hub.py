"""Where weights come from: a path, or a repository of the Hugging Face hub."""

import functools
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from dfkd_jax import paths
from dfkd_jax.messages import RefusedError, first_line, safe_names
from dfkd_jax.weights.formats import tfjs
from dfkd_jax.weights.reading import IN_FOLDERS, split_entry

_HUB = re.compile(r'hf:(?P<repo>[^/@#]+/[^/@#]+)(?:@(?P<revision>[^/#]+))?(?:/(?P<file>[^#]+))?(?:#(?P<entry>.+))?')
_ENDINGS = ('.safetensors', '.bin', '.pth', '.pt', '.ckpt', '.tar', '.h5', '.keras', '.npz')


def resolve(source: str | os.PathLike[str]) -> pathlib.Path:
  """The file or folder on this machine that a source names, for `read` and `load`.

  Args:
    source: A path, of a folder too, with '#ENTRY' to choose within a checkpoint (see `read`); or
      'hf:OWNER/REPO[@REVISION][/FILE][#ENTRY]', which is fetched once and kept in the hub's cache. Without FILE it is
      model.safetensors, else pytorch_model.bin, else the only file of weights. A model.json of TensorFlow.js is fetched
      with the shards that it names.

  Raises:
    ValueError: There is no such file, or it cannot be fetched; in one line.
  """
  source = os.fspath(source)
  if source.startswith('hf:'):
    return _from_hub(source)
  if '://' in source:
    raise ValueError(f'{source!r}, an address: download the file, and name its path.')
  path, entry = split_entry(paths.expanded(source, 'source'))
  if not path.exists():
    raise ValueError(f'{source!r}: there is no such file or folder.')
  return _with_entry(path, entry)


def check_hub(source: str) -> None:
  """Raises ValueError unless a source is spelt as one of the hub; without asking the hub."""
  if not _HUB.fullmatch(source):
    raise ValueError(f'{source!r}, must be hf:OWNER/REPO[@REVISION][/FILE].')


def _with_entry(path: pathlib.Path, entry: str | None) -> pathlib.Path:
  return path.with_name(f'{path.name}#{entry}') if entry else path


def _from_hub(source: str) -> pathlib.Path:
  check_hub(source)
  match = _HUB.fullmatch(source)
  try:
    import huggingface_hub as hub  # An extra, which no other source needs.
  except ImportError:
    raise ValueError(f"{source!r} needs huggingface_hub: pip install 'dfkd_jax[hf]'.") from None
  fetch = functools.partial(_fetched, hub, match['repo'], match['revision'])
  try:
    path = fetch(match['file']) if match['file'] else _best(hub, match['repo'], match['revision'], source)
  except RefusedError as error:
    raise ValueError(f'{source!r} {first_line(error)}.') from None
  except _NoWeightsError as error:
    raise ValueError(str(error)) from None
  except Exception as error:  # Of the hub's own kinds, of its HTTP library, or of the disk.
    reason = next((each for each in str(error).splitlines() if each.strip()), type(error).__name__)
    raise ValueError(f'{source!r} cannot be fetched: {first_line(reason)}') from error
  return _with_entry(pathlib.Path(path), match['entry'])


class _NoWeightsError(Exception):
  """The hub answered, and has no file that could be meant."""


def _fetched(hub: Any, repo: str, revision: str | None, name: str) -> str:
  """Where a file lies; with the shards that it names beside it, if it is a model.json."""
  path = hub.hf_hub_download(repo, name, revision=revision)
  if name.endswith('.json'):
    for shard in tfjs.shards(pathlib.Path(path).read_bytes()):
      hub.hf_hub_download(repo, _beside(name, shard), revision=revision)
  return path


def _beside(name: str, shard: str) -> str:
  return (pathlib.PurePosixPath(name).parent / shard).as_posix()


def _best(hub: Any, repo: str, revision: str | None, source: str) -> str:
  """Of a repository's files, that of the weights, fetched; without a connection, the one that was fetched before."""
  try:
    names = hub.list_repo_files(repo, revision=revision)
  except Exception:
    if path := _kept(hub, repo, revision):
      return path
    raise
  shards = lambda name: _shards(hub.hf_hub_download(repo, name, revision=revision), name)
  return _fetched(hub, repo, revision, _chosen(names, shards, source))


def _chosen(names: list[str], shards: Callable[[str], list[str]], source: str) -> str:
  """The name of the weights; `shards` are those of a model.json, which end as files of PyTorch do."""
  for name in IN_FOLDERS:
    if name in names:
      return name
  found = {name for name in names if name.endswith(_ENDINGS)}
  for model in (name for name in names if pathlib.PurePosixPath(name).name == 'model.json'):
    if parts := shards(model):
      found = {*found, model}.difference(parts)
  found = sorted(found)
  if len(found) != 1:
    raise _NoWeightsError(f'{source!r} has {len(found) or "no"} files of weights{": " if found else ""}'
                          f'{", ".join(safe_names(found))}; name one as hf:OWNER/REPO/FILE.')
  return found[0]


def _shards(path: str, name: str) -> list[str]:
  """As the repository calls them; empty where a model.json describes anything else."""
  try:
    return [_beside(name, shard) for shard in tfjs.shards(pathlib.Path(path).read_bytes())]
  except RefusedError:
    return []


def _kept(hub: Any, repo: str, revision: str | None) -> str | None:
  """Of the files that `_best` would choose by their names, the one in the hub's cache, with all that belongs to it."""
  for name in (*IN_FOLDERS, 'model.json'):
    path = hub.try_to_load_from_cache(repo, name, revision=revision)
    parts = _shards(path, name) if isinstance(path, str) and name == 'model.json' else []
    whole = all(isinstance(hub.try_to_load_from_cache(repo, part, revision=revision), str) for part in parts)
    if isinstance(path, str) and whole and (parts or name != 'model.json'):
      return path
  return None
