"""Where weights come from: a path, or a repository of the Hugging Face hub."""

import os
import pathlib
import re
from typing import Any

from dfkd_jax.models.pretrained import tfjs_files
from dfkd_jax.models.pretrained.errors import RefusedError
from dfkd_jax.models.pretrained.reading import IN_FOLDERS, split_entry

_HUB = re.compile(r'hf:(?P<repo>[^/@#]+/[^/@#]+)(?:@(?P<revision>[^/#]+))?(?:/(?P<file>[^#]+))?(?:#(?P<entry>.+))?')
_MODEL = 'model.json'  # Of TensorFlow.js, which names further files.
_ENDINGS = ('.safetensors', '.bin', '.pth', '.pt', '.ckpt', '.tar', '.h5', '.keras', '.npz')


def resolve(source: str | os.PathLike[str]) -> pathlib.Path:
  """The file or folder on this machine that a source names, for `read` and `load`.

  Args:
    source: A path, of a folder too, with '#ENTRY' to choose within a checkpoint (see `read`); or
      'hf:OWNER/REPO[@REVISION][/FILE][#ENTRY]', which is fetched once and kept in the hub's cache, a model.json with
      the files that it names. Without FILE it is model.safetensors, else pytorch_model.bin, else the only file of
      weights, else model.json.

  Raises:
    ValueError: There is no such file, or it cannot be fetched; in one line.
  """
  source = os.fspath(source)
  if source.startswith('hf:'):
    return _from_hub(source)
  if '://' in source:
    raise ValueError(f'{source!r} is an address: download the file, and name its path.')
  path, entry = split_entry(pathlib.Path(source).expanduser())
  if not path.exists():
    raise ValueError(f'{source!r}: there is no such file or folder.')
  return _with_entry(path, entry)


def _with_entry(path: pathlib.Path, entry: str | None) -> pathlib.Path:
  return path.with_name(f'{path.name}#{entry}') if entry else path


def _from_hub(source: str) -> pathlib.Path:
  match = _HUB.fullmatch(source)
  if not match:
    raise ValueError(f'{source!r} must be hf:OWNER/REPO[@REVISION][/FILE].')
  try:
    import huggingface_hub as hub  # An extra, which no other source needs.
  except ImportError:
    raise ValueError(f"{source!r} needs huggingface_hub: pip install 'dfkd_jax[hf]'.") from None
  repo, revision, name = match['repo'], match['revision'], match['file']
  try:
    path = hub.hf_hub_download(repo, name, revision=revision) if name else _best(hub, repo, revision, source)
    if path.endswith('.json'):
      _fetch_shards(hub, repo, revision, pathlib.Path(path), name or _MODEL)
  except (_NoWeightsError, RefusedError) as error:
    raise ValueError(str(error)) from None
  except Exception as error:  # Of the hub's own kinds, of its HTTP library, or of the disk.
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise ValueError(f'{source!r} cannot be fetched: {reason[:300]}') from error
  return _with_entry(pathlib.Path(path), match['entry'])


class _NoWeightsError(Exception):
  """The hub answered, and has no file that could be meant."""


def _best(hub: Any, repo: str, revision: str | None, source: str) -> str:
  """Of a repository's files, that of the weights, fetched; without a connection, the one that was fetched before."""
  try:
    names = hub.list_repo_files(repo, revision=revision)
  except Exception:
    if path := _kept(hub, repo, revision):
      return path
    raise
  return hub.hf_hub_download(repo, _chosen(names, source), revision=revision)


def _fetch_shards(hub: Any, repo: str, revision: str | None, path: pathlib.Path, name: str) -> None:
  """What a model.json names, beside it."""
  try:
    shards = tfjs_files.shards(path.read_bytes())
  except RefusedError as error:
    raise RefusedError(f'{name!r} of {repo!r} {error}.') from None
  for shard in shards:
    hub.hf_hub_download(repo, (pathlib.PurePosixPath(name).parent / shard).as_posix(), revision=revision)


def _chosen(names: list[str], source: str) -> str:
  for name in IN_FOLDERS:
    if name in names:
      return name
  found = sorted(name for name in names if name.endswith(_ENDINGS))
  if not found and _MODEL in names:
    return _MODEL
  if len(found) != 1:
    raise _NoWeightsError(f'{source!r} has {len(found) or "no"} files of weights{": " if found else ""}'
                          f'{", ".join(found[:5])}; name one as hf:OWNER/REPO/FILE.')
  return found[0]


def _kept(hub: Any, repo: str, revision: str | None) -> str | None:
  for name in IN_FOLDERS:
    path = hub.try_to_load_from_cache(repo, name, revision=revision)
    if isinstance(path, str):
      return path
  return None
