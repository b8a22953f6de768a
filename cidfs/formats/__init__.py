"""Formats: bytes in, values out. No I/O, no trio, no LMDB.

Every decoder takes hostile input and raises FormatError.
"""
