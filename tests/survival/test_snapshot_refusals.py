# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What external snapshots refuse, before anything has happened, and places where QEMU may look but not write."""

from __future__ import annotations

import os
import stat
import subprocess
import typing as t
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.backup import NOBODY
from support.points import Drive
from support.shots import KIB, MIB, SIZE, Shots, vm_of

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and other users need root")


@pytest.fixture
def shots(workdir: Path, qemu_factory: QemuFactory) -> Shots:
    return start(workdir, qemu_factory)


def start(directory: Path, factory: QemuFactory, *others: Drive, **options: t.Any) -> Shots:
    """A VM with vda, which is watched, and other drives, which are not."""
    base = images.create(directory / "base.qcow2", SIZE)
    shots = Shots(factory("vm", [Drive("vda", base), *others], paused=False, **options), directory)
    shots.change()
    return shots


# --- drives


def _encrypted(directory: Path) -> Drive:
    options = {"encrypt.format": "luks", "encrypt.key-secret": "key", "encrypt.iter-time": 10}
    extra = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    image = directory / "odd.qcow2"
    secret = ["--object", "secret,id=key,data=letmein"]
    for left in reversed(range(5)):
        try:
            images.run_tool("qemu-img", "create", "-q", *secret, "-f", "qcow2", *extra, image, str(SIZE))
            break
        except images.ImageToolFailed as exc:
            if not left or "accurate CPU usage" not in str(exc):  # it measures the host, which may be busy
                raise
    return Drive("odd", image, options={"encrypt": {"format": "luks", "key-secret": "key"}})


def _raw(directory: Path) -> Path:
    return images.create(directory / "odd.raw", SIZE, "raw")


