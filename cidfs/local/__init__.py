"""This machine's disk: state folder, packs, journal, LMDB index. Synchronous.

Safe from several processes at once.
"""
