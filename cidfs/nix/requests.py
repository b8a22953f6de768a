"""What can be asked in Nix's worker protocol and what is told in answer, as frozen values.

Paths are absolute store paths, as they came: whoever answers parses them. Owns the numbers of the operations.
Nothing here is parsed or written; values may be used from any thread.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

REALISATION_WITH_PATH: Final = "realisation-with-path-not-hash"
FEATURES: Final = frozenset({REALISATION_WITH_PATH})
"""What is offered from protocol 1.38 on; Nix 2.35 asks for realisations only where it is."""

MINOR: Final = 38
OLDEST: Final = 21  # Nix 2.3
CLIENT_MAGIC: Final = 0x6E697863
SERVER_MAGIC: Final = 0x6478696F
LAST: Final = 0x616C7473
ERROR: Final = 0x63787470

IS_VALID_PATH: Final = 1
QUERY_REFERRERS: Final = 6
BUILD_PATHS: Final = 9
ENSURE_PATH: Final = 10
ADD_TEMP_ROOT: Final = 11
ADD_INDIRECT_ROOT: Final = 12
SYNC_WITH_GC: Final = 13
FIND_ROOTS: Final = 14
SET_OPTIONS: Final = 19
QUERY_SUBSTITUTABLE_PATH_INFO: Final = 21
QUERY_DERIVATION_OUTPUTS: Final = 22
QUERY_ALL_VALID_PATHS: Final = 23
QUERY_PATH_INFO: Final = 26
QUERY_DERIVATION_OUTPUT_NAMES: Final = 28
QUERY_PATH_FROM_HASH_PART: Final = 29
QUERY_SUBSTITUTABLE_PATH_INFOS: Final = 30
QUERY_VALID_PATHS: Final = 31
QUERY_SUBSTITUTABLE_PATHS: Final = 32
QUERY_VALID_DERIVERS: Final = 33
NAR_FROM_PATH: Final = 38
QUERY_MISSING: Final = 40
QUERY_DERIVATION_OUTPUT_MAP: Final = 41
QUERY_REALISATION: Final = 43
BUILD_PATHS_WITH_RESULTS: Final = 46

REFUSED: Final = {
    7: "AddToStore",
    8: "AddTextToStore",
    BUILD_PATHS: "BuildPaths",
    18: "QueryDeriver",
    20: "CollectGarbage",
    34: "OptimiseStore",
    35: "VerifyStore",
    36: "BuildDerivation",
    37: "AddSignatures",
    39: "AddToStoreNar",
    42: "RegisterDrvOutput",
    44: "AddMultipleToStore",
    45: "AddBuildLog",
    BUILD_PATHS_WITH_RESULTS: "BuildPathsWithResults",
    47: "AddPermRoot",
}
"""Names of what is refused: it writes, builds, or was given up long ago. The builds are where they build."""


class _OfPath(msgspec.Struct, frozen=True, gc=False):
    path: str


class IsValidPath(_OfPath, frozen=True):
    """Is this path valid? Answered by `boolean`."""


class QueryPathInfo(_OfPath, frozen=True):
    """What is known of this path? Answered by `path_info`."""


class QueryReferrers(_OfPath, frozen=True):
    """Which valid paths refer to this one? Answered by `paths`."""


class QueryValidDerivers(_OfPath, frozen=True):
    """Which valid derivations have this path as an output? Answered by `paths`."""


class QueryDerivationOutputMap(_OfPath, frozen=True):
    """Which outputs does this derivation have, and where? Answered by `output_map`."""


class QueryDerivationOutputs(_OfPath, frozen=True):
    """Where are the outputs of this derivation? Asked only by Nix 2.3; answered by `paths`."""


class QueryDerivationOutputNames(_OfPath, frozen=True):
    """What are the outputs of this derivation called? Asked only by Nix 2.3; answered by `paths`."""


class NarFromPath(_OfPath, frozen=True):
    """The NAR of this path, please. Answered by `nar_begins` and the NAR, as it is."""


class Acknowledge(_OfPath, frozen=True):
    """Something that a store that never changes need not do: keep a path, or wait. Answered by `done`.

    path is that of EnsurePath and AddTempRoot, the link (which may be any file name; surrogates stand for
    what is not UTF-8) of AddIndirectRoot, and empty for SyncWithGC.
    """


class QueryPathFromHashPart(msgspec.Struct, frozen=True, gc=False):
    """Which valid path has this hash part? Answered by `maybe_path`."""

    hash_part: str


class QueryRealisation(msgspec.Struct, frozen=True, gc=False):
    """Which path is this output of a content-addressed derivation? Answered by `realisations`.

    id is `sha256:<hex>!<output>`, a derivation modulo its inputs, as up to Nix 2.34; or `<base name of the
    derivation>!<output>` where REALISATION_WITH_PATH was negotiated, and there alone. (On the wire those are
    two texts; Nix itself joins them with a `^`. Neither sign can be in a store path.)
    """

    id: str


class QueryValidPaths(msgspec.Struct, frozen=True, gc=False):
    """Which of these paths are valid? Answered by `paths`. Nothing is ever substituted."""

    paths: tuple[str, ...]


class QueryAllValidPaths(msgspec.Struct, frozen=True, gc=False):
    """Which paths are valid? Answered by `paths`, or `path_pieces`."""


class QueryMissing(msgspec.Struct, frozen=True, gc=False):
    """What would have to be built or fetched to have these? Answered by `missing`.

    Targets are store paths and `<derivation>!<outputs>`. Nix asks it before almost every command that names
    a path, be it `nix path-info`.
    """

    targets: tuple[str, ...]


class BuildPaths(msgspec.Struct, frozen=True, gc=False):
    """Have these. Answered by `already_valid` where all targets are valid store paths, else by `error`.

    `nix copy --from` asks it of the store that it copies from. A target with a `!` is to be built.
    """

    targets: tuple[str, ...]
    with_results: bool


class QuerySubstitutable(msgspec.Struct, frozen=True, gc=False):
    """What could be substituted? Answered by `nothing_substitutable`."""


class FindRoots(msgspec.Struct, frozen=True, gc=False):
    """Which roots are there? Answered by `no_roots`."""


class SetOptions(msgspec.Struct, frozen=True, gc=False):
    """The client's settings, which matter to nobody here. Answered by `options_taken`."""


