"""Client against server, over every protocol that is spoken, in whatever pieces the bytes come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidfs.errors import RemoteRefused
from cidfs.nix import requests as r
from cidfs.nix.client import Client
from cidfs.nix.protocol import Server
from cidfs.nix.wire import MAX_TEXT
from tests.formats.support import examples, pieces_of

from .support import MINORS, connected

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
NAME = st.text("abcXYZ019+-._?=", min_size=1, max_size=40)
OUTPUT = st.text("abcdefgh", min_size=1, max_size=8)
TEXTS = st.lists(TEXT, max_size=8).map(tuple)
NUMBER = st.integers(0, (1 << 64) - 1)
CUTS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
OF_ONE_TEXT = (
    r.IsValidPath,
    r.QueryPathInfo,
    r.QueryReferrers,
    r.QueryValidDerivers,
    r.QueryDerivationOutputMap,
    r.QueryDerivationOutputs,
    r.QueryDerivationOutputNames,
    r.QueryPathFromHashPart,
    r.NarFromPath,
    r.Acknowledge,
)
REALISATION = st.builds("{}!{}".format, NAME, OUTPUT)
REQUEST = st.one_of(
    *(st.builds(kind, TEXT) for kind in OF_ONE_TEXT),
    st.builds(r.QueryRealisation, REALISATION),
    st.builds(r.QueryValidPaths, TEXTS),
    st.builds(r.QueryMissing, TEXTS),
    st.builds(r.BuildPaths, TEXTS, st.booleans()),
    st.just(r.QueryAllValidPaths()),
    st.just(r.QuerySubstitutable()),
    st.just(r.FindRoots()),
    st.just(r.SetOptions()),
)
PATH_INFO = st.builds(
    r.PathInfo,
    deriver=TEXT,
    nar_hash=st.binary(min_size=32, max_size=32),
    references=TEXTS,
    registration_time=NUMBER,
    nar_size=NUMBER,
    signatures=TEXTS,
    ca=TEXT,
)
PROTOCOL = st.tuples(st.sampled_from(MINORS), st.sampled_from([frozenset[str](), r.FEATURES]))


@given(PROTOCOL, st.lists(REQUEST, max_size=6), CUTS)
@examples(100)
def test_requests(protocol: tuple[int, frozenset[str]], requests: list[r.Request], cuts: list[int]) -> None:
    server, client = connected(*protocol)
    came = []
    for piece in pieces_of(b"".join(client.ask(request) for request in requests), cuts):
        server.feed(piece)
        while (request := server.next()) is not None:
            came.append(request)
    assert came == requests
    assert server.idle
    assert server.output() == b""


Answer = tuple[r.Request, Callable[[Server], bytes], Any]


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    """Return a request, what answers it, and the value that is to arrive."""
    texts, info = draw(TEXTS), draw(st.none() | PATH_INFO)
    outputs = draw(st.dictionaries(TEXT, TEXT, max_size=4))
    build = r.BuildPaths(texts, draw(st.booleans()))
    built = dict.fromkeys(texts, 2) if build.with_results else True
    cases: list[Answer] = [
        (r.IsValidPath("x"), lambda s: s.boolean(info is None), info is None),
        (r.QueryPathInfo("x"), lambda s: s.path_info(info), info),
        (r.QueryReferrers("x"), lambda s: s.paths(texts), texts),
        (r.QueryAllValidPaths(), lambda s: b"".join(s.path_pieces(texts)), texts),
        (r.QueryPathFromHashPart("x"), lambda s: s.maybe_path("".join(texts)), "".join(texts)),
        (r.QueryDerivationOutputMap("x"), lambda s: s.output_map(outputs), outputs),
        (r.QueryMissing(()), lambda s: s.missing(texts, outputs), r.Missing(tuple(outputs), (), texts)),
        (build, lambda s: s.already_valid(build), built),
        (r.FindRoots(), lambda s: s.no_roots(), ()),
        (r.SetOptions(), lambda s: s.options_taken(), None),
        (r.Acknowledge("x"), lambda s: s.done(), True),
        (r.QuerySubstitutable(), lambda s: s.nothing_substitutable(r.QuerySubstitutable()), ()),
    ]
    return draw(st.sampled_from(cases))


def _arrive(client: Client, data: bytes, cuts: list[int]) -> list[Any]:
    found = []
    for piece in pieces_of(data, cuts):
        client.feed(piece)
        while (answer := client.next()) is not None:
            found.append(answer.value)
    return found


@given(PROTOCOL, st.lists(answers(), max_size=5), CUTS)
@examples(100)
def test_answers(protocol: tuple[int, frozenset[str]], expected: list[Answer], cuts: list[int]) -> None:
    server, client = connected(*protocol)
    for request, _, _ in expected:
        client.ask(request)
    data = b"".join(answer(server) for _, answer, _ in expected)
    assert _arrive(client, data, cuts) == [value for _, _, value in expected]


@given(PROTOCOL, REALISATION, NAME, TEXTS, st.dictionaries(REALISATION, NAME, max_size=3), CUTS)
@examples(60)
def test_realisations(
    protocol: tuple[int, frozenset[str]],
    name: str,
    out_path: str,
    signatures: tuple[str, ...],
    dependent: dict[str, str],
    cuts: list[int],
) -> None:
    """Older protocols leave out what they have no place for."""
    server, client = connected(*protocol)
    told = r.RealisationInfo(id=name, out_path=out_path, signatures=signatures, dependent=dependent)
    if server.features:
        expected = r.RealisationInfo(id=name, out_path=out_path, signatures=signatures)
    elif server.minor < 31:
        expected = r.RealisationInfo(id=name, out_path=out_path)
    else:
        expected = told
    for found, arrived in (([told], (expected,)), ([], ())):
        client.ask(r.QueryRealisation(name))
        assert _arrive(client, server.realisations(found), cuts) == [arrived]


@pytest.mark.parametrize("minor", MINORS)
def test_after_an_error_the_connection_goes_on(minor: int) -> None:
    server, client = connected(minor)
    server.feed(client.ask(r.BuildPaths(("x",), False)) + client.ask(r.IsValidPath("x")))
    assert server.next() == r.BuildPaths(("x",), False)
    client.feed(server.error("nothing is built here"))
    with pytest.raises(RemoteRefused, match="nothing is built here"):
        client.next()
    assert server.next() == r.IsValidPath("x")
    assert _arrive(client, server.boolean(True), [100]) == [True]


def test_what_follows_the_answer_to_a_nar_is_the_nar() -> None:
    server, client = connected()
    client.ask(r.NarFromPath("x"))
    assert _arrive(client, server.nar_begins() + b"nix", [100]) == [None]
    assert client.take() == b"nix"
    client.feed(b"-archive-1")
    assert client.take() == b"-archive-1"


def test_the_longest_list_and_text_that_are_taken() -> None:
    server, client = connected()
    server.feed(client.ask(r.QueryValidPaths(("",) * 1_000_000)))
    found = server.next()
    assert isinstance(found, r.QueryValidPaths)
    assert len(found.paths) == 1_000_000
    server.feed(client.ask(r.IsValidPath("x" * MAX_TEXT)))
    assert server.next() == r.IsValidPath("x" * MAX_TEXT)
