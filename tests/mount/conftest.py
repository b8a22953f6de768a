"""Stores for these tests: as on the floors below."""

from __future__ import annotations

from tests.local.conftest import empty_store, room, root, small

__all__ = ["empty_store", "room", "root", "small"]
