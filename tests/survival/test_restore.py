# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Restoring from repositories that were made by qemu-img and qemu-io alone; content is judged by qemu-img compare."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import struct
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import FileFailed, SpaceExhausted
from ansible_collections.blockops.qemu.plugins.module_utils._ops import restore_plan
from ansible_collections.blockops.qemu.plugins.module_utils._ops.restore import restore as restore_operation
from ansible_collections.blockops.qemu.plugins.module_utils._ops.restore_types import Request
from support.fabricate import MIB, Fabricated, fabricate, identical, tool
from support.module import Result, run_module, start_module

POINTS = 12


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    """A chain of 12 with two drives; nobody may change it."""
    sizes = {"disk0": 24 * MIB, "data": 8 * MIB}
    return fabricate(tmp_path_factory.mktemp("shared") / "repository", points=POINTS, sizes=sizes)


@pytest.fixture
def repository(tmp_path: Path) -> Fabricated:
    """A chain of 3 with one drive, to be damaged."""
    return fabricate(tmp_path / "repository")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def restore(made: Fabricated, out: Path, *, check: bool = False, diff: bool = False, **more: t.Any) -> Result:
    params = {"repository": str(made.path), "vm": made.vm, **more}
    if "drives" not in more and "dest" not in more:
        params["dest"] = str(out)
    return run_module("backup_restore", params, check=check, diff=diff)


def kind(result: Result) -> str:
    return str(result.data.get("error", {}).get("kind")) if result.failed else f"no failure: {result.stdout}"


def empty(path: Path) -> bool:
    return not os.listdir(path)


@pytest.mark.parametrize("number", range(POINTS))
def test_every_point_of_a_chain(shared: Fabricated, out: Path, number: int) -> None:
    result = restore(shared, out, point=shared.ids[number]).ok()
    assert result.changed
    assert result.data["verified"]
    assert result.data["backup"] == shared.ids[number]
    for drive in result.data["drives"]:
        assert drive["chain"] == [shared.ids[n] for n in range(number, -1, -1)]
        assert identical(Path(drive["path"]), "qcow2", shared.witness(number, drive["name"]), "raw")
        assert "backing file" not in tool("qemu-img", "info", drive["path"])
    assert sorted(os.listdir(out)) == ["data.qcow2", "disk0.qcow2"]


def test_order_comes_from_the_manifest_not_from_times(shared: Fabricated, tmp_path: Path, out: Path) -> None:
    made = shared.copy_to(tmp_path / "elsewhere" / "deep")
    dice = random.Random(1)
    for path in made.path.rglob("*"):
        os.utime(path, (dice.random() * 2e9,) * 2)
    result = restore(made, out).ok()
    assert result.data["backup"] == made.ids[-1]
    assert identical(out / "disk0.qcow2", "qcow2", made.witness(POINTS - 1), "raw")


def test_before_a_time(shared: Fabricated, out: Path) -> None:
    result = restore(shared, out, point="before:2026-11-05T05:45:00Z").ok()
    assert result.data["backup"] == shared.ids[3]
    result = restore(shared, out, check=True, point="before:2026-11-01")
    assert kind(result) == "BackupMissing"


def test_raw_and_sparse(shared: Fabricated, out: Path) -> None:
    dest = out / "disk.raw"
    drives = [{"name": "disk0", "dest": str(dest)}]
    result = restore(shared, out, drives=drives, format="raw", file_mode="0640").ok()
    assert identical(dest, "raw", shared.witness(POINTS - 1), "raw")
    assert dest.stat().st_size == 24 * MIB
    assert dest.stat().st_blocks * 512 < 20 * MIB
    assert dest.stat().st_mode & 0o777 == 0o640
    assert result.data["drives"][0]["allocated"] == dest.stat().st_blocks * 512
    again = restore(shared, out, drives=drives, format="raw").ok()
    assert not again.changed


