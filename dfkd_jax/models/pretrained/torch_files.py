"""What `torch.save` wrote, read without PyTorch and without running anything that the file asks for.

Both formats are pickles beside raw numbers: a zip archive (since PyTorch 1.6),
and before that five pickles and the numbers in one stream. A pickle may name
any function of any module to be called. Here it gets a handful of names that
take notes of where a tensor lies; all other names are refused.
"""

import functools
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dfkd_jax.models.pretrained import archives
from dfkd_jax.models.pretrained.errors import RefusedError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    'Float': np.float32, 'Double': np.float64, 'Half': np.float16, 'BFloat16': ml_dtypes.bfloat16,
    'Long': np.int64, 'Int': np.int32, 'Short': np.int16, 'Char': np.int8, 'Byte': np.uint8,
    'Bool': np.bool_, 'Untyped': np.uint8}


class _Storage(NamedTuple):
  """A run of raw numbers of the file, as the pickle announces it."""

  key: str
  kind: str  # Of `_DTYPES`.
  size: int  # In elements.

  def num_bytes(self) -> int:
    return self.size * np.dtype(_DTYPES[self.kind]).itemsize


class _Tensor(NamedTuple):
  """A view of a storage; in elements, not bytes."""

  storage: _Storage
  kind: str
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Builder(NamedTuple):
  """What a pickle calls to make a tensor, or to make a parameter of one."""

  name: str

  def __call__(self, base: Any, *rest: Any) -> _Tensor:
    if 'parameter' in self.name and isinstance(base, _Tensor):
      return base
    if 'parameter' in self.name or not isinstance(base, _Storage):
      raise RefusedError(f'calls {self.name} with a {type(base).__name__}')
    offset, shape, strides = rest[:3]
    kind = rest[5] if self.name == '_rebuild_tensor_v3' else base.kind
    return _Tensor(base, kind, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


# A hostile pickle can also set attributes and states. None of these objects has any to set: so no
# dtypes, whose state can be set, but their names, and no functions, which have a dict.
_KNOWN = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('builtins', 'set'): set,
    ('__builtin__', 'set'): set,
    ('torch', 'Size'): tuple,
    **{('torch._utils', name): _Builder(name) for name in (
        '_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3', '_rebuild_parameter',
        '_rebuild_parameter_with_state')},
    **{(module, f'{kind}Storage'): kind for kind in _DTYPES for module in ('torch', 'torch.storage')},
    **{('torch', np.dtype(dtype).name): kind for kind, dtype in _DTYPES.items() if kind != 'Untyped'},
}


class _Stream(io.BytesIO):
  """Bytes of a file that must not end within what is read."""

  def read(self, size: int = -1) -> bytes:
    data = super().read(size)
    if len(data) < size:
      raise EOFError('it ends too early')
    return data

  def readline(self, size: int = -1) -> bytes:
    line = super().readline(size)
    if not line.endswith(b'\n'):
      raise EOFError('it ends within a name')
    return line


class _Unpickler(pickle._Unpickler):
  """Gives notes in the place of tensors; in Python, as the one in C trusts announced sizes."""

  def __init__(self, stream: _Stream):
    super().__init__(stream, encoding='utf-8')
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _KNOWN:
      raise RefusedError(f'names {module}.{name}, which no set of weights needs; nothing of it was run')
    return _KNOWN[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    record, kind, key, _, size, *view = pid
    if record != 'storage' or kind not in _DTYPES or any(part is not None for part in view):
      raise RefusedError(f'holds a record {record!r} of {kind!r}, which is not supported')
    return self.storages.setdefault(str(key), _Storage(str(key), kind, int(size)))


def read_zip(data: bytes) -> Any:
  """What was saved, with read-only NumPy arrays in place of the tensors within its dicts.

  Args:
    data: All bytes of the file.

  Raises:
    RefusedError: If the pickle names what it must not, or is not a PyTorch file: those have no compressed members.
    Exception: Of any kind, if the file is damaged.
  """
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    archives.check_stored(archive, len(data))
    pickles = [name for name in archive.namelist() if name.split('/')[1:] == ['data.pkl']]
    if len(pickles) != 1:
      raise RefusedError(f'is a zip archive with {len(pickles)} entries <name>/data.pkl instead of 1')
    folder = pickles[0].removesuffix('data.pkl')
    if f'{folder}byteorder' in archive.namelist() and archive.read(f'{folder}byteorder') != b'little':
      raise RefusedError('is big-endian, which is not supported')
    tree = _Unpickler(_Stream(archive.read(pickles[0]))).load()
    return _resolve(tree, functools.cache(lambda key: archive.read(f'{folder}data/{key}')), {})


def read_legacy(data: bytes) -> Any:
  """As `read_zip`, of the format before PyTorch 1.6."""
  stream = _Stream(data)
  if _Unpickler(stream).load() != _LEGACY_MAGIC:
    raise RefusedError('is a pickle, but not one of PyTorch')
  _Unpickler(stream).load()  # The version of the protocol, always 1001.
  if not _Unpickler(stream).load()['little_endian']:
    raise RefusedError('is big-endian, which is not supported')
  unpickler = _Unpickler(stream)
  tree, keys = unpickler.load(), _Unpickler(stream).load()
  buffers = {}
  for key in keys:
    stream.seek(8, io.SEEK_CUR)  # The number of elements, which the pickle said already.
    buffers[key] = stream.read(unpickler.storages[key].num_bytes())
  return _resolve(tree, buffers.__getitem__, {})


def _resolve(tree: Any, fetch: Callable[[str], bytes], seen: dict[int, Any]) -> Any:
  """The tree with arrays for tensors; lists and tuples stay as they are, for weights lie in dicts."""
  if isinstance(tree, _Tensor):
    return _view(tree, fetch(tree.storage.key))
  if not isinstance(tree, dict):
    return tree
  if id(tree) not in seen:  # Else shared branches multiply.
    seen[id(tree)] = {key: _resolve(value, fetch, seen) for key, value in tree.items()}
  return seen[id(tree)]


def _view(tensor: _Tensor, buffer: bytes) -> np.ndarray:
  """A tensor as a read-only view, which never reaches beyond its storage."""
  num_bytes = tensor.storage.num_bytes()
  if not 0 <= num_bytes <= len(buffer):
    raise ValueError(f'storage {tensor.storage.key} has {len(buffer)} bytes and should have {num_bytes}')
  dtype = np.dtype(_DTYPES[tensor.kind])
  numbers = np.frombuffer(buffer, dtype, count=num_bytes // dtype.itemsize)
  last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
  if 0 in tensor.shape:
    return np.empty(tensor.shape, dtype)
  if min(tensor.shape + tensor.strides + (tensor.offset,)) < 0 or last >= numbers.size:
    raise ValueError('a tensor reaches beyond its storage')
  if math.prod(tensor.shape) > numbers.size:  # It costs nothing here, and all memory where it is copied.
    raise RefusedError(f'repeats the {numbers.size} numbers of a storage as a tensor {tensor.shape}, '
                       'as no network has it')
  strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
  return np.lib.stride_tricks.as_strided(numbers[tensor.offset:], tensor.shape, strides, writeable=False)
