"""Writes data sets that TFDS reads, without TensorFlow.

  python -m dfkd_jax.prepare fashion_mnist --source DIRECTORY_OF_IDX_FILES
  python -m dfkd_jax.prepare cifar10 --source cifar-10-binary.tar.gz
  python -m dfkd_jax.prepare cifar100 --source cifar-100-binary.tar.gz
  python -m dfkd_jax.prepare my_images --source arrays.npz

TFDS itself can read array_record files without TensorFlow, but not write them.
What is written here plain `tfds.data_source(name, data_dir=...)` reads. Unlike
with TFDS' own writer, records keep the order of the source.
"""

from dfkd_jax.prepare.readers import read, read_idx
from dfkd_jax.prepare.writer import Split, write

__all__ = ['Split', 'read', 'read_idx', 'write']
