"""Which object store a URL names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from cidfs.errors import UsageError
from cidfs.remote.directory import Directory
from cidfs.remote.objects import ObjectStore


def objects_at(url: str) -> ObjectStore:
    """Return the object store of a URL, without asking whether it is there; raise UsageError."""
    try:
        parts = urlsplit(url)
    except ValueError as e:
        raise UsageError(f"{url}: not a URL: {e}") from None
    if parts.scheme != "file":
        raise UsageError(f"{url}: this version reads binary caches from a folder only: file:///folder")
    if parts.query or parts.fragment:
        raise UsageError(f"{url}: leave out what stands behind ? or #, or write these as %3F and %23")
    folder = unquote(parts.path, errors="surrogateescape")
    if parts.netloc not in ("", "localhost") or not folder.startswith("/") or "\0" in folder:
        raise UsageError(f"{url}: needs the absolute path of a folder: file:///folder")
    return Directory(Path(folder))
