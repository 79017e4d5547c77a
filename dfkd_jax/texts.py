"""What a user or a file calls something, as a message may show it."""


def printable(text: str) -> str:
  """One line that does nothing to a terminal: characters that would steer it are written out."""
  return ''.join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in ' '.join(text.split()))


def cut(text: str, most: int) -> str:
  """The text, or its beginning and end."""
  return text if len(text) <= most else f'{text[:most // 2]} ... {text[-most // 2:]}'


def shortened(value: object, most: int = 100) -> str:
  """The value as Python writes it, cut."""
  return cut(repr(value), most)
