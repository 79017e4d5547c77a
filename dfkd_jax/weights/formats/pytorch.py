"""Files of `torch.save`, read without PyTorch and without running anything that a file asks for.

Both formats are pickles beside raw numbers. Since PyTorch 1.6 they lie in a zip archive. Before,
five pickles and the numbers followed each other in one stream. A pickle may name any function of
any module, to be called. This reader knows a short list of names, for objects that only note where
a tensor lies. It refuses all other names.
"""

import functools
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence, Sized
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dfkd_jax.messages import RefusedError, safe_name
from dfkd_jax.weights.formats import archives

# Bytes of a pickle: enough for 100,000 tensors. Its objects may take 220 times as much memory.
_LARGEST_PICKLE = min(16 * 2**20, archives.LARGEST // 250)
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    'Float': np.float32, 'Double': np.float64, 'Half': np.float16, 'BFloat16': ml_dtypes.bfloat16,
    'Long': np.int64, 'Int': np.int32, 'Short': np.int16, 'Char': np.int8, 'Byte': np.uint8,
    'Bool': np.bool_, 'Untyped': np.uint8}


class _Storage(NamedTuple):
  """A range of raw numbers in the file."""

  key: str
  kind: str  # Key of `_DTYPES`.
  num_bytes: int


class _Tensor(NamedTuple):
  """A view of a storage, in elements."""

  storage: _Storage
  kind: str
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def _note_tensor(
    storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *rest: Any
) -> _Tensor:
  kinds = [kind for kind in rest[2:3] if isinstance(kind, str)]  # The dtype of _rebuild_tensor_v3.
  return _Tensor(storage, (*kinds, storage.kind)[0], offset, tuple(shape), tuple(strides))


def _note_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
  return tensor


# All that a pickle may name. Dtypes are text, which has no attributes to set.
_ALLOWED = {
    ('collections', 'OrderedDict'): OrderedDict, ('torch', 'Size'): tuple,
    ('builtins', 'set'): set, ('__builtin__', 'set'): set,
    **{('torch._utils', f'_rebuild_tensor{end}'): _note_tensor for end in ('', '_v2', '_v3')},
    **{('torch._utils', f'_rebuild_parameter{end}'): _note_parameter
       for end in ('', '_with_state')},
    **{(module, f'{kind}Storage'): kind
       for kind in _DTYPES for module in ('torch', 'torch.storage')},
    **{('torch', np.dtype(_DTYPES[kind]).name): kind for kind in _DTYPES if kind != 'Untyped'},
}
# INST, OBJ, NEWOBJ, EXT1, EXT2, EXT4, NEWOBJ_EX, BYTEARRAY8, NEXT_BUFFER, READONLY_BUFFER: other
# ways to call or import something, and one that allocates as much as it announces.
_REFUSED_STEPS = b'io\x81\x82\x83\x84\x92\x96\x97\x98'


