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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dfkd_jax.messages import RefusedError, safe_name
from dfkd_jax.weights.formats import archives

_LARGEST_PICKLE = min(16 * 2**20, archives.LARGEST // 250)  # Bytes: of 100,000 tensors; its steps fill 220 times that.
_DIMENSIONS, _ARGUMENTS = 64, 9  # Of an array of NumPy; of a call that makes a tensor.
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
    if not isinstance(kind, str) or kind not in _DTYPES:
      raise RefusedError(f'makes a tensor of {safe_name(kind)}, which is not supported')
    return _Tensor(base, kind, _integer(offset), _integers(shape), _integers(strides))


def _integer(number: Any) -> int:
  if not isinstance(number, int) or number.bit_length() > 64:
    raise RefusedError(f'holds a tensor with {safe_name(number)} for one of its sizes')
  return number


def _integers(numbers: Any) -> tuple[int, ...]:
  if not isinstance(numbers, tuple | list) or len(numbers) > _DIMENSIONS:
    raise RefusedError(f'holds a tensor with {type(numbers).__name__} for its shape, or of more than {_DIMENSIONS} '
                       'dimensions')
  for number in numbers:
    _integer(number)
  return tuple(numbers)  # The same one, if it is a tuple, however often a file has it.


# A hostile pickle can also set attributes and states: they are dropped. And none of these objects has any to set: so
# no dtypes, whose state can be set, but their names, and no functions, which have a dict.
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
  """Bytes of a file that must not end within what is read, of which pickles are no more than some."""

  end = 0  # Of what may be read.

  def read(self, size: int = -1) -> bytes:
    data = super().read(size)
    if len(data) < size:
      raise EOFError('it ends too early')
    return self._within(data)

  def readline(self, size: int = -1) -> bytes:
    line = super().readline(size)
    if not line.endswith(b'\n'):
      raise EOFError('it ends within a name')
    return self._within(line)

  def _within(self, data: bytes) -> bytes:
    if self.tell() > self.end:
      raise RefusedError(f'holds a pickle of more than {_LARGEST_PICKLE} bytes')
    return data


class _Unpickler(pickle._Unpickler):
  """Gives notes in the place of tensors.

  In Python, where each step of a pickle can be looked at. Those that reserve what they announce, call in other ways
  than PyTorch's, or need what lies elsewhere are refused; and so are keys that hold others, for a tuple of twice the
  same, 60 times over, takes 2^60 steps to hash or to print.
  """

  def __init__(self, stream: _Stream):
    super().__init__(stream, encoding='utf-8')
    self.storages: dict[str, _Storage] = {}
    self.stream, self.begin, self.taken = stream, stream.tell(), 0
    stream.end = self.begin + _LARGEST_PICKLE

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _KNOWN:
      raise RefusedError(f'names {safe_name(module)}.{safe_name(name)}, which no set of weights needs; nothing of it was run')
    return _KNOWN[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or not all(isinstance(part, str) for part in pid[:3]):
      raise RefusedError('holds a record that is none of a storage')
    record, kind, key, _, size, *view = pid
    if record != 'storage' or kind not in _DTYPES or any(part is not None for part in view):
      raise RefusedError(f"holds a record '{safe_name(record)}' of '{safe_name(kind)}', which is not supported")
    return self.storages.setdefault(key, _Storage(key, kind, _integer(size)))

  def load_reduce(self) -> None:
    args = self.stack.pop()
    made = self.stack[-1]
    if type(args) is not tuple or len(args) > _ARGUMENTS:
      raise RefusedError('calls something with other arguments than a tensor has')
    if isinstance(made, type):
      self._check_contents(made, args)
    self.stack[-1] = made(*args)

  def load_build(self) -> None:
    self.stack.pop()  # The versions of modules, which a state dict has as an attribute: of no use here.

  def load_dict(self) -> None:
    _check_keys(self.stack[::2])
    super().load_dict()

  def load_setitem(self) -> None:
    _check_keys(self.stack[-2:-1])
    super().load_setitem()

  def load_setitems(self) -> None:
    _check_keys(self.stack[::2])
    super().load_setitems()

  def load_additems(self) -> None:
    _check_keys(self.stack)
    super().load_additems()

  def load_frozenset(self) -> None:
    _check_keys(self.stack)
    super().load_frozenset()

  def load_refused(self) -> None:
    raise RefusedError('is a pickle with a step that PyTorch does not write')

  def _check_contents(self, made: type, args: tuple[Any, ...]) -> None:
    """Of a container that is made of another: no more of them than the pickle has had bytes for."""
    if not args:
      return
    if len(args) > 1 or type(args[0]) not in (list, tuple):
      raise RefusedError(f'makes a {made.__name__} of something else than a list')
    self.taken += len(args[0])
    if self.taken > self.stream.tell() - self.begin:
      raise RefusedError(f'makes a {made.__name__} of the same list again and again')
    if made is OrderedDict and not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in args[0]):
      raise RefusedError('makes an OrderedDict of something else than pairs')
    if made is not tuple:
      _check_keys(pair[0] for pair in args[0]) if made is OrderedDict else _check_keys(args[0])


_OWN = {
    b'R': _Unpickler.load_reduce, b'b': _Unpickler.load_build, b'd': _Unpickler.load_dict,
    b's': _Unpickler.load_setitem, b'u': _Unpickler.load_setitems, b'\x90': _Unpickler.load_additems,
    b'\x91': _Unpickler.load_frozenset,
    # INST, OBJ, NEWOBJ, EXT1, EXT2, EXT4, NEWOBJ_EX, BYTEARRAY8, NEXT_BUFFER, READONLY_BUFFER.
    **dict.fromkeys((b'i', b'o', b'\x81', b'\x82', b'\x83', b'\x84', b'\x92', b'\x96', b'\x97', b'\x98'),
                    _Unpickler.load_refused)}
_Unpickler.dispatch = _Unpickler.dispatch | {step[0]: own for step, own in _OWN.items()}


def _check_keys(keys: Iterable[Any]) -> None:
  """Of a dict or a set: text, or integers whose hashes do not collide."""
  for key in keys:
    if not isinstance(key, str) and not (isinstance(key, int) and key.bit_length() < 61):
      raise RefusedError(f'holds {safe_name(key)} for a key, where text or a small integer is wanted')


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
  buffers, end = {}, stream.tell()
  for key in keys:
    begin = end + 8  # After the number of elements, which the pickle said already.
    end = begin + max(_storage(unpickler, key).num_bytes(), 0)
    buffers[key] = data[begin:end]
  return _resolve(tree, buffers.__getitem__, {})


def _storage(unpickler: _Unpickler, key: Any) -> _Storage:
  if not isinstance(key, str):
    raise RefusedError(f'holds {safe_name(key)} for the key of a storage')
  return unpickler.storages[key]


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
    raise ValueError(f'storage {safe_name(tensor.storage.key)} has {len(buffer)} bytes and should have {num_bytes}')
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
