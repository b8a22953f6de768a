"""Import from a binary cache: whom it trusts, in which order paths come, and what a hostile one can do."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from cidfs.engine.caches import AT_ONCE, CacheSource, Trust, gather, gather_all
from cidfs.engine.ingest import ingest
from cidfs.engine.sources import NarSource, Tree
from cidfs.engine.wanted import Wanted
from cidfs.errors import CidfsError, FormatError, HashMismatch, NotTrusted, PathAbsent, exit_code
from cidfs.formats import nar
from cidfs.formats.content_address import ContentAddress, path_of
from cidfs.formats.digest import nix32_encode
from cidfs.formats.narinfo import NarInfo, render
from cidfs.formats.signing import PublicKeys, parse_public_key
from cidfs.formats.store_path import StorePath, fixed_output_path
from cidfs.local.publish import Published
from cidfs.local.store import LocalStore
from cidfs.remote.upstream import open_upstream
from tests.commands import Store
from tests.engine.support import TREE, Pieces, nar_of, sha256, stored_nar
from tests.remote.support import KEY, OTHER_KEY, PACK, STORE, Cache, path_for

NAR = nar_of(TREE)
TRUST = Trust(PublicKeys([parse_public_key(KEY.public)]))
NOBODY = Trust(PublicKeys())
ANYONE = Trust(PublicKeys(), required=False)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty binary cache."""
    return Cache(tmp_path / "cache")


async def wanted(
    cache: Cache, store: LocalStore, *asked: StorePath, trust: Trust = TRUST, closure: bool = True
) -> list[Wanted]:
    return await gather(await open_upstream(cache.url, STORE), asked, store, trust, closure=closure)


async def bring(
    cache: Cache, root: Path, *asked: StorePath, trust: Trust = TRUST, closure: bool = True
) -> list[Published]:
    with LocalStore.open(root, write=True) as store:
        return await ingest(store, await wanted(cache, store, *asked, trust=trust, closure=closure))


def published(root: Path) -> set[str]:
    with LocalStore.open(root) as store:
        return {item.path.name for item in store.paths()}


def small(name: str) -> bytes:
    """Return the NAR of a small file."""
    return nar_of(name.encode())


@pytest.mark.parametrize("compression", PACK)
async def test_what_a_cache_has_is_published(cache: Cache, root: Path, compression: str) -> None:
    a = cache.add("a", NAR, path_for("a"), compression=compression)
    b = cache.add("b", small("b"), a.path, deriver="1r7cmdf0mdlywby8h14bhw0iyb8601dg-b.drv")
    outcomes = await bring(cache, root, b.path)
    assert [outcome.path for outcome in outcomes] == [a.path, b.path]
    with LocalStore.open(root) as store:
        assert stored_nar(store, a.path) == NAR
        record = store.record_of(b.path.hash_part)
        assert record is not None
        assert record.references == (a.path.base_name,)
        assert (record.deriver, record.signatures) == (b.deriver, b.signatures)
        assert (record.nar_hash, record.nar_size) == (b.nar_hash, b.nar_size)
        row = store.find_path(b.path)
        assert row is not None
        assert row.whole


async def test_without_the_closure_a_path_comes_alone(cache: Cache, root: Path) -> None:
    b = cache.add("b", NAR, cache.add("a", NAR).path)
    assert [o.path for o in await bring(cache, root, b.path, closure=False)] == [b.path]


async def test_a_path_that_the_cache_lacks_is_named(cache: Cache, root: Path) -> None:
    cache.add("b", NAR, path_for("a"))
    with pytest.raises(PathAbsent, match=rf"/nix/store/{path_for('c')}: not in file://"):
        await bring(cache, root, path_for("c"))
    with pytest.raises(PathAbsent, match=rf"{path_for('a')}: not in .*, and {path_for('b')} refers to it"):
        await bring(cache, root, path_for("b"))
    assert published(root) == set()


async def test_a_reference_that_is_published_here_need_not_be_in_the_cache(cache: Cache, root: Path) -> None:
    a = cache.add("a", NAR).path
    await bring(cache, root, a)
    b = cache.add("b", NAR, a).path
    cache.narinfo(a).unlink()
    assert [o.path for o in await bring(cache, root, b)] == [b]
    with pytest.raises(PathAbsent):
        await bring(cache, root, a)


