"""Requests and answers as Nix's own clients and daemons write them, byte for byte."""

from __future__ import annotations

import pytest

from cidfs.errors import RemoteRefused
from cidfs.nix import requests as r
from cidfs.nix.client import Client
from cidfs.nix.protocol import Server

from .support import HASH_PART, LAST, MINORS, PATH, VERSION, connected, greeted, t, taken, u

FEATURE = "realisation-with-path-not-hash"
HASHED = "sha256:15e3c560894cbb27085cf65b5a2ecb18488c999497f4531b6907a7581ce6d527!baz"
SIGNATURES = ("asdf:" + "A" * 86 + "==", "qwer:" + "A" * 86 + "==")


def test_the_handshake_of_nix_2_35() -> None:
    server = Server(VERSION)
    server.feed(u(0x6E697863, 0x126, 3) + t("delete-dead-specific-referrers", FEATURE, "submit-output"))
    assert server.next() is None
    assert server.output() == u(0x6478696F, 0x126, 1) + t(FEATURE)
    assert not server.handshaken
    assert not server.idle
    server.feed(u(0, 0))
    assert server.next() is None
    assert server.output() == t(VERSION) + u(2, LAST)
    assert server.handshaken
    assert server.idle
    assert server.minor == 38
    assert server.features == {FEATURE}


def test_the_handshake_of_nix_2_34_and_2_26_names_no_features() -> None:
    server = Server(VERSION)
    server.feed(u(0x6E697863, 0x126, 0, 0, 0))
    assert server.next() is None
    assert server.output() == u(0x6478696F, 0x126, 1) + t(FEATURE) + t(VERSION) + u(2, LAST)
    assert server.features == frozenset()


def test_the_handshake_of_nix_2_3_waits_at_each_step_and_names_a_cpu() -> None:
    server = Server(VERSION)
    server.feed(u(0x6E697863))
    assert server.next() is None
    assert server.output() == u(0x6478696F, 0x126)
    server.feed(u(0x115, 1, 7, 0))
    assert server.next() is None
    assert server.output() == u(LAST)
    assert (server.handshaken, server.minor) == (True, 21)


@pytest.mark.parametrize(("version", "minor"), [(0x127, 38), (0x1FF, 38), (0x201, 38), (0x11E, 30)])
def test_the_older_protocol_of_both_is_spoken(version: int, minor: int) -> None:
    server = Server(VERSION)
    server.feed(u(0x6E697863, version))
    assert server.next() is None
    assert server.minor == minor


@pytest.mark.parametrize("minor", MINORS)
def test_both_ends_agree_on_what_they_speak(minor: int) -> None:
    server, client = connected(minor)
    assert server.minor == client.minor == minor
    assert server.features == client.features == ({FEATURE} if minor >= 38 else frozenset())
    assert client.version == (VERSION if minor >= 33 else "")
    assert client.trusted is (False if minor >= 35 else None)


ONE_TEXT = [
    (1, r.IsValidPath),
    (6, r.QueryReferrers),
    (10, r.Acknowledge),
    (11, r.Acknowledge),
    (12, r.Acknowledge),
    (22, r.QueryDerivationOutputs),
    (26, r.QueryPathInfo),
    (28, r.QueryDerivationOutputNames),
    (29, r.QueryPathFromHashPart),
    (33, r.QueryValidDerivers),
    (38, r.NarFromPath),
    (41, r.QueryDerivationOutputMap),
    (43, r.QueryRealisation),
]


@pytest.mark.parametrize(("number", "kind"), ONE_TEXT)
def test_requests_of_one_text(number: int, kind: type) -> None:
    for text in (PATH, "", "8 bytes.", "é"):
        assert taken(greeted(), u(number) + t(text)) == kind(text)


