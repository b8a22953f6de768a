"""NAR, Nix's archive format: a sans-IO reader (bytes in, events out) and a writer (nodes in, bytes out).

Neither touches a file. The reader takes hostile input: it accepts exactly the one canonical form, holds at
most one name or link target besides the piece that it was fed, and raises FormatError with the offset for
anything else. Format: Nix's thesis, figure 5.2, and `libutil/archive.cc`: every string is a little-endian u64
length, the bytes, and zero padding to 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from cidfs.errors import FormatError

MAGIC: Final = b"nix-archive-1"
MAX_NAME: Final = 255  # a component of a path on Linux
MAX_TARGET: Final = 4095  # a symlink's target on Linux
MAX_DEPTH: Final = 1024  # directories that a node lies in; alike in manifests
MAX_FILE: Final = (1 << 63) - 1


def pack_string(data: bytes) -> bytes:
    """Return data as a NAR string: length, bytes, padding."""
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def _tokens(*words: str) -> bytes:
    return b"".join(pack_string(w.encode()) for w in words)


_OPEN: Final = _tokens("(", "type")
_CLOSE: Final = _tokens(")")
_REGULAR: Final = _OPEN + _tokens("regular", "contents")
_EXECUTABLE: Final = _OPEN + _tokens("regular", "executable", "", "contents")
_SYMLINK: Final = _OPEN + _tokens("symlink", "target")
_DIRECTORY: Final = _OPEN + _tokens("directory")
_ENTRY: Final = _tokens("entry", "(", "name")
_NODE: Final = _tokens("node")
HEADER: Final = pack_string(MAGIC)
DIRECTORY_END: Final = _CLOSE
ENTRY_END: Final = _CLOSE


def write_entry(name: bytes) -> bytes:
    """Return what stands before an entry's node in a directory; ENTRY_END stands after it."""
    return _ENTRY + pack_string(name) + _NODE


def write_directory() -> bytes:
    """Return the beginning of a directory; DIRECTORY_END ends it."""
    return _DIRECTORY


def write_symlink(target: bytes) -> bytes:
    """Return a whole symlink node."""
    return _SYMLINK + pack_string(target) + _CLOSE


def write_file_head(size: int, executable: bool) -> bytes:
    """Return what stands before a file's contents of size bytes; write_file_tail(size) stands after them."""
    return (_EXECUTABLE if executable else _REGULAR) + size.to_bytes(8, "little")


def write_file_tail(size: int) -> bytes:
    """Return the padding and the end of a file node."""
    return bytes(-size % 8) + _CLOSE


@dataclass(frozen=True, slots=True)
class DirectoryStart:
    """A directory begins; its entries follow, then DirectoryEnd. name is empty for the root."""

    name: bytes


@dataclass(frozen=True, slots=True)
class DirectoryEnd:
    """The directory that was opened last ends."""


@dataclass(frozen=True, slots=True)
class FileStart:
    """A file of size bytes begins; FileData pieces of that many bytes follow, then FileEnd."""

    name: bytes
    size: int
    executable: bool


