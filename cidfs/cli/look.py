"""Commands that look at the store without a mount: ls, cat, info, nar."""

from __future__ import annotations

import stat
from typing import Annotated

import msgspec
import typer

from cidfs.cli.common import GLOBALS, Located, cid, locate, removed_meanwhile
from cidfs.cli.output import raw, result, show_facts, size_text
from cidfs.engine.export import file_pieces, nar_pieces
from cidfs.errors import PathAbsent, UsageError
from cidfs.formats.digest import cid_text, looks_like_cid, sha256_text
from cidfs.formats.manifest import DIRECTORY, EXECUTABLE, FILE, MODES, SYMLINK
from cidfs.local.store import LocalStore

PathArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="/nix/store/<hash>-<name>, its base name or a manifest's CID; with /inside/path behind it.",
    ),
]


def ls(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH", help="A store path, a directory inside one, or a CID; none: all store paths."
        ),
    ] = None,
    long: Annotated[bool, typer.Option("--long", "-l", help="With mode, size and link target.")] = False,
) -> None:
    """List the store paths, or what is in one."""
    with GLOBALS.open_store() as store:
        if path is None:
            for published in store.paths():
                row = published.row
                prefix = f"{row.files:>8} files {row.size:>14} " if long else ""
                result(prefix + published.path.full(store.store_dir))
            return
        found = locate(store, path)
        indexes = found.manifest.children(found.node) if found.node.type == DIRECTORY else [found.index]
        for index in indexes:
            node = found.manifest.node(index)
            line = found.manifest.name(node) or path.rstrip("/").rpartition("/")[2].encode()
            if long:
                line = f"{stat.filemode(MODES[node.type])} {node.size:>12} ".encode() + line
                if node.type == SYMLINK:
                    line += b" -> " + found.manifest.target(node)
            raw(line + b"\n")


def cat(path: PathArgument) -> None:
    """Write a file's contents to standard output; a chunk's CID gives the chunk."""
    with GLOBALS.open_store() as store:
        if looks_like_cid(path) and store.place("manifests", cid(path)) is None:
            if store.place("chunks", cid(path)) is None:
                raise PathAbsent(f"{path}: neither a chunk nor a manifest of the store at {store.state.root}")
            raw(store.read_chunk(cid(path)))
            return
        found = locate(store, path)
        if not found.node.is_file:
            kind = "a directory" if found.node.type == DIRECTORY else "a symlink"
            raise UsageError(f"{path}: is {kind}, not a file")
        with removed_meanwhile(store, found):
            for piece in file_pieces(store, found.manifest, found.node):
                raw(piece)


def nar(path: PathArgument) -> None:
    """Write a store path's NAR to standard output, as `nix-store --dump` would."""
    with GLOBALS.open_store() as store:
        found = locate(store, path)
        if found.index:
            raise UsageError(f"{path}: a NAR is of a whole store path; leave out what is inside")
        with removed_meanwhile(store, found):
            for piece in nar_pieces(store, found.manifest):
                raw(piece)


def info(
    path: PathArgument,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Show what is known of a store path: CID, NAR hash, references, signatures, inode numbers, chunks."""
    with GLOBALS.open_store() as store:
        known = _facts(store, locate(store, path))
    if as_json:
        result(msgspec.json.format(msgspec.json.encode(known), indent=2).decode())
        return
    rows = []
    for name, value in known.items():
        shown = value if isinstance(value, list) else [value]
        for i, each in enumerate(shown or ["-"]):
            rows.append((name.replace("_", " ") if i == 0 else "", _shown(name, each)))
    show_facts(rows)


def _shown(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and name.endswith("size"):
        return f"{size_text(value)} ({value})"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value) or "-"


def _facts(store: LocalStore, found: Located) -> dict[str, object]:
    manifest = found.manifest
    facts: dict[str, object] = {}
    if found.index:
        node = found.node
        facts["inside"] = manifest.path(found.index).decode(errors="replace")
        facts["type"] = stat.filemode(MODES[node.type])
        facts["size"] = node.size
        if node.is_file:
            facts["chunks"] = [cid_text(span.digest) for span in manifest.spans(node)]
        if found.row is not None:
            facts["inode"] = found.row.base + found.index
        return facts
    if found.path is not None and found.row is not None:
        facts["path"] = found.path.full(store.store_dir)
    facts |= {
        "cid": cid_text(found.digest),
        "nodes": manifest.node_count,
        "files": manifest.count_of(FILE) + manifest.count_of(EXECUTABLE),
        "chunks": manifest.chunk_count,
        "size": manifest.total_size,
    }
    if found.path is None or found.row is None:
        return facts
    record = store.record_of(found.path.hash_part)
    if record is None:
        raise PathAbsent(f"{found.path}: its record is lost from the index; run `cidfs rebuild`")
    prefix = store.store_dir + "/"
    return facts | {
        "nar_hash": sha256_text(record.nar_hash),
        "nar_size": record.nar_size,
        "references": [prefix + r for r in record.references],
        "referrers": [_full(store, r) for r in store.referrers(found.path.hash_part)],
        "deriver": prefix + record.deriver if record.deriver else "",
        "ca": record.ca,
        "signatures": list(record.signatures),
        "realisations": [each.id for each in store.realisations_of(found.path)],
        "inode_base": found.row.base,
        "serial": found.row.serial,
        "closure_complete": found.row.whole > 0,
    }


def _full(store: LocalStore, hash_part: str) -> str:
    row = store.find(hash_part.encode())
    return f"{store.store_dir}/{hash_part}-{row.name.decode() if row else '?'}"
