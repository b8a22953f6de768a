"""A folder as an object store, and which URLs name one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from cidfs.errors import FormatError, SourceError, UsageError
from cidfs.remote.directory import Directory
from cidfs.remote.urls import objects_at


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a few objects, beside a secret."""
    here = tmp_path / "objects"
    (here / "a" / "b").mkdir(parents=True)
    (here / "a" / "one").write_bytes(b"1" * 100)
    (here / "top").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"secret")
    return here


async def test_objects_are_the_files_below(folder: Path) -> None:
    objects = Directory(folder)
    assert await objects.get("a/one", 100) == b"1" * 100
    assert await objects.get("top", 0) == b""
    for absent in ("a/two", "b/one", "top/one"):
        assert await objects.get(absent, 100) is None
    assert sorted(await objects.names()) == ["a", "top"]
    assert sorted(await objects.names("a")) == ["b", "one"]


async def test_what_is_larger_than_expected_is_refused(folder: Path) -> None:
    with pytest.raises(FormatError, match="a/one: more than 99 bytes"):
        await Directory(folder).get("a/one", 99)


async def test_an_endless_file_is_read_to_its_limit_only(folder: Path) -> None:
    """As in a folder of /proc or of a hostile file system: a regular file without end."""
    (folder / "large").touch()
    os.truncate(folder / "large", 1 << 40)
    with pytest.raises(FormatError, match="more than 1000 bytes"):
        await Directory(folder).get("large", 1000)


@pytest.mark.parametrize(
    "key", ["../secret", "a/../../secret", "/etc/passwd", "a//one", "", ".", "a/./one", "a\0"]
)
async def test_no_key_leads_out(folder: Path, key: str) -> None:
    objects = Directory(folder)
    with pytest.raises(FormatError, match="does not name"):
        await objects.get(key, 100)
    with pytest.raises(FormatError, match="does not name"), objects.open(key):
        pass


async def test_what_is_no_file_is_refused_at_once(folder: Path) -> None:
    """A pipe that nobody writes to would be waited for."""
    os.mkfifo(folder / "pipe")
    objects = Directory(folder)
    for key in ("pipe", "a"):
        with pytest.raises(SourceError, match="not a regular file"):
            await objects.get(key, 100)
        with pytest.raises(SourceError, match="not a regular file"), objects.open(key):
            pass


async def test_symlinks_that_someone_laid_are_followed(folder: Path) -> None:
    (folder / "link").symlink_to("a")
    (folder / "loop").symlink_to("loop")
    assert await Directory(folder).get("link/one", 100) == b"1" * 100
    with pytest.raises(SourceError, match="loop"):
        await Directory(folder).get("loop", 100)


async def test_an_object_is_read_in_pieces(folder: Path) -> None:
    with Directory(folder).open("a/one") as reader:
        assert reader.size == 100
        assert [len(reader.read(60)) for _ in range(3)] == [60, 40, 0]


async def test_nothing_stays_open(folder: Path) -> None:
    objects = Directory(folder)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        await objects.get("a/one", 100)
        with objects.open("a/one") as reader:
            reader.read(1)
        with pytest.raises(SourceError):
            await objects.get("a", 100)
    assert len(os.listdir("/proc/self/fd")) <= len(before)


async def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(SourceError, match="nowhere: No such file"):
        await Directory(folder / "nowhere").names()
    with pytest.raises(SourceError, match=r"objects/a/two: No such file"), Directory(folder).open("a/two"):
        pass
    assert await Directory(folder / "nowhere").get("x", 1) is None


async def test_a_disk_that_does_not_answer_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = threading.Event()
    objects = Directory(folder, deadline=0.05)
    monkeypatch.setattr(objects, "_get", lambda *_: stuck.wait(30))
    try:
        with pytest.raises(SourceError, match=r"a/one: no answer within 0.05 s"):
            await objects.get("a/one", 100)
    finally:
        stuck.set()


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("file:///some/where", "/some/where"),
        ("file:///some/where/", "/some/where"),
        ("file://localhost/some/where", "/some/where"),
        ("file:/some/where", "/some/where"),
        ("file:///some%20where/%3F%23", "/some where/?#"),
        ("FILE:///x", "/x"),
        ("file:///", "/"),
    ],
)
def test_urls_of_folders(url: str, folder: str) -> None:
    assert objects_at(url).url == Path(folder).as_uri().rstrip("/")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("file://relative/folder", "absolute"),
        ("file:relative", "absolute"),
        ("file://", "absolute"),
        ("file://host/x", "absolute"),
        ("file:///x?compression=xz", "leave out"),
        ("file:///x#y", "leave out"),
        ("file:///x%00y", "absolute"),
        ("http://example.org", "folder only"),
        ("https://example.org/x", "folder only"),
        ("s3://bucket?region=eu", "folder only"),
        ("ssh://host", "folder only"),
        ("http://[", "not a URL"),
    ],
)
def test_other_urls_are_refused(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as raised:
        objects_at(url)
    assert url in str(raised.value)