@dataclass(frozen=True, slots=True)
class FileData:
    """The next bytes of a file; valid as long as the piece that was fed."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class FileEnd:
    """The file ends."""


@dataclass(frozen=True, slots=True)
class Symlink:
    """A symlink."""

    name: bytes
    target: bytes


Event = DirectoryStart | DirectoryEnd | FileStart | FileData | FileEnd | Symlink


class _State(Enum):
    MAGIC = auto()
    OPEN = auto()
    TYPE_WORD = auto()
    TYPE = auto()
    FILE_FIELD = auto()
    EXECUTABLE_VALUE = auto()
    CONTENTS_WORD = auto()
    SIZE = auto()
    CONTENTS = auto()
    PADDING = auto()
    FILE_CLOSE = auto()
    TARGET_WORD = auto()
    TARGET = auto()
    SYMLINK_CLOSE = auto()
    DIRECTORY_FIELD = auto()
    ENTRY_OPEN = auto()
    NAME_WORD = auto()
    NAME = auto()
    NODE_WORD = auto()
    ENTRY_CLOSE = auto()
    END = auto()


_LIMIT = {_State.TARGET: MAX_TARGET, _State.NAME: MAX_NAME}


def check_entry_name(name: bytes) -> bytes:
    """Return a name that a directory entry can have.

    Raise FormatError for one that would leave its directory.
    """
    if not name or len(name) > MAX_NAME or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise FormatError(f"{name[:80]!r} cannot be a name in a directory")
    return name


class NarReader:
    """Parse a NAR that arrives in pieces.

    Call feed() with each piece and iterate over the events to the end before feeding the next one; call
    close() after the last. Not safe for several threads.
    """

    def __init__(self) -> None:
        self._state = _State.MAGIC
        self._rest = b""
        self._offset = 0  # in the NAR, of the first byte that is not consumed
        self._name = b""
        self._executable = False
        self._left = 0
        self._padding = 0
        self._last: list[bytes] = []  # per open directory, the name of its last entry

    @property
    def finished(self) -> bool:
        """Whether the whole archive was seen."""
        return self._state is _State.END

    def close(self) -> None:
        """Raise FormatError unless the archive is complete."""
        if not self.finished:
            raise FormatError(f"NAR ends too early, at byte {self._offset + len(self._rest)}")

    def feed(self, piece: bytes | bytearray | memoryview) -> Iterator[Event]:
        """Yield the events that a piece completes."""
        data = memoryview(self._rest + bytes(piece)) if self._rest else memoryview(piece)
        at, end, base = 0, len(data), self._offset
        while at < end:
            state = self._state
            if state is _State.CONTENTS:
                take = min(self._left, end - at)
                yield FileData(data[at : at + take])
                at += take
                self._left -= take
                if not self._left:
                    yield from self._contents_done()
                continue
            if state is _State.PADDING:
                if end - at < self._padding:
                    break
                if any(data[at : at + self._padding]):
                    raise FormatError(f"NAR: padding is not zero at byte {base + at}")
                at += self._padding
                self._state = _State.FILE_CLOSE
                yield FileEnd()
                continue
            if state is _State.END:
                raise FormatError(f"NAR: bytes after its end, at byte {base + at}")
            if end - at < 8:
                break
            length = int.from_bytes(data[at : at + 8], "little")
            if state is _State.SIZE:
                if length > MAX_FILE:
                    raise FormatError(f"NAR: a file of {length} bytes at byte {base + at}")
                at += 8
                self._left, self._padding = length, -length % 8
                self._state = _State.CONTENTS
                yield FileStart(self._name, length, self._executable)
                if not length:
                    yield from self._contents_done()
                continue
            if length > _LIMIT.get(state, 16):
                raise FormatError(
                    f"NAR: a string of {length} bytes where {state.name} stands, at byte {base + at}"
                )
            stop = at + 8 + length + -length % 8
            if stop > end:
                break
            word = bytes(data[at + 8 : at + 8 + length])
            if any(data[at + 8 + length : stop]):
                raise FormatError(f"NAR: padding is not zero at byte {base + at + 8 + length}")
            try:
                yield from self._token(state, word)
            except FormatError as e:
                raise FormatError(f"NAR: {e}, at byte {base + at}") from None
            at = stop
        self._offset = base + at
        self._rest = bytes(data[at:])

    def _contents_done(self) -> Iterator[Event]:
        if self._padding:
            self._state = _State.PADDING
        else:
            self._state = _State.FILE_CLOSE
            yield FileEnd()

    def _token(self, state: _State, word: bytes) -> Iterator[Event]:
        match state, word:
            case (_State.MAGIC, b"nix-archive-1"):
                self._state = _State.OPEN
            case (_State.OPEN, b"("):
                if len(self._last) > MAX_DEPTH:
                    raise FormatError(f"directories nested deeper than {MAX_DEPTH}")
                self._state = _State.TYPE_WORD
            case (_State.TYPE_WORD, b"type"):
                self._state = _State.TYPE
            case (_State.TYPE, b"regular"):
                self._executable, self._state = False, _State.FILE_FIELD
            case (_State.TYPE, b"symlink"):
                self._state = _State.TARGET_WORD
            case (_State.TYPE, b"directory"):
                self._last.append(b"")
                self._state = _State.DIRECTORY_FIELD
                yield DirectoryStart(self._name)
            case (_State.FILE_FIELD, b"executable"):
                self._executable, self._state = True, _State.EXECUTABLE_VALUE
            case (_State.EXECUTABLE_VALUE, b""):
                self._state = _State.CONTENTS_WORD
            case (_State.FILE_FIELD | _State.CONTENTS_WORD, b"contents"):
                self._state = _State.SIZE
            case (_State.FILE_FIELD, b")"):
                # Nix reads it as an empty file, and never writes it.
                raise FormatError("a file without contents")
            case (_State.FILE_CLOSE | _State.SYMLINK_CLOSE, b")"):
                self._node_done()
            case (_State.TARGET_WORD, b"target"):
                self._state = _State.TARGET
            case (_State.TARGET, _):
                if not word or b"\0" in word:
                    raise FormatError("a symlink's target that is empty or holds a zero byte")
                self._state = _State.SYMLINK_CLOSE
                yield Symlink(self._name, word)
            case (_State.DIRECTORY_FIELD, b"entry"):
                self._state = _State.ENTRY_OPEN
            case (_State.DIRECTORY_FIELD, b")"):
                self._last.pop()
                self._node_done()
                yield DirectoryEnd()
            case (_State.ENTRY_OPEN, b"("):
                self._state = _State.NAME_WORD
            case (_State.NAME_WORD, b"name"):
                self._state = _State.NAME
            case (_State.NAME, _):
                if check_entry_name(word) <= self._last[-1]:
                    raise FormatError(f"{word!r} is not after {self._last[-1]!r} in its directory")
                self._last[-1] = self._name = word
                self._state = _State.NODE_WORD
            case (_State.NODE_WORD, b"node"):
                self._state = _State.OPEN
            case (_State.ENTRY_CLOSE, b")"):
                self._state = _State.DIRECTORY_FIELD
            case _:
                raise FormatError(f"{word!r} where {state.name} stands")

    def _node_done(self) -> None:
        self._state = _State.ENTRY_CLOSE if self._last else _State.END