class Refused(msgspec.Struct, frozen=True, gc=False):
    """An operation that writes, builds, or is not known. Answered by `error`; then the connection ends.

    Nix shows the error only if what it still sends is received (and dropped) until it hangs up; where the
    connection is closed first, it complains of a broken pipe.
    """

    operation: str


Request: TypeAlias = (
    IsValidPath
    | QueryPathInfo
    | QueryReferrers
    | QueryValidDerivers
    | QueryDerivationOutputMap
    | QueryDerivationOutputs
    | QueryDerivationOutputNames
    | NarFromPath
    | Acknowledge
    | QueryPathFromHashPart
    | QueryRealisation
    | QueryValidPaths
    | QueryAllValidPaths
    | QueryMissing
    | BuildPaths
    | QuerySubstitutable
    | FindRoots
    | SetOptions
    | Refused
)


class PathInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What Nix is told of a valid path.

    deriver (or empty) and references are absolute store paths, nar_hash is 32 raw bytes of SHA-256,
    registration_time is seconds since 1970. That a path was built here is never said: Nix would trust it.
    """

    deriver: str = ""
    nar_hash: bytes
    references: tuple[str, ...] = ()
    registration_time: int = 0
    nar_size: int = 0
    signatures: tuple[str, ...] = ()
    ca: str = ""


class RealisationInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The path of an output; id as in QueryRealisation.

    out_path is a base name, and so are the values of dependent: the realisations that it was built with, by
    id, as up to Nix 2.33.
    """

    id: str
    out_path: str
    signatures: tuple[str, ...] = ()
    dependent: dict[str, str] = {}


class Missing(msgspec.Struct, frozen=True):
    """The answer to QueryMissing: what would be built, fetched, and what nobody knows."""

    will_build: tuple[str, ...] = ()
    will_substitute: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