ODD: dict[str, tuple[t.Callable[[Path], Drive], str]] = {
    "read-only": (lambda directory: Drive("odd", _raw(directory), fmt="raw", readonly=True), "read-only"),
    "empty CD": (lambda _directory: Drive("odd", None, device="ide-cd"), "empty"),
    "CD": (lambda directory: Drive("odd", _raw(directory), fmt="raw", device="ide-cd"), "removable"),
    "removable stick": (
        lambda directory: Drive("odd", _raw(directory), fmt="raw", device="usb-storage", removable=True),
        "removable",
    ),
    "encrypted": (_encrypted, "encrypted"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_drive_that_can_have_none(workdir: Path, qemu_factory: QemuFactory, kind: str) -> None:
    """Named: refused with the reason and the way out. Not named: left out with the reason."""
    make, reason = ODD[kind]
    shots = start(workdir, qemu_factory, make(workdir), extra_args=["-object", "secret,id=key,data=letmein"])
    for drives in (["odd"], ["vda", "odd"]):
        error = shots.refused("one", "present", "DriveUnsuited", drives=drives)
        assert error["drive"] == "odd" and reason in error["message"] and "Leave it out" in error["message"]
    (skipped,) = shots.present("one")["skipped"]
    assert skipped["name"] == "odd" and reason in skipped["reason"]
    shots.change()
    chosen: dict[str, t.Any] = {}
    if kind == "encrypted":
        # The guest writes to it, so that it stays behind has to be said; firmware and media stay in any case.
        assert shots.refused("one", "reverted", "SnapshotIncomplete", allow_reset=True)["lacks"] == "odd"
        chosen = {"drives": ["vda"]}
    shots.reverted("one", discarded="delete", **chosen)
    shots.live()
    shots.absent("one")
    shots.live()


def test_firmware_stays_as_it_is(workdir: Path, qemu_factory: QemuFactory) -> None:
    code, variables = (images.create(workdir / f"{name}.raw", MIB, "raw") for name in ("code", "vars"))
    pair = [Drive("pf0", code, fmt="raw", device="pflash0", readonly=True)]
    pair += [Drive("pf1", variables, fmt="raw", device="pflash1")]
    shots = start(workdir, qemu_factory, *pair)
    names = {skip["name"]: skip["reason"] for skip in shots.present("one")["skipped"]}
    assert len(names) == 2 and all("firmware" in reason for reason in names.values()), names
    for name in names:
        assert "firmware" in shots.refused("two", "present", "DriveUnsuited", drives=[name])["message"]
    shots.change()
    shots.reverted("one", discarded="delete")
    shots.live()
    shots.absent("one")
    shots.off()


def test_unknown_and_no_drives(shots: Shots) -> None:
    error = shots.refused("one", "present", "DriveUnsuited", drives=["sda"])
    assert error["drive"] == "sda" and "it has: vda" in error["message"]
    assert "vda" in shots.refused("one", "present", "DriveUnsuited", exclude_drives=["vda"])["message"]


def test_a_name_on_some_drives_only(workdir: Path, qemu_factory: QemuFactory) -> None:
    other = Drive("vdb", images.create(workdir / "b.qcow2", SIZE))
    shots = start(workdir, qemu_factory, other)
    shots.truth["vdb"] = bytearray(SIZE)
    shots.present("one", drives=["vdb"])
    shots.change()
    for state, options in (("present", {}), ("reverted", {"allow_reset": True})):
        error = shots.refused("one", state, "SnapshotIncomplete", **options)
        assert error["has"] == "vdb" and error["lacks"] == "vda"
    assert vm_of(shots.call("one", drives=["vdb"]))["status"] == "present"
    shots.present("one", drives=["vda"])  # each drive by itself makes it whole
    assert vm_of(shots.call("one"))["status"] == "present"
    shots.change()
    assert [drive["name"] for drive in shots.absent("one", drives=["vda"])["drives"]] == ["vda"]
    shots.live()
    assert [drive["name"] for drive in shots.absent("one")["drives"]] == ["vdb"]
    shots.live()
    shots.off()


def test_a_reset_that_was_not_allowed(shots: Shots) -> None:
    shots.present("one")
    shots.change()
    before = shots.state()
    error = vm_of(shots.call("one", "reverted"))["error"]
    assert error["kind"] == "ResetNotAllowed" and error["lost"] > 0 and "allow_reset" in error["message"]
    plan = vm_of(shots.call("one", "reverted", check=True).ok())
    assert plan["status"] == "reverted" and plan["drives"][0]["bytes"] == error["lost"]
    assert shots.state() == before
    assert shots.refused("two", "reverted", "SnapshotMissing", allow_reset=True)["known"] == "one"


# --- places


def test_the_overlay_is_there_already(shots: Shots) -> None:
    """Somebody else's file is refused and not touched; ours, kept aside, gets a number."""
    foreign = shots.directory / "vda.one.qcow2"
    for content in (b"", b"somebody's"):
        foreign.write_bytes(content)
        error = shots.refused("one", "present", "OverlayExists")
        assert error["path"] == str(foreign) and error["drive"] == "vda"
        assert foreign.read_bytes() == content
    foreign.unlink()
    foreign.symlink_to("/nowhere")
    assert shots.refused("one", "present", "OverlayExists")["path"] == str(foreign)
    foreign.unlink()
    shots.present("one")
    for number in (2, 3):
        shots.change()
        data = shots.reverted("one", discarded="keep")
        assert data["drives"][0]["overlay"] == str(shots.directory / f"vda.one-{number}.qcow2")
        shots.live()
    assert len(shots.files()) == 1 + 2 * 3
    shots.judge(shots.directory / "base.qcow2", bytes(shots.truth["vda"]))
    shots.off()


def test_two_drives_that_would_share_a_file(workdir: Path, qemu_factory: QemuFactory) -> None:
    (workdir / "b").mkdir()
    shots = start(workdir, qemu_factory, Drive("vdb", images.create(workdir / "b" / "base.qcow2", SIZE)))
    result = shots.call("one", overlay_name="{name}.qcow2")
    assert result.failed and "{drive}" in result.msg
    shots.present("one", overlay_name="{vm}-{drive}-{name}", overlay_directory=str(workdir / "b"))
    assert {path.name for path in (workdir / "b").glob("vm-*")} == {
        "vm-vda-one", "vm-vda-one.snapshot.json", "vm-vdb-one", "vm-vdb-one.snapshot.json",
    }  # fmt: skip
    shots.live()


def test_no_such_directory(shots: Shots) -> None:
    for path in ("/no/such/place", str(shots.directory / "base.qcow2")):
        error = shots.refused("one", "present", "FileFailed", overlay_directory=path)
        assert error["path"] == path


@contextmanager
def mounted(directory: Path, size: int) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@as_root
@pytest.mark.parametrize("leave", [0, 4 * KIB, 64 * KIB])
def test_a_full_file_system(workdir: Path, qemu_factory: QemuFactory, leave: int) -> None:
    """Wherever it ends: the guest runs on as before, and there is no trace."""
    shots = start(workdir, qemu_factory)
    with mounted(workdir / "small", MIB) as small:
        status = os.statvfs(small)
        with (small / "filler").open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, status.f_bavail * status.f_frsize - leave)
        before = shots.state()
        error = vm_of(shots.call("one", overlay_directory=str(small)))["error"]
        assert error["kind"] in ("SnapshotFailed", "NoSpace"), error
        assert "No space left" in error["message"] and "Nothing has changed" in error["message"]
        assert shots.state() == before
        assert os.listdir(small) == ["filler"]
        shots.live()
        (small / "filler").unlink()
        shots.present("one", overlay_directory=str(small))
        shots.change()
        shots.absent("one")
        assert not os.listdir(small)
        shots.live()
        shots.off()


@as_root
def test_qemu_as_another_user(workdir: Path, qemu_factory: QemuFactory) -> None:
    """The overlay belongs to whom the image below does; nobody but root writes to the directory."""
    workdir.chmod(0o755)
    place = workdir / "images"
    place.mkdir(mode=0o755)
    base = images.create(place / "base.qcow2", SIZE)
    base.chmod(0o640)
    qemu = qemu_factory("vm", [Drive("vda", base)], paused=False, user=NOBODY)
    shots = Shots(qemu, workdir)
    shots.change()
    shots.present("one")
    found = (place / "vda.one.qcow2").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, NOBODY, 0o640)
    shots.change()
    shots.reverted("one", discarded="delete")
    shots.live()
    shots.change()
    shots.present("two")
    shots.absent("one", merge="commit")
    shots.live()
    shots.absent("two", merge="commit")
    shots.live()
    assert {path.name for path in place.iterdir()} == {"base.qcow2"}
    shots.off()


