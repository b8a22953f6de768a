"""Narinfos, their signatures, and content addresses: as Nix writes them, and as nobody should."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import FormatError
from cidfs.formats import nar
from cidfs.formats.content_address import ContentProof, parse_content_address, path_of
from cidfs.formats.digest import nix32_encode, parse_sha256
from cidfs.formats.narinfo import NarInfo, cache_store_dir, check_key, parse, render
from cidfs.formats.signing import PublicKeys, key_name, parse_public_key
from cidfs.formats.store_path import DEFAULT_STORE_DIR as STORE
from cidfs.formats.store_path import parse_base_name, parse_store_path
from tests.formats.support import VECTORS, by_reason, examples, flipped

VECTOR: Final[dict[str, Any]] = json.loads((VECTORS / "narinfo.json").read_text())
PATHS: Final[dict[str, Any]] = VECTOR["paths"]
KEYS: Final = PublicKeys(parse_public_key(text) for text in VECTOR["keys"])
TOP: Final = next(path for path in PATHS if path.endswith("-top-1"))
SAMPLE: Final[bytes] = PATHS[TOP]["narinfo"].encode()
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path).partition("-")[2])


def lines(**changed: str | None) -> bytes:
    """Return a narinfo with other values, or without a field."""
    fields: dict[str, str | None] = {
        "StorePath": "/nix/store/1r7cmdf0mdlywby8h14bhw0iyb8601dg-leaf-1",
        "URL": "nar/x.nar.xz",
        "Compression": "xz",
        "FileHash": "sha256:1awhl2hm31spcigyxdqkzpk8w92wf68s8xk39gcp19x2k4rpywid",
        "FileSize": "10",
        "NarHash": "sha256:1lvsw322s0r2486p3nzbminsmszxp2hab4l3v3a48vq67281imxi",
        "NarSize": "20",
        "References": "1r7cmdf0mdlywby8h14bhw0iyb8601dg-leaf-1 d8dv9n983rq8m7ayimbxls08wqhklc3z-mid-1-dev",
        "Deriver": "d32zzz0s6m11hagj4y776spjlsvj2lbl-leaf-1.drv",
    }
    fields |= changed
    return "".join(f"{name}: {value}\n" for name, value in fields.items() if value is not None).encode()


@paths
def test_what_nix_wrote_is_read_as_nix_reads_it(path: str) -> None:
    info, nix = parse(PATHS[path]["narinfo"].encode(), STORE), PATHS[path]["nix"]
    assert info.path.full(STORE) == path
    assert (info.url, info.compression) == (nix["url"], nix["compression"])
    assert (info.file_hash, info.file_size) == (parse_sha256(nix["downloadHash"]), nix["downloadSize"])
    assert (info.nar_hash, info.nar_size) == (parse_sha256(nix["narHash"]), nix["narSize"])
    assert [f"{STORE}/{name}" for name in info.references] == sorted(nix["references"])
    assert (f"{STORE}/{info.deriver}" if info.deriver else None) == nix["deriver"]
    assert list(info.signatures) == sorted(nix["signatures"])
    assert (info.ca or None) == nix["ca"]


@paths
def test_rendering_gives_what_nix_wrote(path: str) -> None:
    written = PATHS[path]["narinfo"].encode()
    assert render(parse(written, STORE), STORE) == written


@paths
def test_the_signatures_of_nix_verify(path: str) -> None:
    info = parse(PATHS[path]["narinfo"].encode(), STORE)
    message = info.fingerprint(STORE)
    for signature in info.signatures:
        assert KEYS.signer(message, [signature]) == key_name(signature)
    if info.signatures:
        assert KEYS.signer(message.replace(b"1;/nix", b"2;/nix"), info.signatures) is None
        assert KEYS.signer(info.fingerprint("/other/store"), info.signatures) is None


def test_the_vectors_have_both_signed_and_unsigned_paths_and_two_keys() -> None:
    counts = {len(PATHS[path]["nix"]["signatures"]) for path in PATHS}
    assert counts == {0, 1, 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", parse_base_name("1r7cmdf0mdlywby8h14bhw0iyb8601dg-leaf-2")),
        ("nar_hash", bytes(32)),
        ("nar_size", 2321),
        ("references", ()),
    ],
)
def test_a_signature_covers_what_counts(field: str, value: object) -> None:
    info = parse(SAMPLE, STORE)
    other = NarInfo(**{**{f: getattr(info, f) for f in info.__struct_fields__}, field: value})
    assert KEYS.signer(info.fingerprint(STORE), info.signatures)
    assert KEYS.signer(other.fingerprint(STORE), info.signatures) is None


def test_defaults_are_those_of_nix() -> None:
    info = parse(lines(Compression=None, FileHash=None, FileSize=None, References=None, Deriver=None), STORE)
    assert (info.compression, info.file_hash, info.file_size) == ("bzip2", None, None)
    assert (info.references, info.deriver, info.signatures, info.ca) == ((), "", (), "")
    assert parse(lines(Compression="", Deriver="unknown-deriver", FileSize="0"), STORE).compression == "bzip2"
    assert parse(lines(Deriver="unknown-deriver"), STORE).deriver == ""
    assert parse(lines(FileSize="0"), STORE).file_size is None


def test_what_is_not_known_is_skipped() -> None:
    told = lines() + b"System: x86_64-linux\nNote: caf\xc3\xa9 \xff: yes\nNote: again\n"
    assert parse(told, STORE) == parse(lines(), STORE)


def test_hashes_may_be_in_any_notation_of_nix() -> None:
    raw = parse(lines(), STORE).nar_hash
    sri = "sha256-" + base64.b64encode(raw).decode()
    for text in (f"sha256:{raw.hex()}", sri, f"sha256:{nix32_encode(raw)}"):
        assert parse(lines(NarHash=text), STORE).nar_hash == raw


def test_signatures_are_sorted_and_there_once() -> None:
    several = lines() + b"Sig: b:Zg==\nSig: a:Zg==\nSig: b:Zg==\n"
    assert parse(several, STORE).signatures == ("a:Zg==", "b:Zg==")


REFUSED: Final = {
    "nothing": b"",
    "no store path": lines(StorePath=None),
    "no url": lines(URL=None),
    "no nar hash": lines(NarHash=None),
    "no nar size": lines(NarSize=None),
    "a nar of no bytes": lines(NarSize="0"),
    "a nar size below zero": lines(NarSize="-1"),
    "a nar size of 2^63": lines(NarSize=str(1 << 63)),
    "a nar size with a sign": lines(NarSize="+5"),
    "a nar size of other digits": lines().replace(b"NarSize: 20", "NarSize: ٢٠".encode()),
    "a nar size with an underscore": lines(NarSize="1_0"),
    "a nar size of ten thousand digits": lines(NarSize="1" * 10_000),
    "a file size that is none": lines(FileSize="ten"),
    "a nar hash of another kind": lines(NarHash="md5:" + "0" * 32),
    "a nar hash without kind": lines(NarHash=bytes(32).hex()),
    "a nar hash that is short": lines(NarHash="sha256:abc"),
    "a file hash of another kind": lines(FileHash="sha512:" + "0" * 128),
    "another store directory": lines(StorePath="/other/store/1r7cmdf0mdlywby8h14bhw0iyb8601dg-leaf-1"),
    "a store path that is a base name": lines(StorePath="1r7cmdf0mdlywby8h14bhw0iyb8601dg-leaf-1"),
    "a file in a store path": lines(StorePath="/nix/store/1r7cmdf0mdlywby8h14bhw0iyb8601dg-leaf-1/bin"),
    "a store path that leads out": lines(StorePath="/nix/store/../../etc/passwd"),
    "a reference that is absolute": lines(References="/nix/store/1r7cmdf0mdlywby8h14bhw0iyb8601dg-leaf-1"),
    "a reference that is none": lines(References="../../etc/passwd"),
    "a reference with a bad name": lines(References="1r7cmdf0mdlywby8h14bhw0iyb8601dg-a/b"),
    "too many references": lines(References="a " * 100_001),
    "a deriver that is none": lines(Deriver="nobody"),
    "an absolute url": lines(URL="/etc/passwd"),
    "a url that leads out": lines(URL="../x.nar"),
    "a url that leads out on the way": lines(URL="nar/../../x.nar"),
    "a url with an empty part": lines(URL="nar//x.nar"),
    "a url that ends in a slash": lines(URL="nar/"),
    "a url of a dot": lines(URL="."),
    "a url with a scheme": lines(URL="http://example.org/x.nar"),
    "a url with a scheme and no slashes": lines(URL="file:x.nar"),
    "a url with white space": lines(URL="nar/x y"),
    "a url with nothing in it": lines(URL=""),
    "a url with a zero byte": lines(URL="nar/x\0y"),
    "a url of 5,000 characters": lines(URL="x" * 5000),
    "two store paths": lines() + lines()[:70].split(b"\n")[0] + b"\n",
    "two nar hashes": lines() + b"NarHash: sha256:1lvsw322s0r2486p3nzbminsmszxp2hab4l3v3a48vq67281imxi\n",
    "two lists of references": lines() + b"References: \n",
    "two content addresses": lines(CA="text:a") + b"CA: text:a\n",
    "a signature with white space": lines(Sig="a b"),
    "a signature that is not printable": lines(Sig="a:\x07"),
    "a signature of 5,000 characters": lines(Sig="a:" + "A" * 5000),
    "too many signatures": lines() + b"".join(b"Sig: a:%d\n" % i for i in range(1001)),
    "a line without colon": lines() + b"nonsense\n",
    "a line without space": lines() + b"Sig:a:Zg==\n",
    "an empty line": lines() + b"\n",
    "no end of line": lines()[:-1],
    "carriage returns": lines().replace(b"\n", b"\r\n"),
    "too many lines": lines() + b"a: b\n" * 10_000,
    "nine megabytes": lines() + b"a: " + bytes(9 << 20) + b"\n",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=[by_reason(reason) for reason in REFUSED])
def test_what_no_narinfo_can_be_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError) as raised:
        parse(data, STORE)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("key", ["nar/x.nar.xz", "x", "nar/a?hash=b", ".hidden/x", "a/..b", "...", "a/b:c"])
def test_keys_inside_a_cache_are_taken(key: str) -> None:
    assert check_key(key) == key


def test_the_line_of_an_error_is_named() -> None:
    with pytest.raises(FormatError, match=r"line 7: NarSize"):
        parse(lines(NarSize="x"), STORE)


BASE32: Final = st.text("0123456789abcdfghijklmnpqrsvwxyz", min_size=32, max_size=32)
NAMES: Final = st.text("abcXYZ019+-._?=", min_size=1, max_size=20).filter(lambda name: name[0] != ".")
BASES: Final = st.builds(lambda digits, name: f"{digits}-{name}", BASE32, NAMES)
TOKENS: Final = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
INFOS: Final = st.builds(
    NarInfo,
    path=BASES.map(parse_base_name),
    url=st.lists(NAMES, min_size=1, max_size=4).map("/".join),
    compression=st.sampled_from(["none", "xz", "zstd", "br", "of tomorrow".replace(" ", "-")]),
    file_hash=st.none() | st.binary(min_size=32, max_size=32),
    file_size=st.none() | st.integers(1, nar.MAX_FILE),
    nar_hash=st.binary(min_size=32, max_size=32),
    nar_size=st.integers(1, nar.MAX_FILE),
    references=st.lists(BASES, unique=True, max_size=5).map(lambda found: tuple(sorted(found))),
    deriver=st.just("") | BASES,
    signatures=st.lists(TOKENS, unique=True, max_size=4).map(lambda found: tuple(sorted(found))),
    ca=st.just("") | TOKENS,
)


@examples(200)
@given(INFOS)
def test_what_is_rendered_is_read_again(info: NarInfo) -> None:
    assert parse(render(info, "/some/store"), "/some/store") == info


def survive(data: bytes) -> None:
    try:
        info = parse(data, STORE)
    except FormatError:
        return
    assert parse(render(info, STORE), STORE) == info
    assert KEYS.signer(info.fingerprint(STORE), info.signatures) in (None, "cache.example.org-1", "other-2")
    check_key(info.url)


def test_every_truncation_is_refused_or_harmless() -> None:
    for end in range(len(SAMPLE)):
        survive(SAMPLE[:end])
        survive(SAMPLE[end:])


def test_no_flipped_bit_leads_to_anything_but_a_format_error() -> None:
    for at in range(len(SAMPLE)):
        for bit in range(at % 2, 8, 2):
            survive(flipped(SAMPLE, at, 1 << bit))


@examples(300)
@given(
    st.lists(st.integers(0, len(SAMPLE.splitlines()) - 1), max_size=14),
    st.binary(max_size=100),
    st.integers(0, len(SAMPLE)),
    st.integers(0, len(SAMPLE)),
)
def test_no_mutation_leads_to_anything_but_a_format_error(
    order: list[int], junk: bytes, keep: int, resume: int
) -> None:
    rows = SAMPLE.splitlines(keepends=True)
    survive(b"".join(rows[i] for i in order))
    survive(SAMPLE[:keep] + junk + SAMPLE[resume:])
    survive(junk)
    with contextlib.suppress(FormatError):
        cache_store_dir(junk)
    with contextlib.suppress(FormatError):
        parse_content_address(junk.decode("latin-1"))
    with contextlib.suppress(FormatError):
        parse_public_key(junk.decode("latin-1"))


def test_a_flipped_bit_in_what_is_signed_is_never_signed() -> None:
    """In path, NAR hash, NAR size and references; what else stands in a narinfo is not covered."""
    whole = parse(SAMPLE, STORE)
    changed = 0
    for at in range(len(SAMPLE)):
        for bit in range(at % 4, 8, 4):
            with contextlib.suppress(FormatError):
                info = parse(flipped(SAMPLE, at, 1 << bit), STORE)
                if info.fingerprint(STORE) != whole.fingerprint(STORE):
                    changed += 1
                    assert KEYS.signer(info.fingerprint(STORE), info.signatures) is None
    assert changed > 50


def test_the_store_directory_of_a_cache() -> None:
    assert cache_store_dir(b"StoreDir: /nix/store\n") == "/nix/store"
    assert cache_store_dir(b"StoreDir: /nix/store") == "/nix/store"
    assert (
        cache_store_dir(b"WantMassQuery: 1\nnonsense\n\xff\nStoreDir: /gnu/store\nPriority: 40")
        == "/gnu/store"
    )
    assert cache_store_dir(b"") == ""
    for bad in (b"StoreDir: /\x07\n", b"StoreDir: " + b"x" * 5000):
        with pytest.raises(FormatError):
            cache_store_dir(bad)


PRIVATE: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC: Final = base64.b64encode(PRIVATE.public_key().public_bytes_raw()).decode()


def signed(message: bytes, name: str) -> str:
    return f"{name}:{base64.b64encode(PRIVATE.sign(message)).decode()}"


def test_a_signature_counts_only_under_the_name_of_its_key() -> None:
    keys = PublicKeys([parse_public_key(f"mine-1:{PUBLIC}")])
    assert "mine-1" in keys
    assert keys.signer(b"m", [signed(b"m", "mine-1")]) == "mine-1"
    assert keys.signer(b"m", [signed(b"m", "other-1")]) is None
    assert keys.signer(b"n", [signed(b"m", "mine-1")]) is None
    assert keys.signer(b"m", []) is None


def test_one_good_signature_among_bad_ones_suffices() -> None:
    keys = PublicKeys([parse_public_key(f"mine-1:{PUBLIC}")])
    bad = ["mine-1:", "mine-1:AAAA", "mine-1:?", "mine-1", ":", "", "x:y:z", "mine-1:" + "A" * 86 + "=="]
    assert keys.signer(b"m", bad) is None
    assert keys.signer(b"m", [*bad, signed(b"m", "mine-1")]) == "mine-1"


def test_two_keys_may_have_one_name() -> None:
    """As while a key is replaced by another under the old name."""
    other = f"mine-1:{base64.b64encode(bytes(32)).decode()}"
    for texts in ([other, f"mine-1:{PUBLIC}"], [f"mine-1:{PUBLIC}", other]):
        keys = PublicKeys(parse_public_key(text) for text in texts)
        assert keys.signer(b"m", [signed(b"m", "mine-1")]) == "mine-1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mine-1",
        "mine-1:",
        f":{PUBLIC}",
        f"my key:{PUBLIC}",
        f"mine-1:{PUBLIC}x",
        "mine-1:AAAA",
        f"a:b:{PUBLIC}",
    ],
)
def test_what_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="not a public key"):
        parse_public_key(text)


def test_a_secret_key_is_refused_and_not_shown() -> None:
    secret = base64.b64encode(bytes(range(64))).decode()
    with pytest.raises(FormatError, match="secret") as raised:
        parse_public_key(f"mine-1:{secret}")
    assert secret[:10] not in str(raised.value)


# --- content addresses


@pytest.mark.parametrize("path", [path for path in PATHS if PATHS[path]["nix"]["ca"]])
def test_a_content_address_of_nix_leads_to_its_path(path: str) -> None:
    info = parse(PATHS[path]["narinfo"].encode(), STORE)
    own = info.path.base_name in info.references
    others = [name for name in info.references if name != info.path.base_name]
    ca = parse_content_address(info.ca)
    assert path_of(ca, info.path.name, others, own, STORE) == info.path
    assert path_of(ca, info.path.name, others, own, "/other/store") != info.path
    assert path_of(ca, info.path.name + "x", others, own, STORE) != parse_store_path(path + "x")


def test_the_vectors_have_every_kind_of_content_address() -> None:
    found = {info["nix"]["ca"].rpartition(":sha256:")[0] for info in PATHS.values() if info["nix"]["ca"]}
    assert found == {"text", "fixed", "fixed:r"}
    assert any(path in info["nix"]["references"] and info["nix"]["ca"] for path, info in PATHS.items())


def file_nar(data: bytes, executable: bool = False) -> bytes:
    return nar.HEADER + nar.write_file_head(len(data), executable) + data + nar.write_file_tail(len(data))


def holds(ca: str, data: bytes, step: int) -> bool:
    proof = ContentProof(parse_content_address(ca))
    for i in range(0, len(data), step):
        proof.update(data[i : i + step])
    return proof.holds()


def test_what_stands_behind_a_file_is_not_kept() -> None:
    """However small the pieces are that it comes in."""
    ca = f"fixed:sha256:{hashlib.sha256(b'x').hexdigest()}"
    proof = ContentProof(parse_content_address(ca))
    proof.update(file_nar(b"x"))
    for _ in range(100):
        proof.update(b"y" * 64)
    assert len(proof._held) <= 64
    assert not proof.holds()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
@pytest.mark.parametrize("step", [1, 7, 96, 10_000])
def test_contents_are_held_against_their_content_address(size: int, step: int) -> None:
    data = b"x" * size
    of_file, of_nar = hashlib.sha256(data).digest(), hashlib.sha512(file_nar(data)).digest()
    assert holds(f"text:sha256:{nix32_encode(of_file)}", file_nar(data), step)
    assert holds(f"fixed:sha256:{of_file.hex()}", file_nar(data), step)
    assert holds(f"fixed:r:sha512:{base64.b64encode(of_nar).decode()}", file_nar(data), step)
    for ca in (f"text:sha256:{of_file.hex()}", f"fixed:r:sha512:{of_nar.hex()}"):
        assert not holds(ca, file_nar(data + b"y"), step)
        assert not holds(ca, file_nar(data, executable=True), step)
        assert not holds(ca, file_nar(data) + bytes(8), step)
        assert not holds(ca, file_nar(data)[:-1], step)
        assert not holds(ca, nar.HEADER + nar.write_symlink(b"x"), step)
        assert not holds(ca, b"", step)


def test_only_what_can_be_checked_proves() -> None:
    cases = {"fixed:r:sha256": True, "fixed:sha512": True, "text:sha256": True}
    cases |= {"fixed:r:sha1": False, "fixed:md5": False, "fixed:git:sha256": False}
    for kind, proves in cases.items():
        size = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}[kind.rpartition(":")[2]]
        ca = parse_content_address(f"{kind}:{bytes(size).hex()}")
        assert ca.proves(own=False) == proves
        assert not ca.proves(own=True), "with its own path's hash taken out, others have the same hash"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "text",
        "text:sha256:",
        f"text:sha1:{'0' * 40}",
        f"text:r:sha256:{'0' * 64}",
        f"fixed::sha256:{'0' * 64}",
        f"fixed:x:sha256:{'0' * 64}",
        f"fixed:r:r:sha256:{'0' * 64}",
        f"fixed:r:sha256:{'0' * 63}",
        f"fixed:sha3:{'0' * 64}",
        f"other:sha256:{'0' * 64}",
    ],
)
def test_what_is_no_content_address_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="content address"):
        parse_content_address(text)


def test_kinds_without_references_have_none() -> None:
    flat, text = (parse_content_address(f"{kind}:sha256:{'0' * 64}") for kind in ("fixed", "text"))
    with pytest.raises(FormatError):
        path_of(flat, "a", ["1r7cmdf0mdlywby8h14bhw0iyb8601dg-a"], False, STORE)
    with pytest.raises(FormatError):
        path_of(flat, "a", [], True, STORE)
    with pytest.raises(FormatError):
        path_of(text, "a", [], True, STORE)
