"""A binary cache as a source: what is found in it, and what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cidfs.errors import FormatError, HashMismatch, PathAbsent, SourceError
from cidfs.formats.narinfo import NarInfo
from cidfs.remote.upstream import Upstream, open_upstream
from tests.remote.support import PACK, STORE, Cache, path_for

NAR = bytes(range(256)) * 2000
"""Upstreams unpack; what a NAR is, their users know."""


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty binary cache."""
    return Cache(tmp_path / "cache")


def read_all(upstream: Upstream, info: NarInfo, count: int = 1 << 20) -> bytes:
    out = bytearray()
    with upstream.nar(info) as read:
        while piece := read(count):
            assert len(piece) <= count
            out += piece
    return bytes(out)


async def found(cache: Cache, info: NarInfo) -> tuple[Upstream, NarInfo]:
    upstream = await open_upstream(cache.url, STORE)
    there = await upstream.info(info.path)
    assert there is not None
    return upstream, there


@pytest.mark.parametrize("compression", PACK)
async def test_what_is_there_is_found(cache: Cache, compression: str) -> None:
    added = cache.add("a", NAR, path_for("b"), compression=compression)
    upstream, info = await found(cache, added)
    assert info == added
    assert await upstream.info(path_for("b")) is None
    for count in (1 << 20, 1000):
        assert read_all(upstream, info, count) == NAR


async def test_a_cache_of_another_store_directory_is_refused(cache: Cache) -> None:
    (cache.folder / "nix-cache-info").write_text("StoreDir: /gnu/store\nPriority: 3\n")
    with pytest.raises(SourceError, match=r"/gnu/store, not /nix/store"):
        await open_upstream(cache.url, STORE)
    assert (await open_upstream(cache.url, "/gnu/store")).declared


async def test_a_cache_without_nix_cache_info_will_do(cache: Cache) -> None:
    """As for Nix, which makes one; for everything of a folder, at least a narinfo must be in it."""
    (cache.folder / "nix-cache-info").unlink()
    upstream = await open_upstream(cache.url, STORE)
    assert await upstream.info(path_for("a")) is None
    with pytest.raises(SourceError, match="no binary cache"):
        await upstream.hash_parts()
    cache.add("a", NAR)
    assert await upstream.hash_parts() == [path_for("a").hash_part]


async def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="absent: No such file"):
        await open_upstream((tmp_path / "absent").as_uri(), STORE)
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="file: Not a directory"):
        await open_upstream((tmp_path / "file").as_uri(), STORE)


@pytest.mark.parametrize("bad", [b"StoreDir: \x07\n", bytes(100_000)], ids=["unprintable", "huge"])
async def test_a_nix_cache_info_that_is_none_is_refused(cache: Cache, bad: bytes) -> None:
    (cache.folder / "nix-cache-info").write_bytes(bad)
    with pytest.raises(FormatError, match="nix-cache-info"):
        await open_upstream(cache.url, STORE)


async def test_all_that_is_there_is_listed(cache: Cache) -> None:
    paths = sorted(cache.add(f"p{i}", b"x").path.hash_part for i in range(20))
    for other in ("readme.narinfo", "e" * 32 + ".narinfo", paths[0] + ".narinfo.tmp", paths[0] + ".ls"):
        (cache.folder / other).touch()
    upstream = await open_upstream(cache.url, STORE)
    assert await upstream.hash_parts() == paths


async def test_a_narinfo_of_another_path_is_refused(cache: Cache) -> None:
    a, b = cache.add("a", NAR).path, path_for("b")
    os.rename(cache.narinfo(a), cache.narinfo(b))
    upstream = await open_upstream(cache.url, STORE)
    with pytest.raises(FormatError, match=rf"{b.hash_part}.narinfo: it is about {a}"):
        await upstream.info(b)