@as_root
def test_a_directory_that_qemu_may_not_look_into(workdir: Path, qemu_factory: QemuFactory) -> None:
    workdir.chmod(0o755)
    base, closed = images.create(workdir / "base.qcow2", SIZE), workdir / "closed"
    closed.mkdir(mode=0o700)
    shots = Shots(qemu_factory("vm", [Drive("vda", base)], paused=False, user=NOBODY), workdir)
    shots.change()
    before = shots.state()
    error = vm_of(shots.call("one", overlay_directory=str(closed)))["error"]
    assert error["kind"] == "SnapshotFailed", error
    assert "Permission denied" in error["message"] and "vda.one.qcow2" in error["message"]
    assert shots.state() == before and not list(closed.iterdir())
    shots.live()
    closed.chmod(0o711)  # to look into is enough
    shots.present("one", overlay_directory=str(closed))
    shots.change()
    shots.absent("one")
    shots.live()
    assert not list(closed.iterdir())
    shots.off()


# --- snapshots that somebody else took


def foreign(shots: Shots, name: str) -> Path:
    """An overlay on top, made with QEMU's own means: no record."""
    path = shots.directory / f"{name}.qcow2"
    below = {"node-name": shots.qemu.active_node("vda"), "snapshot-node-name": name}
    shots.qemu.execute("blockdev-snapshot-sync", {**below, "snapshot-file": str(path), "format": "qcow2"})
    return path


@pytest.mark.parametrize("merge", ["commit", "stream"])
@pytest.mark.parametrize("at", ["below", "between", "above"])
def test_an_overlay_of_somebody_else(shots: Shots, at: str, merge: str) -> None:
    """It is a layer like any other, and never deleted but by its own maker."""
    theirs = foreign(shots, "theirs") if at == "below" else None
    shots.change()
    shots.present("one")
    shots.change()
    if at == "between":
        theirs = foreign(shots, "theirs")
        shots.change()
    shots.present("two")
    shots.change()
    if at == "above":
        theirs = foreign(shots, "theirs")
        shots.change()
    assert theirs is not None
    shots.live()
    for name in ("one", "two"):
        assert vm_of(shots.call(name))["status"] == "present"
    data = shots.absent("one", merge=merge)
    assert str(theirs) not in data["deleted"]
    shots.live()
    assert theirs.exists()
    shots.change()
    data = shots.absent("two", merge=merge)
    assert str(theirs) not in data["deleted"]
    shots.live()
    assert theirs.exists()
    shots.off()


@pytest.mark.parametrize("discarded", ["keep", "delete"])
def test_going_back_over_an_overlay_of_somebody_else(shots: Shots, discarded: str) -> None:
    """It is cut off with the branch it is in, and its file stays."""
    shots.present("one")
    shots.change()
    theirs = foreign(shots, "theirs")
    shots.change()
    data = shots.reverted("one", discarded=discarded)
    assert str(theirs) in data["kept"] and str(theirs) not in data["deleted"]
    assert theirs.exists()
    # What theirs is based on has to stay for it, or it would be of no use to anybody.
    shots.live()
    shots.change()
    shots.off()