MORE = [
    ("a list", 38, u(31, 2) + t(PATH, PATH + "o") + u(1), r.QueryValidPaths((PATH, PATH + "o"))),
    ("a list before 1.27", 26, u(31, 1) + t(PATH), r.QueryValidPaths((PATH,))),
    ("settings", 38, u(19, *range(12), 1) + t("cores", b"\xff"), r.SetOptions()),
    ("all", 38, u(23), r.QueryAllValidPaths()),
    ("a wait", 38, u(13), r.Acknowledge("")),
    ("a link that is not UTF-8", 38, u(12) + t(b"/r\xe9"), r.Acknowledge("/r\udce9")),
    ("roots", 38, u(14), r.FindRoots()),
    ("missing", 38, u(40, 1) + t(PATH + "!out"), r.QueryMissing((PATH + "!out",))),
    ("substitutable", 38, u(21) + t(PATH), r.QuerySubstitutable()),
    ("more substitutable", 38, u(32, 1) + t(PATH), r.QuerySubstitutable()),
    ("substitutable with CA", 38, u(30, 2) + t(PATH, "", PATH, "fixed:"), r.QuerySubstitutable()),
    ("substitutable before 1.22", 21, u(30, 2) + t(PATH, PATH), r.QuerySubstitutable()),
    ("a build", 38, u(9, 1) + t(PATH) + u(0), r.BuildPaths((PATH,), False)),
    ("a build with results", 38, u(46, 1) + t(PATH) + u(0), r.BuildPaths((PATH,), True)),
]


@pytest.mark.parametrize(("minor", "data", "request_"), [m[1:] for m in MORE], ids=[m[0] for m in MORE])
def test_other_requests(minor: int, data: bytes, request_: r.Request) -> None:
    server = greeted(minor)
    assert taken(server, data) == request_
    assert server.idle
    assert taken(server, u(23)) == r.QueryAllValidPaths()


def test_a_realisation_by_derivation_and_output() -> None:
    asked = u(43) + t(PATH + ".drv", "baz")
    assert taken(greeted(features=[FEATURE]), asked) == r.QueryRealisation(f"{HASH_PART}-foo.drv!baz")


REFUSED = [
    (7, "AddToStore"),
    (9, "BuildPaths"),
    (20, "CollectGarbage"),
    (35, "VerifyStore"),
    (36, "BuildDerivation"),
    (44, "AddMultipleToStore"),
    (46, "BuildPathsWithResults"),
    (3, "operation 3"),
    (1 << 63, f"operation {1 << 63}"),
]


@pytest.mark.parametrize(("number", "name"), REFUSED)
def test_what_is_refused_is_not_read_on(number: int, name: str) -> None:
    server = greeted()
    server.feed(u(number, 0, 2) + u(1) + t(PATH))  # as a build: no targets, to be checked
    assert server.next() == r.Refused(name)
    server.feed(u(1) + t(PATH))
    assert server.next() is None
    assert not server.idle


def test_answers_of_one_number() -> None:
    server = greeted()
    assert server.done() == server.boolean(True) == u(LAST, 1)
    assert server.boolean(False) == server.path_info(None) == server.no_roots() == u(LAST, 0)
    assert server.nothing_substitutable(r.QuerySubstitutable()) == u(LAST, 0)
    assert server.options_taken() == server.nar_begins() == u(LAST)


def test_answers_with_paths() -> None:
    server = greeted()
    assert server.maybe_path("") == u(LAST, 0)
    assert server.maybe_path(PATH) == u(LAST) + t(PATH)
    assert server.paths(iter([PATH, "x"])) == u(LAST, 2) + t(PATH, "x")
    assert server.output_map({"out": PATH, "dev": ""}) == u(LAST, 2) + t("out", PATH, "dev", "")
    assert server.missing(unknown=[PATH]) == u(LAST, 0, 0, 1) + t(PATH) + u(0, 0)
    many = [f"{PATH}-{i}" for i in range(2500)]
    assert b"".join(server.path_pieces(many)) == u(LAST, 2500) + t(*many)
    assert all(len(piece) < 100_000 for piece in server.path_pieces(many))