@pytest.mark.parametrize("mode", ["full", "instant"])
def test_again_is_unchanged_and_check_mode_predicts(shared: Fabricated, out: Path, mode: str) -> None:
    predicted = restore(shared, out, check=True, diff=True, mode=mode).ok()
    assert predicted.changed
    assert empty(out)
    assert set(predicted.data["diff"]["before"].values()) == {"absent"}
    done = restore(shared, out, diff=True, mode=mode).ok()
    assert done.changed
    assert done.data["diff"] == predicted.data["diff"]
    for check in (True, False):
        again = restore(shared, out, check=check, diff=True, mode=mode).ok()
        assert not again.changed
        assert again.data["diff"]["before"] == again.data["diff"]["after"]


def test_instant_reads_through_and_backups_stay_untouched(shared: Fabricated, out: Path) -> None:
    before = shared.state()
    restore(shared, out, mode="instant").ok()
    dest = out / "disk0.qcow2"
    assert dest.stat().st_size < MIB
    assert identical(dest, "qcow2", shared.witness(POINTS - 1), "raw")
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", dest)
    assert shared.state() == before
    written = restore(shared, out, mode="instant")
    assert kind(written) == "DestinationExists"
    tool("qemu-img", "rebase", "-f", "qcow2", "-F", "qcow2", "-b", "", dest)
    assert "backing file" not in tool("qemu-img", "info", dest)


def test_instant_overlay_is_not_a_full_copy(repository: Fabricated, out: Path) -> None:
    restore(repository, out, mode="instant").ok()
    assert kind(restore(repository, out)) == "DestinationExists"


def test_existing_file_is_never_overwritten(repository: Fabricated, out: Path) -> None:
    (out / "disk0.qcow2").write_text("precious")
    assert kind(restore(repository, out, check=True)) == "DestinationExists"
    assert kind(restore(repository, out)) == "DestinationExists"
    assert (out / "disk0.qcow2").read_text() == "precious"


def test_dangling_link_is_never_followed(repository: Fabricated, out: Path) -> None:
    (out / "disk0.qcow2").symlink_to(out / "nowhere")
    assert kind(restore(repository, out)) == "DestinationExists"
    assert sorted(os.listdir(out)) == ["disk0.qcow2"]


def test_destination_in_use(repository: Fabricated, out: Path) -> None:
    restore(repository, out).ok()
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(out / "disk0.qcow2")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.read(len("qemu-io> "))
        assert kind(restore(repository, out)) == "ImageInUse"
    finally:
        holder.kill()
        holder.communicate()


def test_names_that_tools_could_misread(tmp_path: Path) -> None:
    path = tmp_path / "a,b:c d" / "json:{}"
    path.mkdir(parents=True)
    made = fabricate(path / "repository")
    out = path / "-o=x,y"
    out.mkdir()
    result = restore(made, out).ok()
    assert identical(out / "disk0.qcow2", "qcow2", made.witness(2), "raw")
    assert not restore(made, out).changed
    instant = out / "nbd:instant,file.qcow2"
    drives = [{"name": "disk0", "dest": str(instant)}]
    restore(made, out, drives=drives, mode="instant").ok()
    assert not restore(made, out, drives=drives, mode="instant").ok().changed
    assert result.data["drives"][0]["path"] == str(out / "disk0.qcow2")


# -- damage is found before anything is written ------------------------------------------------------------------------


def flip_byte(path: Path) -> None:
    path.chmod(0o600)
    with path.open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))


def truncate(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size - 65536)


def link(path: Path) -> None:
    elsewhere = path.parents[3] / "elsewhere.qcow2"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(flip_byte, "ChecksumMismatch"), (truncate, "ChainBroken"), (Path.unlink, "ChainBroken"), (link, "ChainBroken")],
    ids=["flipped", "truncated", "missing", "link"],
)
@pytest.mark.parametrize("check", [True, False], ids=["check", "real"])
def test_damaged_parent(
    repository: Fabricated, out: Path, damage: t.Callable[[Path], None], expected: str, check: bool
) -> None:
    damage(repository.image(1))
    result = restore(repository, out, check=check, point=repository.ids[2])
    assert kind(result) == expected
    assert empty(out)
    restore(repository, out, point=repository.ids[0]).ok()
    assert identical(out / "disk0.qcow2", "qcow2", repository.witness(0), "raw")


