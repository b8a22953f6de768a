"""cidfs: a content-addressed, read-only Nix store over FUSE."""

__version__ = "0.1.0"
