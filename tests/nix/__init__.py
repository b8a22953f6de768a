"""The command line against a real Nix: what Nix made, cidfs must show again, byte for byte.

Owns everything that needs a Nix (`CIDFS_TEST_NIX`, see `tools/test`). Talks to cidfs only through its
command line and its mount, and imports nothing of it. Synchronous: each step is a subprocess.
"""
