"""What is to be ingested, and what its path shall be. Values only.

Made by the command line, used by ingest.
"""

from __future__ import annotations

from dataclasses import dataclass

from cidfs.engine.sources import Source
from cidfs.formats.record import Record
from cidfs.formats.store_path import StorePath


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tree to ingest, and what its path is to be.

    Without a path, it is the one that the contents give under `name` (as `nix store add` does). expected_hash
    and expected_size are of the NAR; a mismatch publishes nothing.
    """

    source: Source
    name: str = ""
    path: StorePath | None = None
    expected_hash: bytes | None = None
    expected_size: int | None = None
    references: tuple[str, ...] = ()
    deriver: str = ""
    ca: str = ""
    signatures: tuple[str, ...] = ()

    def same_as(self, known: Record) -> bool:
        """Whether a published path has these very contents and references, so that nothing need be read."""
        return (
            self.expected_hash == known.nar_hash
            and self.expected_size in (None, known.nar_size)
            and tuple(sorted(set(self.references))) == known.references
        )
