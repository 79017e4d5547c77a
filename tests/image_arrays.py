"""Files of images."""


def idx(path, array):
  """Writes an IDX file of unsigned bytes."""
  sizes = b''.join(size.to_bytes(4, 'big') for size in array.shape)
  path.write_bytes(b'\0\0\x08' + bytes([array.ndim]) + sizes + array.tobytes())
