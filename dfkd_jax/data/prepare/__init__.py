r"""Writes data sets in the array_record format of TFDS, without TensorFlow.

  python -m dfkd_jax.prepare fashion_mnist --source DIRECTORY_OF_IDX_FILES
  python -m dfkd_jax.prepare cifar10 --source cifar-10-binary.tar.gz
  python -m dfkd_jax.prepare my_images --source train_and_test.npz
  python -m dfkd_jax.prepare arrays --source images_and_labels.npz --name my_images --split test
  python -m dfkd_jax.prepare folder --source FOLDER_OF_CLASSES --name my_photos --split test
  python -m dfkd_jax.prepare folder --source val --name imagenet2012 --split validation \
      --labels val.txt --classes wnids.txt
  python -m dfkd_jax.prepare folder --source CamVid/test --masks CamVid/testannot --name camvid \
      --split test

`tfds.data_source(name, data_dir=...)` reads the result. Records keep the order of the source.
Photos are stored as the bytes of their files and may differ in size. Masks are stored as grey PNG.
More splits can be added to a data set later.
"""

from dfkd_jax.data.prepare.archives import read, read_arrays, read_idx
from dfkd_jax.data.prepare.files import Files, MaskFiles
from dfkd_jax.data.prepare.folders import read_folder, read_pairs
from dfkd_jax.data.prepare.writer import Split, write

__all__ = [
    'Files', 'MaskFiles', 'Split', 'read', 'read_arrays', 'read_folder', 'read_idx', 'read_pairs',
    'write']
