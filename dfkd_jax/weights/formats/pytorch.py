"""Files of `torch.save`, read without PyTorch and without running anything that a file asks for.

Both formats are pickles beside raw numbers. Since PyTorch 1.6 they lie in a zip archive. Before,
five pickles and the numbers followed each other in one stream. A pickle may name any function of
any module, to be called. This reader knows a short list of names, and refuses all others.
"""

import functools
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dfkd_jax.messages import RefusedError, safe_name

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {name: np.dtype(dtype) for name, dtype in {
    'Float': np.float32, 'Double': np.float64, 'Half': np.float16, 'BFloat16': ml_dtypes.bfloat16,
    'Long': np.int64, 'Int': np.int32, 'Short': np.int16, 'Char': np.int8, 'Byte': np.uint8,
    'Bool': np.bool_}.items()}


def _rebuild_tensor(storage: tuple[np.dtype, Any], offset: int, shape: Sequence[int],
                    strides: Sequence[int], *_: Any) -> np.ndarray:
  """Makes a read-only view of a buffer. NumPy raises an error if it reaches beyond the end."""
  dtype, buffer = storage
  strides = [stride * dtype.itemsize for stride in strides]
  array = np.ndarray(shape, dtype, buffer, offset * dtype.itemsize, strides)
  if array.nbytes > len(buffer):  # A copy of it could fill the memory.
    raise RefusedError(f'repeats the {len(buffer) // dtype.itemsize} numbers of a storage in a '
                       f'tensor of {array.size}')
  array.flags.writeable = False
  return array


def _rebuild_parameter(array: np.ndarray, *_: Any) -> np.ndarray:
  return array


# All that a pickle may name. Dtypes are text, which cannot be called.
_ALLOWED = {
    ('collections', 'OrderedDict'): OrderedDict, ('torch', 'Size'): tuple,
    ('builtins', 'set'): set, ('__builtin__', 'set'): set,
    **{('torch._utils', f'_rebuild_tensor{end}'): _rebuild_tensor for end in ('', '_v2')},
    **{('torch._utils', f'_rebuild_parameter{end}'): _rebuild_parameter
       for end in ('', '_with_state')},
    **{('torch', f'{kind}Storage'): kind for kind in _DTYPES},
    **{('torch', dtype.name): kind for kind, dtype in _DTYPES.items()}}


class _Unpickler(pickle._Unpickler):
  """Unpickles arrays. Pickle's C version would allocate any size that is announced."""

  def __init__(self, stream: BinaryIO, get_buffer: Callable[[str, int], Any] | None = None):
    super().__init__(stream, encoding='utf-8')
    self.get_buffer = get_buffer  # By key and number of bytes.

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _ALLOWED:
      raise RefusedError(f'names {safe_name(module)}.{safe_name(name)}, which no set of weights '
                         'needs; nothing of it was run')
    return _ALLOWED[module, name]

  def persistent_load(self, pid: Any) -> tuple[np.dtype, Any]:
    _, kind, key, _, size, *view = pid
    if any(view):
      raise RefusedError('holds a view of a storage, as PyTorch wrote before 0.2')
    num_bytes = size * _DTYPES[kind].itemsize
    if len(buffer := self.get_buffer(key, num_bytes)) != num_bytes:
      raise ValueError(f'a storage has {len(buffer)} bytes instead of {num_bytes}')
    return _DTYPES[kind], buffer

  def ignore_state(self) -> None:
    """Sets no attributes. State dicts have one, with versions of modules."""
    self.stack.pop()


_Unpickler.dispatch = _Unpickler.dispatch | {b'b'[0]: _Unpickler.ignore_state}


def read_zip(archive: zipfile.ZipFile) -> Any:
  """Reads the saved object of a checked archive, with read-only arrays in place of tensors."""
  pickles = [name for name in archive.namelist() if name.split('/')[1:] == ['data.pkl']]
  if len(pickles) != 1:
    raise RefusedError(f'is a zip archive with {len(pickles)} entries <name>/data.pkl instead of 1')
  folder = pickles[0].removesuffix('data.pkl')
  if f'{folder}byteorder' in archive.namelist() and archive.read(f'{folder}byteorder') != b'little':
    raise RefusedError('is big-endian, which is not supported')
  get_buffer = functools.cache(lambda key, num_bytes: archive.read(f'{folder}data/{key}'))
  return _Unpickler(io.BytesIO(archive.read(pickles[0])), get_buffer).load()


def read_legacy(data: bytes) -> Any:
  """Reads the format before PyTorch 1.6, as `read_zip`. Buffers are filled after the pickles."""
  stream, buffers = io.BytesIO(data), {}
  if _Unpickler(stream).load() != _LEGACY_MAGIC:
    raise RefusedError('is a pickle, but not one of PyTorch')
  _Unpickler(stream).load()  # The version of the protocol.
  if not _Unpickler(stream).load()['little_endian']:
    raise RefusedError('is big-endian, which is not supported')

  def get_buffer(key, num_bytes):
    return buffers.setdefault(key, np.empty(num_bytes, np.uint8))

  tree, keys = _Unpickler(stream, get_buffer).load(), _Unpickler(stream).load()
  for key in keys:
    stream.seek(8, io.SEEK_CUR)  # The number of elements, which the pickle has too.
    if stream.readinto(buffers[key]) != len(buffers[key]):
      raise ValueError('the numbers of a tensor are missing')
  return tree