async def test_a_path_of_another_name_is_not_there(cache: Cache) -> None:
    added = cache.add("a", NAR).path
    upstream = await open_upstream(cache.url, STORE)
    with pytest.raises(PathAbsent, match=f"what is there is {added}"):
        await upstream.info(type(added)(added.hash_part, "b"))


async def test_a_narinfo_that_is_none_is_named(cache: Cache) -> None:
    path = cache.add("a", NAR).path
    upstream = await open_upstream(cache.url, STORE)
    for bad in (b"", b"nonsense", bytes(9 << 20)):
        cache.narinfo(path).write_bytes(bad)
        with pytest.raises(FormatError, match=f"{path.hash_part}.narinfo"):
            await upstream.info(path)


@pytest.mark.parametrize("compression", PACK)
async def test_no_more_is_unpacked_than_was_said(cache: Cache, compression: str) -> None:
    upstream, info = await found(
        cache, cache.add("a", NAR + b"x", nar_size=len(NAR), compression=compression)
    )
    out = bytearray()
    with upstream.nar(info) as read:

        def all_of_it() -> None:
            while piece := read(1 << 20):
                out.extend(piece)

        with pytest.raises(HashMismatch, match=f"more than the {len(NAR)} bytes"):
            all_of_it()
    assert len(out) <= len(NAR)


@pytest.mark.parametrize("compression", PACK)
async def test_another_file_hash_is_found(cache: Cache, compression: str) -> None:
    upstream, info = await found(cache, cache.add("a", NAR, file_hash=bytes(32), compression=compression))
    with pytest.raises(HashMismatch, match=r"a \(file://.*nar/.*has sha256:.* where its narinfo says"):
        read_all(upstream, info)


async def test_another_file_size_is_found_before_anything_is_read(cache: Cache) -> None:
    upstream, info = await found(cache, cache.add("a", NAR, file_size=3))
    with (
        pytest.raises(HashMismatch, match=f"it has {len(NAR)} bytes where its narinfo says 3"),
        upstream.nar(info),
    ):
        raise AssertionError("it was opened")


async def test_hash_and_size_of_the_file_need_not_be_said(cache: Cache) -> None:
    upstream, info = await found(cache, cache.add("a", NAR, file_hash=None, file_size=None, compression="xz"))
    assert read_all(upstream, info) == NAR


async def test_a_nar_that_is_not_there_is_named(cache: Cache) -> None:
    upstream, info = await found(cache, cache.add("a", NAR))
    (cache.folder / info.url).unlink()
    with pytest.raises(SourceError, match=rf"{info.url}: No such file"):
        read_all(upstream, info)


async def test_a_nar_that_is_a_pipe_is_not_waited_for(cache: Cache) -> None:
    upstream, info = await found(cache, cache.add("a", NAR))
    (cache.folder / info.url).unlink()
    os.mkfifo(cache.folder / info.url)
    with pytest.raises(SourceError, match="not a regular file"):
        read_all(upstream, info)


async def test_a_compression_that_is_not_known_is_named(cache: Cache) -> None:
    upstream, info = await found(cache, cache.add("a", NAR))
    cache.edit(info.path, "Compression: none", "Compression: lzip")
    upstream, info = await found(cache, info)
    with pytest.raises(FormatError, match=r"a \(file://.*compression 'lzip'"):
        read_all(upstream, info)


async def test_without_a_compression_it_is_bzip2(cache: Cache) -> None:
    added = cache.add("a", NAR, compression="bzip2")
    cache.edit(added.path, "Compression: bzip2\n", "")
    assert b"Compression" not in cache.narinfo(added.path).read_bytes()
    upstream, info = await found(cache, added)
    assert read_all(upstream, info) == NAR


async def test_nothing_stays_open_after_an_error(cache: Cache) -> None:
    upstream, info = await found(cache, cache.add("a", NAR, file_hash=bytes(32)))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(HashMismatch):
            read_all(upstream, info)
        with upstream.nar(info) as read:
            read(1)
    assert len(os.listdir("/proc/self/fd")) <= before
