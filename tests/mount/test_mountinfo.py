"""What is mounted, and which overlays stand on a cidfs mount, as the kernel's lines say it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cidfs.mount.mountinfo import MountInfo, mounted_at, mounts, parse, resolve, source_of
from cidfs.mount.overlay import overlay_of, overlays_above

CIDFS = "50 1 0:50 / {} ro,nosuid,nodev,noatime - fuse.cidfs {} ro,user_id=0,allow_other"
OVERLAY = "60 1 0:60 / {} rw,relatime - overlay overlay rw,{}"


def lines(*texts: str) -> list[MountInfo]:
    return parse("".join(f"{text}\n" for text in texts))


def test_a_line_is_taken_apart() -> None:
    (info,) = lines("36 35 98:0 /mnt1 /mnt2 rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=continue")
    assert info == MountInfo(
        36, 35, "98:0", "/mnt1", "/mnt2", ("rw", "noatime"), "ext3", "/dev/root", ("rw", "errors=continue")
    )


def test_names_are_told_as_they_are() -> None:
    (info,) = lines(r"1 0 0:1 /a\040b /c\011d\012e\134040\040é rw - fuse.cidfs /s%20\043\054 ro")
    assert info.root == "/a b"
    assert info.mountpoint == "/c\td\ne\\040 é"
    assert str(source_of(info)) == "/s #,"


def test_names_with_what_other_readers_take_for_a_line_end() -> None:
    names = ["/a\rb", "/a\x0bb", "/a\x0cb", "/a\x1cb", "/a\x85b", "/a\u2028b", "/a\udcffb"]
    found = lines(*(CIDFS.format(name, "s") for name in names))
    assert [info.mountpoint for info in found] == names


def test_a_source_may_be_empty() -> None:
    (info,) = lines("1 0 0:1 / /a rw - tmpfs  rw,size=1k")
    assert (info.source, info.options) == ("", ("rw", "size=1k"))


def test_the_uppermost_mount_counts() -> None:
    found = lines(
        "1 0 0:1 / /a rw - tmpfs one rw", "2 1 0:2 / /a rw - tmpfs two rw", "3 1 0:3 / /b rw - t t rw"
    )
    here = mounted_at(Path("/a"), found)
    assert here is not None
    assert here.source == "two"
    assert mounted_at(Path("/c"), found) is None


def test_this_machine_has_a_root() -> None:
    assert any(info.mountpoint == "/" for info in mounts())


def test_a_mount_point_is_not_followed_itself(tmp_path: Path) -> None:
    real = tmp_path.resolve()
    (real / "folder").mkdir()
    (real / "link").symlink_to("folder")
    assert resolve(real / "link" / "mnt") == real / "folder" / "mnt"
    assert resolve(real / "link") == real / "link"


# --- overlays


def test_layers_as_mount_was_given_them() -> None:
    """What Linux 6.18 shows of layers named `l,a:b c\\d#e=f` and `m`, an upper `u,a:b c\\d`, a work `w,a`."""
    (info,) = lines(
        OVERLAY.format(
            "/m",
            r"lowerdir=/t/l\134\054a\134:b\040c\134\134d#e=f:/t/m,upperdir=/t/u\134\054a:b\040c\134\134d,"
            r"workdir=/t/w\134\054a,uuid=on",
        )
    )
    found = overlay_of(info)
    assert found.lower == ("/t/l,a:b c\\d#e=f", "/t/m")
    assert (found.upper, found.work, found.device) == ("/t/u,a:b c\\d", "/t/w,a", "0:60")
    assert "uuid=on" in found.options


def test_layers_that_were_given_one_by_one_are_plain() -> None:
    (info,) = lines(OVERLAY.format("/m", r"lowerdir+=/t/a:b\134c\054,lowerdir+=/t/d,datadir+=/t/e"))
    assert overlay_of(info).lower == ("/t/a:b\\c,", "/t/d", "/t/e")
    assert (overlay_of(info).upper, overlay_of(info).work) == ("", "")


def test_data_layers_are_layers() -> None:
    (info,) = lines(OVERLAY.format("/m", "lowerdir=/t/a::/t/b"))
    assert overlay_of(info).lower == ("/t/a", "/t/b")


@pytest.mark.parametrize(
    ("options", "stands"),
    [
        ("lowerdir=/mnt/c\\040s", True),
        ("lowerdir=/other:/mnt/c\\040s/0000-x", True),
        ("lowerdir+=/mnt/c\\040s", True),
        ("lowerdir=/mnt/c", False),
        ("lowerdir=/mnt/c\\040sx", False),
        ("lowerdir=/other,upperdir=/mnt/c\\040s", False),
        ("lowerdir=/bound", True),
        ("lowerdir=/another", False),
    ],
)
def test_which_overlays_stand_on_a_mount(options: str, stands: bool) -> None:
    mounted = lines(
        CIDFS.format("/mnt/c\\040s", "s"),
        CIDFS.format("/bound", "s"),
        CIDFS.format("/another", "s").replace("0:50", "0:51"),
        OVERLAY.format("/m", options),
    )
    found = [overlay.mountpoint for overlay in overlays_above(Path("/mnt/c s"), mounted)]
    assert found == (["/m"] if stands else [])


def test_nothing_stands_on_what_is_no_cidfs_mount() -> None:
    mounted = lines("50 1 0:50 / /mnt rw - ext4 /dev/x rw", OVERLAY.format("/m", "lowerdir=/mnt"))
    assert overlays_above(Path("/mnt"), mounted) == []
    assert overlays_above(Path("/nowhere"), mounted) == []


def test_an_overlay_that_is_mounted_twice_is_one_and_named_where_it_can_be_reached() -> None:
    mounted = lines(
        CIDFS.format("/c", "s"),
        OVERLAY.format("/covered", "lowerdir=/c"),
        "61 1 0:61 / /covered rw - tmpfs t rw",
        OVERLAY.format("/m", "lowerdir=/c"),
        OVERLAY.format("/m", "lowerdir=/c"),
    )
    assert [overlay.mountpoint for overlay in overlays_above(Path("/c"), mounted)] == ["/m"]


def test_a_link_to_a_mount_is_followed_and_a_dead_one_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path.resolve()
    (real / "way").symlink_to("c")
    touched = []
    islink = os.path.islink

    def seen(path: str) -> bool:
        touched.append(path)
        return islink(path)

    monkeypatch.setattr(os.path, "islink", seen)
    mounted = lines(CIDFS.format(f"{real}/c", "s"), OVERLAY.format("/m", f"lowerdir={real}/way"))
    assert [overlay.mountpoint for overlay in overlays_above(real / "c", mounted)] == ["/m"]
    assert touched == [f"{real}/way"]


def test_the_small_process_loads_little() -> None:
    heavy = {"lmdb", "trio", "pyfuse3", "msgspec", "cidfs.local", "cidfs.formats", "typer", "rich"}
    code = "import sys, cidfs.mount.overlay; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cidfs.mount.overlay" in done.stdout.split()
    assert heavy & set(done.stdout.split()) == set()
