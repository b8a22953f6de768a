"""Binary caches in a folder, written independently of what reads them."""

from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import brotli
import msgspec
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cidfs.formats.digest import nix32_encode
from cidfs.formats.narinfo import NarInfo, render
from cidfs.formats.store_path import StorePath

STORE: Final = "/nix/store"
PACK: Final[dict[str, Callable[[bytes], bytes]]] = {
    "none": lambda data: data,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstd": zstandard.compress,
    "bzip2": bz2.compress,
    "gzip": gzip.compress,
    "br": lambda data: bytes(brotli.compress(data, quality=3)),
}


def path_for(name: str) -> StorePath:
    """Return some store path of a name; the same one each time."""
    return StorePath(nix32_encode(hashlib.sha256(name.encode()).digest()[:20]), name)


class Key:
    """A key pair."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._private = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())

    @property
    def public(self) -> str:
        raw = self._private.public_key().public_bytes_raw()
        return f"{self.name}:{base64.b64encode(raw).decode()}"

    def sign(self, info: NarInfo) -> str:
        signature = self._private.sign(info.fingerprint(STORE))
        return f"{self.name}:{base64.b64encode(signature).decode()}"


KEY: Final = Key("cache-1")
OTHER_KEY: Final = Key("other-1")


class Cache:
    """A binary cache in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "nar").mkdir(parents=True)
        (folder / "nix-cache-info").write_text(f"StoreDir: {STORE}\n")

    @property
    def url(self) -> str:
        return self.folder.as_uri()

    def add(
        self,
        name: str | StorePath,
        nar: bytes,
        *references: StorePath,
        compression: str = "none",
        keys: tuple[Key, ...] = (KEY,),
        **said: Any,
    ) -> NarInfo:
        """Write a path's NAR and narinfo; `said` is what the narinfo says beside the truth, but signed."""
        path = path_for(name) if isinstance(name, str) else name
        packed = PACK[compression](nar)
        info = NarInfo(
            path=path,
            url=f"nar/{path.hash_part}.nar.{compression}",
            compression=compression,
            file_hash=hashlib.sha256(packed).digest(),
            file_size=len(packed),
            nar_hash=hashlib.sha256(nar).digest(),
            nar_size=len(nar),
            references=tuple(sorted({r.base_name for r in references})),
        )
        info = msgspec.structs.replace(info, **said)
        if "signatures" not in said:
            signatures = tuple(sorted(key.sign(info) for key in keys))
            info = msgspec.structs.replace(info, signatures=signatures)
        (self.folder / info.url).write_bytes(packed)
        self.narinfo(path).write_bytes(render(info, STORE))
        return info

    def narinfo(self, path: StorePath) -> Path:
        return self.folder / f"{path.hash_part}.narinfo"

    def edit(self, path: StorePath, old: str, new: str) -> None:
        """Replace a text in a narinfo, whatever its signatures say."""
        text = self.narinfo(path).read_text()
        assert old in text
        self.narinfo(path).write_text(text.replace(old, new))
