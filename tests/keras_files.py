"""Files as Keras writes them."""

import io

import h5py


def h5(arrays, change=lambda file: None):
  """A file with these arrays, and what `change` does to it."""
  stream = io.BytesIO()
  with h5py.File(stream, 'w') as file:
    for name, array in arrays.items():
      file.create_dataset(name, data=array)
    change(file)
  return stream.getvalue()
