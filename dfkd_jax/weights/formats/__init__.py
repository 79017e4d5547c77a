"""Readers of weights, one file a format.

All take the bytes of a file, or a folder, and return read-only arrays by name. They raise
RefusedError for content that is not supported, with its name. A damaged file may raise anything.
They run nothing that a file asks for, and unpack at most `archives.LARGEST` bytes.
"""
