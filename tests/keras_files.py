"""Files in the format of Keras."""

import io

import h5py


def h5(arrays, change=lambda file: None):
  """A file with these arrays, after a call of `change`."""
  stream = io.BytesIO()
  with h5py.File(stream, 'w') as file:
    for name, array in arrays.items():
      file.create_dataset(name, data=array)
    change(file)
  return stream.getvalue()
