"""Nix's worker protocol without I/O: known bytes, client against server, hostile bytes."""
