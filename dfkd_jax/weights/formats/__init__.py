"""One file a format of weights."""