class _Unpickler(pickle._Unpickler):
  """Unpickles notes of tensors. Pickle's C version would allocate any size that is announced."""

  def __init__(self, stream: io.BytesIO):
    super().__init__(stream, encoding='utf-8')
    self.storages: dict[str, _Storage] = {}
    self.stream, self.num_copied = stream, 0

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _ALLOWED:
      raise RefusedError(f'names {safe_name(module)}.{safe_name(name)}, which no set of weights '
                         'needs; nothing of it was run')
    return _ALLOWED[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    if not isinstance(pid, tuple) or len(pid) not in (5, 6):
      raise RefusedError('holds a record that does not describe a storage')
    record, kind, key, _, size, *view = pid
    if record != 'storage' or kind not in _DTYPES or any(part is not None for part in view):
      raise RefusedError(f"holds a record '{safe_name(record)}' of '{safe_name(kind)}', which is "
                         'not supported')
    num_bytes = size * np.dtype(_DTYPES[kind]).itemsize
    return self.storages.setdefault(key, _Storage(key, kind, num_bytes))

  def load_reduce(self) -> None:
    self.num_copied += sum(len(arg) for arg in self.stack[-1] if isinstance(arg, Sized))
    if self.num_copied > self.stream.tell():  # Copies of one list could fill the memory.
      raise RefusedError('copies the same list again and again')
    super().load_reduce()

  def load_build(self) -> None:
    self.stack.pop()  # Sets no attributes. State dicts have one, with versions of modules.

  def load_refused(self) -> None:
    raise RefusedError('is a pickle with a step that PyTorch does not write')


_Unpickler.dispatch = _Unpickler.dispatch | {
    b'R'[0]: _Unpickler.load_reduce, b'b'[0]: _Unpickler.load_build,
    **dict.fromkeys(_REFUSED_STEPS, _Unpickler.load_refused)}


def read_zip(data: bytes) -> Any:
  """Reads the saved object, with read-only arrays in place of the tensors within its dicts."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    archives.check_sizes(archive.infolist())
    names = archive.namelist()
    pickles = [name for name in names if name.split('/')[1:] == ['data.pkl']]
    if len(pickles) != 1:
      raise RefusedError(
          f'is a zip archive with {len(pickles)} entries <name>/data.pkl instead of 1')
    if (size := archive.getinfo(pickles[0]).file_size) > _LARGEST_PICKLE:
      raise RefusedError(f'holds a pickle of {size} bytes, but may have at most {_LARGEST_PICKLE}')
    folder = pickles[0].removesuffix('data.pkl')

    def unpack(name: str) -> bytes:
      return archives.unpack(archive, archive.getinfo(folder + name))

    if f'{folder}byteorder' in names and unpack('byteorder') != b'little':
      raise RefusedError('is big-endian, which is not supported')
    tree = _Unpickler(io.BytesIO(unpack('data.pkl'))).load()
    return _resolve(tree, functools.cache(lambda key: unpack(f'data/{key}')), {})


def read_legacy(data: bytes) -> Any:
  """Reads the format before PyTorch 1.6, as `read_zip`."""
  stream = io.BytesIO(data[:_LARGEST_PICKLE])
  if _Unpickler(stream).load() != _LEGACY_MAGIC:
    raise RefusedError('is a pickle, but not one of PyTorch')
  _Unpickler(stream).load()  # The version of the protocol, always 1001.
  if not _Unpickler(stream).load()['little_endian']:
    raise RefusedError('is big-endian, which is not supported')
  unpickler = _Unpickler(stream)
  tree, keys = unpickler.load(), _Unpickler(stream).load()
  buffers, end = {}, stream.tell()
  for key in keys:
    begin = end + 8  # After the number of elements, which the pickle has too.
    end = begin + max(unpickler.storages[key].num_bytes, 0)
    buffers[key] = data[begin:end]
  return _resolve(tree, buffers.__getitem__, {})


def _resolve(tree: Any, fetch: Callable[[str], bytes], done: dict[int, Any]) -> Any:
  """Replaces tensors by arrays. Leaves lists and tuples alone: weights lie in dicts."""
  if isinstance(tree, _Tensor):
    return _to_array(tree, fetch(tree.storage.key))
  if not isinstance(tree, dict):
    return tree
  if id(tree) not in done:  # Visits shared branches once.
    done[id(tree)] = {key: _resolve(value, fetch, done) for key, value in tree.items()}
  return done[id(tree)]


def _to_array(tensor: _Tensor, buffer: bytes) -> np.ndarray:
  """Makes a read-only view that never reaches beyond its storage."""
  dtype = np.dtype(_DTYPES[tensor.kind])
  numbers = np.frombuffer(buffer, dtype, count=tensor.storage.num_bytes // dtype.itemsize)
  if 0 in tensor.shape:
    return np.empty(tensor.shape, dtype)
  last = tensor.offset + sum(
      (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
  if min(tensor.shape + tensor.strides + (tensor.offset,)) < 0 or last >= numbers.size:
    raise ValueError('a tensor reaches beyond its storage')
  if math.prod(tensor.shape) > numbers.size:  # A copy of it would fill the memory.
    raise RefusedError(f'repeats the {numbers.size} numbers of a storage as a tensor '
                       f'{tensor.shape}, as no network has it')
  strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
  return np.lib.stride_tricks.as_strided(
      numbers[tensor.offset:], tensor.shape, strides, writeable=False)
