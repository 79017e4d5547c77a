"""Files of weights, one module a format. Readers return arrays by name, and run nothing in a file.

RefusedError says that content is not supported. A damaged file may raise anything.
"""