def test_a_path_info_never_says_that_it_was_built_here() -> None:
    info = r.PathInfo(
        deriver=PATH + ".drv",
        nar_hash=bytes(range(32)),
        references=(PATH,),
        registration_time=23423,
        nar_size=34878,
        signatures=SIGNATURES,
        ca="text:sha256:x",
    )
    said = t(PATH + ".drv", bytes(range(32)).hex()) + u(1) + t(PATH) + u(23423, 34878, 0, 2)
    assert greeted().path_info(info) == u(LAST, 1) + said + t(*SIGNATURES, "text:sha256:x")


def test_realisations_in_each_protocol() -> None:
    found = [r.RealisationInfo(id=HASHED, out_path=f"{HASH_PART}-foo", signatures=SIGNATURES[:1])]
    shown = (
        f'{{"dependentRealisations":{{}},"id":"{HASHED}","outPath":"{HASH_PART}-foo",'
        f'"signatures":["{SIGNATURES[0]}"]}}'
    )
    assert greeted(38).realisations(found) == u(LAST, 1) + t(shown)
    assert greeted(30).realisations(found) == u(LAST, 1) + t(PATH)
    assert greeted(38).realisations([]) == u(LAST, 0)
    structured = greeted(features=[FEATURE])
    assert structured.realisations(found) == u(LAST, 1) + t(PATH) + u(1) + t(SIGNATURES[0])
    assert structured.realisations([]) == u(LAST, 0)


@pytest.mark.parametrize(
    ("minor", "rest"), [(26, b""), (28, u(0)), (29, u(0, 0, 0, 0, 0)), (37, u(0, 0, 0, 0, 0, 0, 0))]
)
def test_a_build_of_what_is_there(minor: int, rest: bytes) -> None:
    server = greeted(minor)
    answer = server.already_valid(r.BuildPaths((PATH, "x"), True))
    assert answer == u(LAST, 2) + b"".join(t(path) + u(2) + t("") + rest for path in (PATH, "x"))
    assert server.already_valid(r.BuildPaths((PATH,), False)) == u(LAST, 1)


def test_errors_before_and_since_1_26() -> None:
    assert greeted(25).error("no\udce9") == u(0x63787470) + t(b"no\xe9") + u(1)
    assert greeted(26).error("no") == u(0x63787470) + t("Error") + u(0) + t("Error", "no") + u(0, 0)


def test_a_client_passes_over_what_a_daemon_says_before_an_answer() -> None:
    _, client = connected()
    client.ask(r.IsValidPath(PATH))
    client.feed(u(0x6F6C6D67) + t(b"warning: \xff"))
    client.feed(u(0x53545254, 9, 3, 104) + t("building") + u(2, 1) + t(PATH) + u(0, 5) + u(0))
    client.feed(u(0x52534C54, 9, 101, 1, 0, 7) + u(0x53544F50, 9) + u(LAST, 1))
    answer = client.next()
    assert answer is not None
    assert answer.value is True


def test_a_client_says_what_it_was_refused_for_in_one_line() -> None:
    _, client = connected()
    client.ask(r.IsValidPath(PATH))
    said = t("Error") + u(0) + t("Error", "\x1b[31;1merror:\x1b[0m\n  no \x07such")
    client.feed(u(0x63787470) + said + u(0, 1, 0) + t("while asking") + u(LAST, 1))
    with pytest.raises(RemoteRefused, match=r"^error: no \?such$"):
        client.next()
    client.ask(r.IsValidPath(PATH))
    answer = client.next()
    assert answer is not None
    assert answer.value is True


def test_a_client_greets_as_nix_does() -> None:
    client = Client()
    assert client.greeting() == u(0x6E697863, 0x126)
    client.feed(u(0x6478696F, 0x126))
    assert client.next() is None
    assert client.output() == u(1) + t(FEATURE) + u(0, 0)