def test_latest_passes_over_a_broken_chain(repository: Fabricated, out: Path) -> None:
    shutil.rmtree(repository.directory / repository.ids[1])
    assert restore(repository, out).ok().data["backup"] == repository.ids[0]
    assert kind(restore(repository, out, point=repository.ids[2])) == "ChainBroken"


Change = t.Callable[[dict[str, t.Any]], t.Any]
HOSTILE_MANIFESTS: dict[str, Change] = {
    "file leaves the directory": lambda m: m["drives"][0].update(file="../../../etc/passwd"),
    "file is absolute": lambda m: m["drives"][0].update(file="/etc/passwd.qcow2"),
    "file is hidden": lambda m: m["drives"][0].update(file=".disk0.qcow2"),
    "file is json": lambda m: m["drives"][0].update(file='json:{"driver":"nbd"}.qcow2'),
    "parent leaves the directory": lambda m: m["drives"][0].update(parent="../../../../etc"),
    "id is another one": lambda m: m.update(id="20260101T000000Z-00000000"),
    "vm is another one": lambda m: m.update(vm={"name": "other", "uuid": None}),
    "size is negative": lambda m: m["drives"][0].update(size=-1),
    "size is absurd": lambda m: m["drives"][0].update(virtual_size=1 << 61),
    "size is a text": lambda m: m["drives"][0].update(size="1024"),
    "two drives of one name": lambda m: m["drives"].append(m["drives"][0]),
    "control characters": lambda m: m["drives"][0].update(name="disk\x1b[31m"),
    "no drives": lambda m: m.update(drives=[]),
    "saved file leaves": lambda m: m.update(
        definition=[
            {"path": "/x", "file": "../../x", "mode": "0600", "uid": 0, "gid": 0, "size": 1, "sha256": "0" * 64}
        ]
    ),
}


@pytest.mark.parametrize("change", HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS.keys())
def test_hostile_manifest(repository: Fabricated, out: Path, change: Change) -> None:
    repository.edit(1, change)
    assert kind(restore(repository, out, point=repository.ids[1])) == "ManifestInvalid"
    assert kind(restore(repository, out, point=repository.ids[2])) == "ChainBroken"
    assert empty(out)


def test_newer_formats(repository: Fabricated, out: Path) -> None:
    repository.edit(2, lambda manifest: manifest.update(format=2))
    assert kind(restore(repository, out, point=repository.ids[2])) == "FormatUnsupported"
    assert restore(repository, out).ok().data["backup"] == repository.ids[1]
    identity = repository.path / "repository.json"
    identity.write_text(identity.read_text().replace('"format": 1', '"format": 2'))
    result = run_module("backup_info", {"repository": str(repository.path)})
    assert kind(result) == "FormatUnsupported"
    assert "newer blockops.qemu" in result.msg


def backing(name: str) -> t.Callable[[Path], None]:

    def change(path: Path) -> None:
        tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, path)

    return change


def data_file(path: Path) -> None:
    path.unlink()
    tool("qemu-img", "create", "-f", "qcow2", "-o", f"data_file={path.parents[3]}/secret,data_file_raw=on", path, "16M")


def other_size(path: Path) -> None:
    tool("qemu-img", "resize", "-f", "qcow2", path, "32M")


def encrypted(path: Path) -> None:
    """The header says LUKS. (Really encrypting takes qemu-img seconds, and fails on a busy machine.)"""
    with path.open("r+b") as stream:
        stream.seek(32)
        stream.write(struct.pack(">I", 2))


def not_qcow2(path: Path) -> None:
    path.write_bytes(b"QFI\xfa" + bytes(1 << 20))


