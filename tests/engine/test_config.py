"""Settings: which there are, what is refused, what beats what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cidfs import config
from cidfs.errors import UsageError


@pytest.fixture(autouse=True)
def no_system_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's file that is not there until a test writes it."""
    monkeypatch.setattr(config, "SYSTEM_CONFIG", tmp_path / "etc.toml")
    return tmp_path / "etc.toml"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults() -> None:
    settings = config.load(None, None)
    assert settings.store.store_dir == "/nix/store"
    assert settings.store.lock_timeout == 30.0
    assert settings.mount.list_root is False
    assert settings.mount.transport == "auto"
    assert settings.store.state == str(config.default_state())
    assert settings.trust.public_keys == (), "nobody is trusted unasked"
    assert settings.trust.require_signatures is True


def test_whom_to_trust(tmp_path: Path) -> None:
    text = '[trust]\npublic_keys = ["a-1:AA==", "b-1:BB=="]\nrequire_signatures = false\n'
    settings = config.load(write(tmp_path / "c.toml", text), None)
    assert settings.trust.public_keys == ("a-1:AA==", "b-1:BB==")
    assert settings.trust.require_signatures is False


def test_a_file(tmp_path: Path) -> None:
    text = '[store]\nstate = "/s"\nstore_dir = "/gnu/store"\nlock_timeout = 3\n[mount]\nlist_root = true\n'
    settings = config.load(write(tmp_path / "c.toml", text), None)
    assert (settings.store.state, settings.store.store_dir, settings.store.lock_timeout) == (
        "/s",
        "/gnu/store",
        3.0,
    )
    assert settings.mount.list_root is True


def test_what_beats_what(tmp_path: Path, no_system_config: Path) -> None:
    write(no_system_config, '[store]\nstate = "/of-system"\nlock_timeout = 1\n')
    assert config.load(None, None).store.state == "/of-system"
    mine = write(tmp_path / "mine.toml", '[store]\nstate = "/of-mine"\n')
    settings = config.load(mine, None)
    assert (settings.store.state, settings.store.lock_timeout) == ("/of-mine", 30.0), "one file counts"
    assert config.load(mine, Path("/of-flag")).store.state == "/of-flag"
    assert config.load(None, Path("relative")).store.state == str(Path.cwd() / "relative")


def test_the_state_folder_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert config.default_state() == tmp_path / "xdg" / "cidfs"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.default_state() == tmp_path / ".local/state/cidfs"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert config.default_state() == Path("/var/lib/cidfs")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[store]\nstat = 1\n", "stat"),
        ("[stores]\n", "stores"),
        ("top = 1\n", "top"),
        ("[mount]\nlist_root = 1\n", "list_root"),
        ('[mount]\ntransport = "carrier pigeon"\n', "transport"),
        ("[trust]\npublic_keys = 'a-1:AA=='\n", "public_keys"),
        ("[trust]\nrequire_signature = false\n", "require_signature"),
        ("[store\n", ""),
        ('[store]\nstate = "a"\nstate = "b"\n', ""),
        ("[store]\nlock_timeout = 'x'\n", "lock_timeout"),
        ('[store]\nstore_dir = "relative"\n', "store_dir"),
        ('[store]\nstore_dir = "/"\n', "store_dir"),
        ('[store]\nstore_dir = "/nix/store/"\n', "store_dir"),
        ('[store]\nstore_dir = "/nix/../store"\n', "store_dir"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path / "c.toml", text)
    with pytest.raises(UsageError) as raised:
        config.load(path, None)
    said = str(raised.value)
    assert named in said
    assert "\n" not in said
    if "store_dir" not in named:
        assert str(path) in said


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"[store]\nstate = '\xff'\n")
    with pytest.raises(UsageError, match=r"c\.toml"):
        config.load(tmp_path / "c.toml", None)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(UsageError, match=r"cannot be read"):
            config.load(path, None)
