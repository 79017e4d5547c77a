"""Files in the formats of PyTorch, written without it."""

import io
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {'float32': 'Float', 'float64': 'Double', 'float16': 'Half', 'bfloat16': 'BFloat16',
         'int64': 'Long', 'uint8': 'Byte', 'bool': 'Bool'}


class Name(NamedTuple):
  module: str
  name: str


class Call(NamedTuple):
  name: Name
  args: tuple[Any, ...]


class Storage(NamedTuple):
  key: str
  kind: str
  size: int


class Writer(pickle._Pickler):
  """Pickles PyTorch's names without importing them, and arbitrary calls."""

  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, Name):
      self.write(f'c{obj.module}\n{obj.name}\n'.encode())
    elif isinstance(obj, Call):
      self.save(obj.name)
      self.save(obj.args)
      self.write(b'R')
    else:
      super().save(obj, save_persistent_id)

  def persistent_id(self, obj):
    if isinstance(obj, Storage):
      return 'storage', Name('torch', f'{obj.kind}Storage'), obj.key, 'cuda:0', obj.size
    return None


def dumps(tree):
  stream = io.BytesIO()
  Writer(stream, protocol=2).dump(tree)
  return stream.getvalue()


class Saver:
  """Collects storages, and writes a tree of tensors in one of PyTorch's formats."""

  def __init__(self, byteorder='little'):
    self.buffers, self.byteorder = {}, byteorder

  def tensor(self, base, *, offset=0, shape=None, strides=None, size=None,
             rebuild='_rebuild_tensor_v2'):
    key = str(94582385617088 + len(self.buffers))
    self.buffers[key] = base.tobytes(), base.size
    storage = Storage(key, KINDS[base.dtype.name], base.size if size is None else size)
    shape = base.shape if shape is None else shape
    if strides is None:
      strides = tuple(s // base.itemsize for s in np.asarray(base, order='C').strides)
    hooks = Call(Name('collections', 'OrderedDict'), ())
    rest = () if rebuild == '_rebuild_tensor' else (False, hooks)
    return Call(Name('torch._utils', rebuild), (storage, offset, shape, strides, *rest))

  def zip(self, tree):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
      archive.writestr('archive/data.pkl', dumps(tree))
      archive.writestr('archive/byteorder', self.byteorder)
      for key, (data, _) in self.buffers.items():
        archive.writestr(f'archive/data/{key}', data)
      archive.writestr('archive/version', '3\n')
    return stream.getvalue()

  def legacy(self, tree):
    sizes = {'short': 2, 'int': 4, 'long': 4}
    system = {'protocol_version': 1001, 'little_endian': self.byteorder == 'little',
              'type_sizes': sizes}
    head = b''.join(map(dumps, (MAGIC, 1001, system, tree, list(self.buffers))))
    return head + b''.join(np.int64(n).tobytes() + data for data, n in self.buffers.values())


ARRAYS = {
    'conv.weight': np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5),
    'half': np.linspace(-3, 3, 7).astype(np.float16),
    'brain': np.linspace(-3, 3, 11).astype(ml_dtypes.bfloat16),
    'double': np.array(np.pi), 'num_batches_tracked': np.array(7),
    'mask': np.array([True, False, True])}


def saved(form, wrap=lambda tree: tree, arrays=None):
  saver = Saver()
  tree = {name: saver.tensor(array) for name, array in (arrays or ARRAYS).items()}
  return getattr(saver, form)(wrap(tree))