HOSTILE_IMAGES = {
    "absolute backing": (1, backing("/etc/passwd")),
    "json backing": (1, backing('json:{"driver":"file","filename":"/etc/passwd"}')),
    "backing format raw": (1, backing("../" + "20261123T235900Z-00000000" + "/disk0.qcow2")),
    "full with a backing": (0, backing("/etc/passwd")),
    "increment without": (1, backing("")),
    "data file": (0, data_file),
    "other virtual size": (1, other_size),
    "encrypted": (0, encrypted),
    "not qcow2": (0, not_qcow2),
}


@pytest.mark.parametrize(("number", "change"), HOSTILE_IMAGES.values(), ids=HOSTILE_IMAGES.keys())
@pytest.mark.parametrize("mode", ["full", "instant"])
def test_hostile_image(
    repository: Fabricated, out: Path, number: int, change: t.Callable[[Path], None], mode: str
) -> None:
    image = repository.image(number)
    image.chmod(0o600)
    change(image)
    repository.reseal(number)
    result = restore(repository, out, point=repository.ids[2], mode=mode)
    assert kind(result) == "ImageInvalid"
    assert empty(out)


# -- all or nothing ----------------------------------------------------------------------------------------------------


def test_one_drive_fails_none_appears(shared: Fabricated, out: Path) -> None:
    drives = [
        {"name": "disk0", "dest": str(out / "disk0.qcow2")},
        {"name": "data", "dest": str(out / "missing" / "data.qcow2")},
    ]
    assert kind(restore(shared, out, drives=drives)) == "TargetUnwritable"
    assert empty(out)


class Flaky:
    """``os.link`` that fails the second time."""

    def __init__(self) -> None:
        self.calls = 0
        self.real = os.link

    def __call__(self, source: str, target: str) -> None:
        self.calls += 1
        if self.calls == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.real(source, target)


def test_second_drive_fails_at_the_last_step(shared: Fabricated, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", Flaky())
    request = Request(str(shared.path), shared.vm, dest=str(out))
    with pytest.raises(FileFailed):
        asyncio.run(restore_operation(request, check_mode=False))
    assert empty(out)


def test_file_system_fills_up_in_spite_of_the_preflight(
    repository: Fabricated, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_plan, "_check_space", lambda _steps: None)
    request = Request(str(repository.path), repository.vm, dest=str(small), preallocation="full")
    with pytest.raises(SpaceExhausted):
        asyncio.run(restore_operation(request, check_mode=False))
    assert empty(small)


def test_refuses_to_write_into_the_repository(repository: Fabricated) -> None:
    result = restore(repository, repository.directory / repository.ids[0])
    assert kind(result) == "InputInvalid"


def test_unknown_drive(repository: Fabricated, out: Path) -> None:
    drives = [{"name": "disk9", "dest": str(out / "x")}]
    result = restore(repository, out, drives=drives, point=repository.ids[0])
    assert kind(result) == "DriveUnknown"


@pytest.fixture
def small(tmp_path: Path) -> t.Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path = tmp_path / "small"
    path.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "size=2m", "none", path)
    try:
        yield path
    finally:
        tool("umount", "-l", path)


def test_destination_too_small(repository: Fabricated, small: Path) -> None:
    for check in (True, False):
        result = restore(repository, small, check=check, preallocation="full")
        assert kind(result) == "NoSpace"
        assert result.data["error"]["needed"] > result.data["error"]["available"]
    assert empty(small)


def test_on_tmpfs_without_direct_io(repository: Fabricated, small: Path) -> None:
    tool("mount", "-o", "remount,size=64m", small)
    restore(repository, small).ok()
    assert identical(small / "disk0.qcow2", "qcow2", repository.witness(2), "raw")


# -- killed ------------------------------------------------------------------------------------------------------------


