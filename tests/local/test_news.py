"""News: what became whole, by whatever way, between two looks."""

from __future__ import annotations

from pathlib import Path

from cidfs.formats.store_path import StorePath
from cidfs.local.news import News
from cidfs.local.store import LocalStore
from tests.local.children import rebuild_it, run
from tests.local.support import package, path_of, publish


def name_of(name: str) -> bytes:
    """Return the name in the store directory of a path that the tests mean by a name."""
    return path_of(name).base_name.encode()


def look(news: News) -> set[bytes]:
    """Return the names of what is new, and count it as known."""
    fresh = news.look()
    if fresh is None:
        return set()
    assert not fresh.everything
    news.accept(fresh)
    assert len(set(fresh.names)) == len(fresh.names)
    return set(fresh.names)


def test_what_is_published_whole_is_new_once(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        news = News(store)
        assert look(news) == set()
        publish(store, package("a"), package("b", references=["a", "b"]))
        assert look(news) == {name_of("a"), name_of("b")}
        assert look(news) == set()
        publish(store, package("a"))  # there already
        assert look(news) == set()


def test_it_is_new_again_until_it_is_accepted(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        news = News(store)
        publish(store, package("a"))
        first = news.look()
        assert first is not None
        publish(store, package("b"))
        second = news.look()
        assert second is not None
        assert (set(first.names), set(second.names)) == ({name_of("a")}, {name_of("a"), name_of("b")})
        news.accept(first)
        assert news.serial == first.serial < second.serial
        assert look(news) == {name_of("b")}


def test_what_waited_for_a_reference_is_new_with_it(root: Path) -> None:
    """Also what refers to it only by way of others; what still lacks something is not."""
    with LocalStore.open(root, write=True) as store:
        publish(store, package("one", references=["leaf"]))
        publish(store, package("two", references=["one", "leaf"]))
        publish(store, package("three", references=["two", "other"]))
        news = News(store)
        publish(store, package("four", references=["three"]))
        assert look(news) == set()
        publish(store, package("leaf"))
        assert look(news) == {name_of(n) for n in ("leaf", "one", "two")}
        publish(store, package("other"))
        assert look(news) == {name_of(n) for n in ("other", "three", "four")}


def test_what_was_removed_and_added_again_is_new(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(store, package("leaf"), package("top", references=["leaf"]))
        news = News(store)
        gone: list[StorePath] = [path_of("leaf")]
        assert store.remove(gone, force=True) == []
        assert look(news) == set()
        publish(store, package("leaf"))
        assert look(news) == {name_of("leaf"), name_of("top")}


def test_behind_a_rebuild_anything_may_be_new(root: Path) -> None:
    with LocalStore.open(root, write=True) as store:
        publish(store, package("a"))
        news = News(store)
        run(rebuild_it, root)
        fresh = news.look()
        assert fresh is not None
        assert fresh.everything
        news.accept(fresh)
        publish(store, package("b"))
        assert look(news) == {name_of("b")}
