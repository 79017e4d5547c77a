"""Where weights come from: a path, or a repository of the Hugging Face hub."""

import glob
import os
import pathlib
import re
from typing import Any

from dfkd_jax import paths
from dfkd_jax.messages import RefusedError, one_line, safe_names
from dfkd_jax.weights.formats import tfjs
from dfkd_jax.weights.reading import HUB_FILES, split_entry

_SOURCE = re.compile(r'hf:([^/@#]+/[^/@#]+)(?:@([^/#]+))?(?:/([^#]+))?(?:#(.+))?')
_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt', '.ckpt', '.tar', '.h5', '.keras', '.npz')
_SHARD = re.compile(r'-shard\d+of\d+\.bin$')  # Of TensorFlow.js. Its model.json names them.


def resolve(source: str | os.PathLike[str]) -> pathlib.Path:
  """Finds the file or folder that a source names, for `read` and `load`. Downloads it if needed.

  A source is a path, with '#ENTRY' for an entry of a checkpoint (see `read`). Or it is
  'hf:OWNER/REPO[@REVISION][/FILE][#ENTRY]', kept in the hub's cache. Without FILE it is
  model.safetensors, or pytorch_model.bin, or the only file of weights. A model.json of
  TensorFlow.js comes with its shards. Raises ValueError if there is no such file, or it cannot be
  fetched.
  """
  source = os.fspath(source)
  if source.startswith('hf:'):
    path, entry = _fetch(source)
  elif '://' in source:
    raise ValueError(f'{source!r}, an address: download the file, and name its path.')
  else:
    path, entry = split_entry(paths.expand_path(source, 'source'))
    if not path.exists():
      raise ValueError(f'{source!r}: there is no such file or folder.')
  return path.with_name(f'{path.name}#{entry}') if entry else path


def check_hub_source(source: str) -> None:
  """Raises ValueError if a source in the hub is misspelt. Needs no connection."""
  if not _SOURCE.fullmatch(source):
    raise ValueError(f'{source!r}, must be hf:OWNER/REPO[@REVISION][/FILE].')


def _fetch(source: str) -> tuple[pathlib.Path, str | None]:
  """Downloads a file, unless it is in the cache. Returns its path and the entry."""
  check_hub_source(source)
  repo, revision, file, entry = _SOURCE.fullmatch(source).groups()
  try:
    import huggingface_hub as hub  # An extra: only these sources need it.
  except ImportError:
    raise ValueError(f"{source!r} needs huggingface_hub: pip install 'dfkd_jax[hf]'.") from None

  def download(names):
    patterns = list(map(glob.escape, names))
    folder = pathlib.Path(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    if missing := [name for name in names if not (folder / name).is_file()]:
      raise RefusedError(f'has no file {missing[0]!r}')
    return folder

  try:
    file = file or _choose_file(hub, repo, revision)
    path = download([file]) / file
    if path.suffix == '.json':
      folder = pathlib.PurePosixPath(file).parent
      download([(folder / name).as_posix() for name in tfjs.list_shards(path.read_bytes())])
    return path, entry
  except RefusedError as error:
    raise ValueError(f'{source!r} {one_line(error)}.') from None
  except Exception as error:  # Of the hub, its HTTP library, or the disk.
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    raise ValueError(f'{source!r} cannot be fetched: {one_line(lines[0])}') from error


def _choose_file(hub: Any, repo: str, revision: str | None) -> str:
  """Chooses the file of weights of a repository, or of its part in the cache if offline."""
  try:
    names = hub.list_repo_files(repo, revision=revision)
  except Exception:
    names = [name for name in (*HUB_FILES, 'model.json')
             if isinstance(hub.try_to_load_from_cache(repo, name, revision=revision), str)]
    if not names:
      raise
  if usual := [name for name in HUB_FILES if name in names]:
    return usual[0]
  names = sorted(name for name in names if pathlib.PurePosixPath(name).name == 'model.json'
                 or (name.endswith(_SUFFIXES) and not _SHARD.search(name)))
  if len(names) != 1:
    listed = f': {", ".join(safe_names(names))}' if names else ''
    raise RefusedError(f'has {len(names) or "no"} files of weights{listed}; name one as '
                       'hf:OWNER/REPO/FILE')
  return names[0]