def test_killed_at_random_moments(tmp_path: Path, out: Path) -> None:
    made = fabricate(tmp_path / "repository", points=2, sizes={"disk0": 256 * MIB, "data": 16 * MIB})
    made.image(1).chmod(0o600)
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 200M", made.image(1))
    with made.witness(1).open("r+b") as stream:
        stream.write(b"\x09" * (200 * MIB))
    made.reseal(1)
    dice = random.Random(7)
    params = {"repository": str(made.path), "vm": made.vm, "dest": str(out)}
    killed = 0
    for _round in range(8):
        running = start_module("backup_restore", params)
        try:
            running.process.wait(dice.uniform(0.15, 1.2))
        except subprocess.TimeoutExpired:
            running.process.kill()
            killed += 1
        running.finish()
        for name in ("disk0", "data"):
            dest = out / f"{name}.qcow2"
            if dest.exists():  # what has appeared is complete
                assert identical(dest, "qcow2", made.witness(1, name), "raw")
                dest.unlink()
    assert killed >= 2
    wait_for_orphans(out)
    restore(made, out).ok()
    assert sorted(os.listdir(out)) == ["data.qcow2", "disk0.qcow2"]
    assert identical(out / "disk0.qcow2", "qcow2", made.witness(1), "raw")


def wait_for_orphans(out: Path) -> None:
    """A killed module's qemu-img goes on to its end, and its directory is only taken for a leftover after that."""
    import fcntl

    for lock in out.glob(".*.restoring/lock"):
        with lock.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)


# -- what lies below, saved files --------------------------------------------------------------------------------------


def test_image_without_the_data_below_it(repository: Fabricated, out: Path) -> None:
    """What sync=top publishes: the writes of point 2, to be put on point 1 kept elsewhere."""
    base = out / "base.qcow2"
    restore(repository, out, point=repository.ids[1], drives=[{"name": "disk0", "dest": str(base)}]).ok()
    tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", repository.image(2))
    change = {"standalone": False, "parent": None, "level": "copy"}
    repository.edit(
        2, lambda manifest: (manifest["drives"][0].update(change), manifest.update(level="copy", sync="top"))
    )
    repository.reseal(2)
    wanted: dict[str, t.Any] = {"name": "disk0", "dest": str(out / "top.qcow2")}
    assert kind(restore(repository, out, point=repository.ids[2], drives=[wanted])) == "InputInvalid"
    assert restore(repository, out, check=True).data["backup"] == repository.ids[1]
    wanted["base"] = str(base)
    restore(repository, out, point=repository.ids[2], drives=[wanted]).ok()
    assert identical(out / "top.qcow2", "qcow2", repository.witness(2), "raw")
    assert not restore(repository, out, point=repository.ids[2], drives=[wanted]).ok().changed


def test_saved_files(repository: Fabricated, out: Path) -> None:
    original = out / "web1.conf"
    repository.save_file(2, original, b"old")
    repository.save_file(2, out / "etc" / "web1.conf", b"other")
    (out / "etc").mkdir()
    (out / "dir").mkdir()
    disks = out / "disks"
    disks.mkdir()
    into: dict[str, t.Any] = {"definition": "directory", "definition_dest": str(out / "dir")}
    assert restore(repository, disks, check=True, **into).ok().changed
    restore(repository, disks, **into).ok()
    assert (out / "dir" / "0-web1.conf").read_bytes() == b"old"
    assert (out / "dir" / "1-web1.conf").stat().st_mode & 0o777 == 0o640
    assert not restore(repository, disks, **into).ok().changed
    original.write_bytes(b"new")
    assert kind(restore(repository, disks, definition="original")) == "DefinitionDiffers"
    result = restore(repository, disks, definition="original", overwrite_definition=True).ok()
    assert result.changed
    assert original.read_bytes() == b"old"
    assert (out / "web1.conf.before-restore").read_bytes() == b"new"
    assert (out / "etc" / "web1.conf").read_bytes() == b"other"
    again = restore(repository, disks, definition="original", overwrite_definition=True).ok()
    assert not again.changed
    assert sorted(os.listdir(out)) == ["dir", "disks", "etc", "web1.conf", "web1.conf.before-restore"]


def test_damaged_saved_file(repository: Fabricated, out: Path) -> None:
    saved = repository.save_file(2, out / "web1.conf", b"good")
    saved.write_bytes(b"evil")
    assert kind(restore(repository, out, definition="original")) == "ChecksumMismatch"
    assert empty(out)