async def test_references_stand_before_referrers_whatever_the_order(cache: Cache, root: Path) -> None:
    """A few hundred paths with references at random, to themselves too; all of them, or some."""
    choice = random.Random(7)
    paths = [path_for(f"p{i}") for i in range(300)]
    for i, path in enumerate(paths):
        below = [paths[choice.randrange(i)] for _ in range(min(i, 5))]
        cache.add(path, small(path.name), *below, *([path] if i % 3 == 0 else []))
    upstream = await open_upstream(cache.url, STORE)
    with LocalStore.open(root) as store:
        for items in (
            await gather_all(upstream, store, TRUST, on_failed=_raise),
            await gather(upstream, paths[-20:], store, TRUST, closure=True),
            await gather(upstream, list(reversed(paths)), store, TRUST, closure=False),
        ):
            place = {item.path.base_name: i for i, item in enumerate(items) if item.path}
            assert len(place) == len(items)
            for item in items:
                assert item.path is not None
                for name in item.references:
                    assert name == item.path.base_name or place[name] < place[item.path.base_name]
        assert len(items) == 300


def _raise(error: CidfsError) -> None:
    raise error


async def test_paths_that_refer_to_each_other_come_all_the_same(cache: Cache, root: Path) -> None:
    ring = [path_for(f"ring-{i}") for i in range(5)]
    for i, path in enumerate(ring):
        cache.add(path, small(path.name), ring[(i + 1) % 5], path)
    assert {o.path for o in await bring(cache, root, ring[2])} == set(ring)


