"""A plain Nix binary cache as a source: what it says of store paths, and their NARs.

Checks form and what a narinfo says of its own NAR: sizes, hash of the compressed file, content address. Which
signatures count, and whether the NAR hash is right, is for those who use it. NARs are streamed in bounded
memory, on worker threads; the rest is asked for from trio.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Final

from cidfs.errors import FormatError, HashMismatch, PathAbsent, SourceError
from cidfs.formats import narinfo
from cidfs.formats.compression import PIECE, Read, unpacked
from cidfs.formats.content_address import ContentProof
from cidfs.formats.digest import sha256_text
from cidfs.formats.narinfo import NarInfo
from cidfs.formats.store_path import HASH_PART_LENGTH, StorePath, check_hash_part
from cidfs.remote.objects import ObjectStore, Reader
from cidfs.remote.urls import objects_at

MAX_CACHE_INFO: Final = 64 << 10


class Upstream:
    """A binary cache that paths are read from. Made by open_upstream."""

    def __init__(self, objects: ObjectStore, store_dir: str, *, declared: bool) -> None:
        self._objects = objects
        self.store_dir = store_dir
        self.declared = declared
        """Whether it has a `nix-cache-info`."""

    @property
    def url(self) -> str:
        """Where it is, for messages."""
        return self._objects.url

    async def info(self, path: StorePath) -> NarInfo | None:
        """Return what it says of a path, None when it has none of this hash part.

        Raise FormatError for a narinfo that is none or is of another hash part, PathAbsent for one of another
        name, SourceError when it cannot be read.
        """
        info = await self.info_of(path.hash_part)
        if info is not None and info.path != path:
            raise PathAbsent(f"{path}: not in {self.url}; what is there is {info.path}")
        return info

    async def info_of(self, hash_part: str) -> NarInfo | None:
        """Return what it says of the path with a hash part, whatever its name is; as info."""
        key = hash_part + narinfo.SUFFIX
        data = await self._objects.get(key, narinfo.MAX_SIZE)
        if data is None:
            return None
        try:
            info = narinfo.parse(data, self.store_dir)
            if info.path.hash_part != hash_part:
                raise FormatError(f"it is about {info.path}")
        except FormatError as e:
            raise FormatError(f"{self.url}/{key}: {e}") from None
        return info

    async def hash_parts(self) -> list[str]:
        """Return the hash parts of all paths that it has, sorted; raise SourceError when it has no list."""
        found = []
        for name in await self._objects.names():
            if name.endswith(narinfo.SUFFIX) and len(name) == HASH_PART_LENGTH + len(narinfo.SUFFIX):
                with contextlib.suppress(FormatError):  # as Nix: what cannot be a narinfo is none
                    found.append(check_hash_part(name.removesuffix(narinfo.SUFFIX)))
        if not found and not self.declared:
            raise SourceError(
                f"{self.url}: no binary cache: it has neither {narinfo.CACHE_INFO} nor narinfos"
            )
        return sorted(found)

    @contextlib.contextmanager
    def nar(self, info: NarInfo, proof: ContentProof | None = None) -> Iterator[Read]:
        """Open a path's NAR; the read that is given returns it unpacked. Blocking: for worker threads.

        Of more bytes than the narinfo says no more than one is unpacked. At its end, what the narinfo says of
        the compressed file has been checked, and the proof, if there is one; the NAR hash has not. Raise
        SourceError, FormatError, HashMismatch.
        """
        with self._objects.open(info.url) as reader:
            if info.file_size is not None and reader.size != info.file_size:
                raise HashMismatch(
                    f"{self.nar_label(info)}: it has {reader.size} bytes where its narinfo says"
                    f" {info.file_size}; nothing of it is published"
                )
            yield _Nar(self.nar_label(info), reader, info, proof).read

    def nar_label(self, info: NarInfo) -> str:
        """Return what to call a path's NAR in messages: the path, and where its NAR is."""
        return f"{info.path} ({self.url}/{info.url})"


class _Nar:
    """A NAR that is being unpacked and checked."""

    def __init__(self, label: str, reader: Reader, info: NarInfo, proof: ContentProof | None) -> None:
        self._label = label
        self._reader = reader
        self._info = info
        self._proof = proof
        self._file_hash = hashlib.sha256()
        try:
            self._unpack = unpacked(info.compression, self._packed)
        except FormatError as e:
            raise FormatError(f"{label}: {e}") from None
        self._given = 0

    def read(self, count: int) -> bytes:
        # one byte more than there should be, to see that there are more
        piece = self._unpack(min(count, self._info.nar_size - self._given + 1))
        self._given += len(piece)
        if self._given > self._info.nar_size:
            raise self._bad(f"unpacks to more than the {self._info.nar_size} bytes that its narinfo says")
        if self._proof is not None:
            self._proof.update(piece)
        if not piece:
            self._check_end()
        return piece

    def _packed(self, count: int) -> bytes:
        piece = self._reader.read(max(count, PIECE) if self._info.compression != "none" else count)
        if self._info.file_hash is not None:
            self._file_hash.update(piece)
        return piece

    def _check_end(self) -> None:
        expected, found = self._info.file_hash, self._file_hash.digest()
        if expected is not None and found != expected:
            raise self._bad(f"has {sha256_text(found)} where its narinfo says {sha256_text(expected)}")
        if self._proof is not None and not self._proof.holds() and self._given == self._info.nar_size:
            raise self._bad(f"does not have the content address {self._info.ca}")

    def _bad(self, what: str) -> HashMismatch:
        return HashMismatch(f"{self._label}: it {what}; nothing of it is published")


async def open_upstream(url: str, store_dir: str) -> Upstream:
    """Return the binary cache at a URL.

    As in Nix, it need not have a `nix-cache-info`; one that names another store directory is refused. Raise
    UsageError, SourceError, FormatError.
    """
    objects = objects_at(url)
    data = await objects.get(narinfo.CACHE_INFO, MAX_CACHE_INFO)
    if data is None:
        await objects.names()  # it is there, at least
        return Upstream(objects, store_dir, declared=False)
    try:
        theirs = narinfo.cache_store_dir(data)
    except FormatError as e:
        raise FormatError(f"{objects.url}/{narinfo.CACHE_INFO}: {e}") from None
    if theirs and theirs != store_dir:
        raise SourceError(f"{objects.url}: a binary cache for the store directory {theirs}, not {store_dir}")
    return Upstream(objects, store_dir, declared=True)
