"""Import from a binary cache: which paths, whether they are to be trusted, and in which order they come.

Asks a binary cache for narinfos, several at a time, and holds them against the trusted keys, before anything
of them is read. Publishes nothing: what it returns is for ingest. Runs in trio.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import trio

from cidfs.engine.ingest import first_error
from cidfs.engine.sources import Batch, NarSource, Tree
from cidfs.engine.wanted import Wanted
from cidfs.errors import CidfsError, FormatError, HashMismatch, NotTrusted, PathAbsent
from cidfs.formats.content_address import (
    ContentAddress,
    ContentProof,
    parse_content_address,
    path_of,
)
from cidfs.formats.digest import sha256_text
from cidfs.formats.narinfo import NarInfo
from cidfs.formats.signing import PublicKeys, key_name
from cidfs.formats.store_path import StorePath, parse_base_name
from cidfs.local.store import LocalStore
from cidfs.remote.upstream import Upstream

AT_ONCE: Final = 16
NAMES_SHOWN: Final = 5


@dataclass(frozen=True)
class Trust:
    """Whose signatures count, and whether one is needed."""

    keys: PublicKeys
    required: bool = True

    def check(self, info: NarInfo, store_dir: str) -> None:
        """Raise NotTrusted for a path that no trusted key has signed, if one has to."""
        if not self.required or self.keys.signer(info.fingerprint(store_dir), info.signatures):
            return
        names = sorted({key_name(s) for s in info.signatures})
        shown = ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
        if wrong := [name for name in names if name in self.keys]:
            why = f"its signature by {wrong[0]} is not one of the trusted key of this name"
        elif names:
            why = f"signed by {shown}, and not by a trusted key"
        else:
            why = "it has no signature"
        raise NotTrusted(
            f"{info.path}: {why}; trust a key with --trusted-key NAME:BASE64 or [trust] public_keys, or"
            " take it unverified with --no-check-sigs"
        )


class CacheSource:
    """The NAR of a path in a binary cache; opened when it is read, closed when that ends."""

    def __init__(self, upstream: Upstream, info: NarInfo, ca: ContentAddress | None = None) -> None:
        self._upstream = upstream
        self._info = info
        self._ca = ca

    @property
    def label(self) -> str:
        """The path, and where its NAR is."""
        return self._upstream.nar_label(self._info)

    def read(self, tree: Tree) -> Iterator[Batch]:
        """Yield the chunk data of all files, in NAR order."""
        proof = ContentProof(self._ca) if self._ca is not None else None
        with self._upstream.nar(self._info, proof) as read:
            yield from NarSource(read, self.label).read(tree)


def content_address_of(info: NarInfo, store_dir: str) -> ContentAddress | None:
    """Return the content address of a narinfo if it leads to the path, else None."""
    own = info.path.base_name in info.references
    others = [name for name in info.references if name != info.path.base_name]
    try:
        ca = parse_content_address(info.ca)
        return ca if path_of(ca, info.path.name, others, own, store_dir) == info.path else None
    except FormatError:
        return None


def wanted_from(upstream: Upstream, info: NarInfo, trust: Trust, store: LocalStore) -> Wanted:
    """Return what is wanted of a path in a binary cache.

    A content address that leads to the path needs no signature where the contents can be held against it;
    one that leads elsewhere proves nothing and is not kept. Nor does a path need one that is published with
    the same contents; nothing else that is said of it is taken over. Raise NotTrusted, HashMismatch.
    """
    ca = content_address_of(info, upstream.store_dir)
    proving = ca if ca is not None and ca.proves(info.path.base_name in info.references) else None
    if proving is not None and proving.method == "nar" and proving.algorithm == "sha256":
        if proving.digest != info.nar_hash:
            raise HashMismatch(
                f"{info.path}: its narinfo says the NAR hash {sha256_text(info.nar_hash)} and the content"
                f" address {info.ca}; nothing of it is published"
            )
        source = CacheSource(upstream, info)  # its NAR hash is compared anyway
    else:
        source = CacheSource(upstream, info, proving)
    bare = Wanted(
        source,
        path=info.path,
        expected_hash=info.nar_hash,
        expected_size=info.nar_size,
        references=info.references,
    )
    if proving is None:
        try:
            trust.check(info, upstream.store_dir)
        except NotTrusted:
            known = store.record_of(info.path.hash_part)
            if known is None or known.path != info.path or not bare.same_as(known):
                raise
            return bare
    return replace(
        bare, deriver=info.deriver, ca=info.ca if ca is not None else "", signatures=info.signatures
    )


async def gather(
    upstream: Upstream,
    asked: Sequence[StorePath],
    store: LocalStore,
    trust: Trust,
    *,
    closure: bool,
    on_left: Callable[[int], None] | None = None,
) -> list[Wanted]:
    """Return what is wanted of paths in a binary cache, references before referrers.

    With closure, of all that they refer to; of these, what the cache lacks must be published here. on_left is
    told how many narinfos are known to be still unread. Raise PathAbsent, NotTrusted, FormatError,
    SourceError, HashMismatch: the first of them that is met.
    """
    found: dict[str, Wanted] = {}  # all by base name: references are base names
    referrer: dict[str, str] = {path.base_name: "" for path in asked}

    async def one(name: str, more: Callable[[str], None]) -> None:
        path = parse_base_name(name)
        info = await upstream.info(path)
        if info is None:
            if referrer[name] and store.find_path(path) is not None:
                return
            of = f", and {referrer[name]} refers to it" if referrer[name] else ""
            raise PathAbsent(f"{path.full(upstream.store_dir)}: not in {upstream.url}{of}")
        found[name] = wanted_from(upstream, info, trust, store)
        for reference in info.references if closure else ():
            if reference not in referrer:
                referrer[reference] = name
                more(reference)

    await _several(list(referrer), one, on_left)
    return _ordered([path.base_name for path in asked], found)


async def gather_all(
    upstream: Upstream,
    store: LocalStore,
    trust: Trust,
    *,
    on_failed: Callable[[CidfsError], None],
    on_left: Callable[[int], None] | None = None,
) -> list[Wanted]:
    """Return what is wanted of everything that a binary cache has, references before referrers.

    on_failed is told of each path that cannot be had; the others go on. on_left as with gather.
    """
    found: dict[str, Wanted] = {}
    failed: dict[str, CidfsError] = {}

    async def one(hash_part: str, more: Callable[[str], None]) -> None:
        try:
            info = await upstream.info_of(hash_part)
            if info is not None:  # else it went since it was listed
                found[info.path.base_name] = wanted_from(upstream, info, trust, store)
        except CidfsError as e:
            failed[hash_part] = e

    await _several(await upstream.hash_parts(), one, on_left)
    for _, error in sorted(failed.items()):  # the same order each time, whoever was read first
        on_failed(error)
    return _ordered(sorted(found), found)


async def _several(
    first: Sequence[str],
    work: Callable[[str, Callable[[str], None]], Awaitable[None]],
    on_left: Callable[[int], None] | None,
) -> None:
    """Do a work for each of some texts, AT_ONCE at a time; it may hand in more of them."""
    to_do, items = trio.open_memory_channel[str](math.inf)
    left = 0

    def more(item: str) -> None:
        nonlocal left
        left += 1
        to_do.send_nowait(item)

    async def worker() -> None:
        nonlocal left
        async for item in items:
            await work(item, more)
            left -= 1
            if on_left is not None:
                on_left(left)
            if not left:
                to_do.close()

    with to_do, items:
        for item in first:
            more(item)
        if not left:
            return
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(worker)
        except BaseExceptionGroup as group:
            raise first_error(group) from group


def _ordered(asked: Sequence[str], found: dict[str, Wanted]) -> list[Wanted]:
    """Return what was found, references before referrers where they go in no circle."""
    order: list[Wanted] = []
    seen: set[str] = set()
    stack: list[tuple[str, bool]] = [(name, False) for name in reversed(asked)]
    while stack:
        here, references_done = stack.pop()
        if references_done:
            order.append(found[here])
        elif here in found and here not in seen:
            seen.add(here)
            stack.append((here, True))
            stack += ((name, False) for name in reversed(found[here].references) if name not in seen)
    return order