async def test_a_closure_of_ten_thousands_is_read_once(
    cache: Cache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deeper than any stack of calls, and each narinfo is asked for once, however many refer to its path."""
    paths = [path_for(f"p{i}") for i in range(100_000 if Store.long else 10_000)]
    for i, path in enumerate(paths):
        names = sorted({paths[i - back].base_name for back in (1, 2, 3, 50) if i >= back})
        info = NarInfo(
            path=path, url="x", compression="none", nar_hash=bytes(32), nar_size=1, references=tuple(names)
        )
        cache.narinfo(path).write_bytes(render(info, STORE))
    left: list[int] = []
    upstream = await open_upstream(cache.url, STORE)
    asked: list[StorePath] = []
    inner = upstream.info

    async def counted(path: StorePath) -> NarInfo | None:
        asked.append(path)
        return await inner(path)

    monkeypatch.setattr(upstream, "info", counted)
    with LocalStore.open(root) as store:
        items = await gather(upstream, paths[-1:], store, ANYONE, closure=True, on_left=left.append)
    assert [item.path for item in items] == paths
    assert (len(asked), left[-1]) == (len(paths), 0)


async def test_narinfos_are_read_several_at_a_time_and_not_all_at_once(
    cache: Cache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [cache.add(f"p{i}", small("x")).path for i in range(100)]
    upstream = await open_upstream(cache.url, STORE)
    now, most = 0, 0
    inner = upstream.info

    async def counted(path: StorePath) -> object:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            return await inner(path)
        finally:
            now -= 1

    monkeypatch.setattr(upstream, "info", counted)
    with LocalStore.open(root) as store:
        await gather(upstream, paths, store, TRUST, closure=True)
    assert most == AT_ONCE


# --- trust


@pytest.mark.parametrize("trust", [TRUST, NOBODY], ids=["one key", "no key"])
async def test_what_no_trusted_key_signed_is_refused(cache: Cache, root: Path, trust: Trust) -> None:
    a = cache.add("a", NAR, keys=()).path
    b = cache.add("b", NAR, keys=(OTHER_KEY,)).path
    for path, why in ((a, "it has no signature"), (b, "signed by other-1, and not by a trusted key")):
        with pytest.raises(NotTrusted, match=rf"^{path}: {why}; .*--trusted-key .*--no-check-sigs") as raised:
            await bring(cache, root, path, trust=trust)
        assert exit_code(raised.value) == 8
        assert "\n" not in str(raised.value)
    assert published(root) == set()


async def test_an_unsigned_reference_keeps_everything_out(cache: Cache, root: Path) -> None:
    """Nothing is read or published before the whole closure is known to be trusted."""
    good = cache.add("good", NAR)
    a = cache.add("a", NAR, keys=()).path
    b = cache.add("b", NAR, a, good.path).path
    (cache.folder / good.url).unlink()
    with pytest.raises(NotTrusted, match=rf"^{a}"):
        await bring(cache, root, b)
    assert published(root) == set()


async def test_no_signature_is_asked_for_when_told_so(cache: Cache, root: Path) -> None:
    a = cache.add("a", NAR, keys=())
    await bring(cache, root, a.path, trust=ANYONE)
    assert published(root) == {"a"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("NarSize: ", "NarSize: 1"),
        ("References: ", f"References: {path_for('b')} "),
        ("NarHash: sha256:", "NarHash: sha256:0"),
        ("Sig: cache-1:", "Sig: other-1:"),
    ],
    ids=["size", "references", "hash", "key"],
)
async def test_what_was_changed_after_signing_is_refused(
    cache: Cache, root: Path, old: str, new: str
) -> None:
    a = cache.add("a", NAR).path
    if new.endswith("sha256:0"):
        text = cache.narinfo(a).read_text()
        hash_text = text.partition("NarHash: sha256:")[2][:52]
        old, new = hash_text, hash_text[:-1] + ("1" if hash_text[-1] == "0" else "0")
    cache.edit(a, old, new)
    with pytest.raises(NotTrusted):
        await bring(cache, root, a, closure=False)
    assert published(root) == set()


async def test_a_wrong_signature_of_a_trusted_key_is_told_apart(cache: Cache, root: Path) -> None:
    a = cache.add("a", NAR, signatures=(f"cache-1:{'A' * 86}==",)).path
    with pytest.raises(NotTrusted, match="its signature by cache-1 is not one of the trusted key"):
        await bring(cache, root, a)


async def test_many_signatures_are_not_all_named(cache: Cache, root: Path) -> None:
    a = cache.add("a", NAR, signatures=tuple(sorted(f"key-{i:03}:AAAA" for i in range(500)))).path
    with pytest.raises(NotTrusted, match=r"signed by key-000, .*…") as raised:
        await bring(cache, root, a)
    assert len(str(raised.value)) < 500


async def test_one_signature_of_several_suffices_and_all_are_kept(cache: Cache, root: Path) -> None:
    a = cache.add("a", NAR, keys=(OTHER_KEY, KEY))
    await bring(cache, root, a.path)
    with LocalStore.open(root) as store:
        record = store.record_of(a.path.hash_part)
    assert record is not None
    assert record.signatures == a.signatures
    assert len(a.signatures) == 2


async def test_what_is_here_already_needs_no_signature_and_is_not_read(cache: Cache, root: Path) -> None:
    a = cache.add("a", NAR)
    await bring(cache, root, a.path)
    again = cache.add("a", NAR, keys=(), deriver="1r7cmdf0mdlywby8h14bhw0iyb8601dg-evil.drv")
    (cache.folder / again.url).unlink()
    (outcome,) = await bring(cache, root, a.path)
    assert (outcome.new, outcome.conflict) == (False, "")
    with LocalStore.open(root) as store:
        record = store.record_of(a.path.hash_part)
    assert record is not None
    assert (record.deriver, record.signatures) == ("", a.signatures), "nothing unsigned is taken over"


async def test_other_contents_of_a_published_path_need_a_signature(cache: Cache, root: Path) -> None:
    a = cache.add("a", NAR).path
    await bring(cache, root, a)
    cache.add("a", small("other"), keys=())
    with pytest.raises(NotTrusted):
        await bring(cache, root, a)
    cache.add("a", small("other"))
    (outcome,) = await bring(cache, root, a)
    assert outcome.conflict, "signed or not: the first one stays"


# --- content addresses


def file_of(name: str, data: bytes, *references: StorePath) -> tuple[StorePath, str, bytes]:
    """Return path, content address and NAR of a text."""
    digest = hashlib.sha256(data).digest()
    path = path_of(
        ContentAddress("text", "sha256", digest), name, [r.base_name for r in references], False, STORE
    )
    return path, f"text:sha256:{nix32_encode(digest)}", nar_of(data)


async def test_a_content_address_that_is_right_needs_no_signature(cache: Cache, root: Path) -> None:
    tree = fixed_output_path(sha256(NAR), "tree")
    cache.add(tree, NAR, keys=(), ca=f"fixed:r:sha256:{nix32_encode(sha256(NAR))}")
    text, ca, data = file_of("text", b"see the tree", tree)
    cache.add(text, data, tree, keys=(), ca=ca, compression="xz")
    digest = hashlib.sha512(b"flat").digest()
    flat = path_of(ContentAddress("flat", "sha512", digest), "flat", [], False, STORE)
    cache.add(flat, nar_of(b"flat"), keys=(), ca=f"fixed:sha512:{digest.hex()}")
    outcomes = await bring(cache, root, text, flat, trust=NOBODY)
    assert [o.path for o in outcomes] == [tree, text, flat]
    with LocalStore.open(root) as store:
        record = store.record_of(text.hash_part)
    assert record is not None
    assert record.ca == ca


async def test_contents_of_another_content_address_are_refused(cache: Cache, root: Path) -> None:
    text, ca, _ = file_of("text", b"good")
    cache.add(text, nar_of(b"evil"), keys=(), ca=ca)
    with pytest.raises(HashMismatch, match=rf"{text} .*does not have the content address {ca}"):
        await bring(cache, root, text, trust=NOBODY)
    cache.add(text, nar_of(("x", b"good")), keys=(), ca=ca)  # an executable is another thing
    with pytest.raises(HashMismatch):
        await bring(cache, root, text, trust=NOBODY)
    tree = fixed_output_path(sha256(NAR), "tree")
    cache.add(tree, small("evil"), keys=(), ca=f"fixed:r:sha256:{nix32_encode(sha256(NAR))}")
    with pytest.raises(HashMismatch, match=rf"^{tree}: its narinfo says the NAR hash"):
        await bring(cache, root, tree, trust=NOBODY)
    cache.add(tree, small("evil"), ca=f"fixed:r:sha256:{nix32_encode(sha256(NAR))}")
    with pytest.raises(HashMismatch):
        await bring(cache, root, tree, trust=TRUST)
    assert published(root) == set()


async def test_a_content_address_of_another_path_proves_nothing(cache: Cache, root: Path) -> None:
    _, ca, data = file_of("text", b"good")
    other = cache.add("other", data, keys=(), ca=ca).path
    with pytest.raises(NotTrusted):
        await bring(cache, root, other, trust=TRUST)
    cache.add("other", data, ca=ca)
    await bring(cache, root, other)
    with LocalStore.open(root) as store:
        record = store.record_of(other.hash_part)
    assert record is not None
    assert record.ca == "", "it is not this path's"


async def test_a_content_address_with_other_references_proves_nothing(cache: Cache, root: Path) -> None:
    text, ca, data = file_of("text", b"good")
    cache.add(text, data, path_for("evil"), keys=(), ca=ca)
    with pytest.raises(NotTrusted):
        await bring(cache, root, text, closure=False)


async def test_what_refers_to_itself_needs_a_signature(cache: Cache, root: Path) -> None:
    """Its hash is taken with zeros for its own name, so other contents have the same."""
    ca = ContentAddress("nar", "sha256", bytes(32))
    path = path_of(ca, "own", [], True, STORE)
    text = f"fixed:r:sha256:{nix32_encode(bytes(32))}"
    cache.add(path, NAR, path, keys=(), ca=text)
    with pytest.raises(NotTrusted):
        await bring(cache, root, path)
    cache.add(path, NAR, path, ca=text)
    await bring(cache, root, path)
    with LocalStore.open(root) as store:
        record = store.record_of(path.hash_part)
    assert record is not None
    assert record.ca == text


@pytest.mark.parametrize("ca", ["nonsense", "fixed:r:sha3:00", "text:sha256:"])
async def test_an_unknown_content_address_is_passed_over(cache: Cache, root: Path, ca: str) -> None:
    a = cache.add("a", NAR, ca=ca).path
    await bring(cache, root, a)
    assert published(root) == {"a"}


# --- bad contents


@pytest.mark.parametrize("compression", ["none", "xz"])
async def test_contents_with_another_nar_hash_publish_nothing(
    cache: Cache, root: Path, compression: str
) -> None:
    other = bytes(reversed(NAR[-1000:]))
    evil = nar_of({**TREE, b"zz": other}) if isinstance(TREE, dict) else NAR
    a = cache.add("a", evil, compression=compression, nar_hash=sha256(NAR)).path
    for trust in (TRUST, ANYONE):
        with pytest.raises(HashMismatch, match=rf"^{a}: .*nothing of it is published"):
            await bring(cache, root, a, trust=trust)
    assert published(root) == set()


@pytest.mark.parametrize("change", [-1, 1])
async def test_contents_of_another_size_publish_nothing(cache: Cache, root: Path, change: int) -> None:
    a = cache.add("a", NAR, nar_size=len(NAR) + change).path
    with pytest.raises(HashMismatch):
        await bring(cache, root, a)
    assert published(root) == set()


@pytest.mark.parametrize(
    "bad",
    [
        b"x" * 100,
        NAR[:-8],
        NAR + bytes(8),
        nar.HEADER + nar.write_directory() + nar.write_entry(b"..") + nar.write_symlink(b"/"),
        nar.HEADER + nar.write_file_head(1 << 62, False) + b"x" * 1000,
    ],
    ids=["junk", "cut", "longer", "dots", "endless"],
)
async def test_what_is_no_nar_publishes_nothing(cache: Cache, root: Path, bad: bytes) -> None:
    a = cache.add("a", bad, compression="zstd").path
    with pytest.raises(FormatError, match=rf"{a} \(file://"):
        await bring(cache, root, a)
    assert published(root) == set()


async def test_a_damaged_file_publishes_nothing_and_names_itself(cache: Cache, root: Path) -> None:
    a = cache.add("a", NAR, compression="xz", file_hash=None, file_size=None)
    packed = bytearray((cache.folder / a.url).read_bytes())
    packed[len(packed) // 2] ^= 1
    (cache.folder / a.url).write_bytes(packed)
    with pytest.raises((FormatError, HashMismatch), match=rf"{a.path}"):
        await bring(cache, root, a.path)
    assert published(root) == set()


async def test_everything_comes_but_what_is_bad(cache: Cache, root: Path) -> None:
    good = [cache.add(f"good-{i}", small(f"{i}")).path for i in range(5)]
    unsigned = cache.add("unsigned", NAR, keys=()).path
    no_narinfo = cache.add("nonsense", NAR).path
    cache.narinfo(no_narinfo).write_bytes(b"nonsense")
    bad_nar = cache.add("bad", b"x").path
    gone = cache.add("gone", NAR)
    (cache.folder / gone.url).unlink()
    referrer = cache.add("referrer", NAR, bad_nar, path_for("nowhere")).path
    failed: list[CidfsError] = []
    upstream = await open_upstream(cache.url, STORE)
    with LocalStore.open(root, write=True) as store:
        items = await gather_all(upstream, store, TRUST, on_failed=failed.append)
        assert len(failed) == 2
        outcomes = await ingest(store, items, on_failed=failed.append)
    assert {o.path for o in outcomes} == {*good, referrer}
    told = [str(error) for error in failed]
    for path in (unsigned, no_narinfo, bad_nar, gone.path):
        assert sum(path.hash_part in line for line in told) == 1, (path, told)
    assert len(told) == 4
    assert {exit_code(error) for error in failed} == {3, 7, 8}


async def test_a_source_for_those_who_know_what_they_want(cache: Cache) -> None:
    """As for a repair: the NAR of a path, compared with a hash that was known before."""
    a = cache.add("a", NAR, compression="br", keys=())
    upstream = await open_upstream(cache.url, STORE)
    info = await upstream.info(a.path)
    assert info is not None
    read, straight = Tree(), Tree()
    got = [bytes(chunk) for batch in CacheSource(upstream, info).read(read) for chunk in batch]
    same = NarSource(Pieces(NAR, 1 << 20), "x").read(straight)
    assert got == [bytes(chunk) for batch in same for chunk in batch]
    assert read.nar_hash == straight.nar_hash == info.nar_hash
