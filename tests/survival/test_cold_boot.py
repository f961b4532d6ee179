# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Start-up files against a real QEMU: snapshot, rewrite, power cut, start from the file; the data is right.

The VM is started by running the file itself, as its administrator would. The snapshot is taken by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import typing as t
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.graph import Drive, parse_drives
from ansible_collections.blockops.qemu.plugins.module_utils._image.definition import DefinitionChanged
from ansible_collections.blockops.qemu.plugins.module_utils._ops.cold_boot import (
    DefinitionUnsafe,
    Drift,
    Move,
    Startup,
    drifts,
    moves_to,
    plan_definitions,
    read_startup,
    undo_definition,
    unmentioned,
    write_definition,
)
from ansible_collections.blockops.qemu.plugins.module_utils._qmp.session import Process
from lab import images
from lab.drive import Drive as LabDrive
from lab.fixtures import QemuFactory
from lab.qemu import Qemu, system_binary

MIB = 1 << 20
QUERIES = ("query-block", "query-blockstats", "query-named-block-nodes")


class Booted(Qemu):
    """A QEMU started by its own start-up file: a script, or systemd's way, an environment and a command line.

    ``arguments`` is the part of the command line about drives, as the file spells it.
    """

    def __init__(self, directory: Path, kind: str, arguments: str, ids: t.Sequence[str]) -> None:
        super().__init__("vm", [LabDrive(name, None) for name in ids], directory)
        self.kind = kind
        self.file = directory / f"vm.{kind}"
        fixed = " ".join(shlex.quote(part) for part in self._fixed())
        if kind == "sh":
            text = f"#!/bin/sh\n# starts the VM; {directory}/vda.qcow2.old is from before\nset -e\n"
            self.file.write_text(f"{text}exec {fixed} \\\n  {arguments}\n")
            self.file.chmod(0o755)
        else:
            self.file.write_text(f"# of the unit\nQEMU={system_binary()}\nARGUMENTS={shlex.quote(arguments)}\n")

    def _fixed(self) -> list[str]:
        drives, self.drives = self.drives, {}
        try:
            return super().argv()
        finally:
            self.drives = drives

    def argv(self) -> list[str]:
        if self.kind == "sh":
            return [str(self.file)]
        fixed = " ".join(shlex.quote(part) for part in self._fixed()[1:])
        return ["/bin/sh", "-c", f'. "{self.file}"; eval "exec $QEMU {fixed} $ARGUMENTS"']

    def observed(self) -> tuple[Drive, ...]:
        return observed(self)

    def startup(self) -> Startup:
        found, reason = read_startup(Process(self.pid, 0, 0))
        assert found is not None, reason
        return found

    def drift(self) -> tuple[Drift, ...]:
        return drifts(self.startup(), self.observed())

    def snapshot(self, drive: Drive, overlay: Path) -> None:
        """An overlay by hand, with its node, as an administrator would with QMP alone."""
        images.create(overlay, backing=drive.active.file, backing_fmt=drive.active.driver)
        name = overlay.stem.replace(".", "-")
        file = {"driver": "file", "filename": str(overlay)}
        self.command("blockdev-add", driver="qcow2", node_name=name, file=file, backing=None)
        self.command("blockdev-snapshot", node=drive.active.node, overlay=name)


def observed(qemu: Qemu) -> tuple[Drive, ...]:
    blocks, stats, nodes = (qemu.command(name) for name in QUERIES)
    return parse_drives(blocks, stats, nodes, str(qemu.directory))


def moves(vm: Booted, overlays: t.Mapping[str, Path]) -> list[Move]:
    startup = vm.startup()
    return [
        move
        for drive in vm.observed()
        if drive.name in overlays
        for move in moves_to(drive, startup, str(overlays[drive.name]), "qcow2")
    ]


def write(vm: Qemu, drive: str, number: int) -> None:
    vm.write(drive, number * MIB, MIB, number + 1)
    vm.flush(drive) if vm.drives[drive].image else vm.qemu_io(drive, "flush")


def holds(vm: Qemu, drive: str, count: int) -> bool:
    return all(vm.holds(drive, number * MIB, MIB, number + 1) for number in range(count))


def checksum(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout


@contextmanager
def booted(directory: Path, kind: str, arguments: str, ids: t.Sequence[str]) -> Iterator[Booted]:
    vm = Booted(directory, kind, arguments, ids)
    vm.start()
    try:
        yield vm
    finally:
        vm.close()


def json_node(path: Path, fmt: str) -> str:
    return json.dumps({"driver": fmt, "node-name": "vda-n", "file": {"driver": "file", "filename": str(path)}})


# How the drive vda is spelled: in a script, and in an environment file.
SPELLINGS: dict[str, tuple[str, t.Callable[[Path, str], str]]] = {
    "drive": ("sh", lambda p, f: f"-drive file={p},format={f},if=none,id=d0 -device virtio-blk-pci,drive=d0,id=vda"),
    "json": ("sh", lambda p, f: f"-blockdev '{json_node(p, f)}' -device virtio-blk-pci,drive=vda-n,id=vda"),
    "escaped": (
        "sh",
        lambda p, f: f"-blockdev {json.dumps(json_node(p, f))} -device virtio-blk-pci,drive=vda-n,id=vda",
    ),
    "dotted": (
        "sh",
        lambda p, f: (
            f"-blockdev {f},node-name=vda-n,file.driver=file,file.filename={p} -device nvme,drive=vda-n,id=vda,serial=1"
        ),
    ),
    "apart": (
        "sh",
        lambda p, f: (
            f"-blockdev driver=file,node-name=f,filename={p} -blockdev driver={f},node-name=n,file=f"
            " -device virtio-blk-pci,drive=n,id=vda"
        ),
    ),
    "environment": (
        "env",
        lambda p, f: f"-drive if=none,id=d0,format={f},file={p} -device virtio-blk-pci,drive=d0,id=vda",
    ),
}


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_snapshot_power_cut_and_start_from_the_file(workdir: Path, spelling: str, fmt: str) -> None:
    kind, spell = SPELLINGS[spelling]
    base, overlay = images.create(workdir / f"vda.{fmt}", 8 * MIB, fmt), workdir / "vda.s1.qcow2"
    with booted(workdir, kind, spell(base, fmt), ["vda"]) as vm:
        write(vm, "vda", 0)
        assert vm.drift() == ()
        (change,) = plan_definitions([str(vm.file)], moves(vm, {"vda": overlay}))
        assert change.changed and change.drives == {"vda"} and vm.file.read_bytes() == change.before
        kept = write_definition(change)
        assert kept is not None and Path(kept).read_bytes() == change.before
        vm.snapshot(vm.observed()[0], overlay)
        before = checksum(base)
        write(vm, "vda", 1)
        (drift,) = vm.drift()
        assert (drift.drive, drift.old, drift.new) == ("vda", str(base), str(overlay))
        # Again, with what is known now: nothing to do.
        (again,) = plan_definitions([str(vm.file)], moves(vm, {"vda": overlay}))
        assert not again.changed and again.drives == {"vda"} and write_definition(again) is None
        vm.kill9()
        assert images.check(overlay)["check-errors"] == 0

        vm.start()
        assert vm.drift() == ()
        assert holds(vm, "vda", 2)
        write(vm, "vda", 2)
        vm.quit()
        assert checksum(base) == before
        assert images.chain(overlay) == [str(overlay), str(base)]
        witness = images.create(workdir / "witness", 8 * MIB, "raw")
        images.fill(witness, [(number * MIB, MIB, number + 1) for number in range(3)], "raw")
        assert images.compare(overlay, witness, "qcow2", "raw")
        old_comment = f"{workdir}/vda.qcow2.old"
        assert kind != "sh" or old_comment in vm.file.read_text()


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_a_second_snapshot_and_the_way_back(workdir: Path, fmt: str) -> None:
    """The process still has its first command line; the file names the first overlay already."""
    base, first, second = images.create(workdir / "vda.img", 8 * MIB, fmt), workdir / "s1.qcow2", workdir / "s2.qcow2"
    with booted(workdir, "sh", SPELLINGS["drive"][1](base, fmt), ["vda"]) as vm:
        original = vm.file.read_bytes()
        for number, overlay in enumerate((first, second)):
            write(vm, "vda", number)
            (change,) = plan_definitions([str(vm.file)], moves(vm, {"vda": overlay}))
            write_definition(change)
            vm.snapshot(vm.observed()[0], overlay)
        write(vm, "vda", 2)
        assert [drift.new for drift in vm.drift()] == [str(second)]
        vm.kill9()
        vm.start()
        assert holds(vm, "vda", 3)
        vm.command("block-commit", device=vm.active_node("vda"), job_id="j")
        vm.wait_event("BLOCK_JOB_READY")
        (drive,) = vm.observed()
        vm.command("block-job-complete", device="j")
        vm.wait_event("BLOCK_JOB_COMPLETED")
        (drive,) = vm.observed()
        assert drive.active.file == str(base)
        (drift,) = vm.drift()
        assert (drift.old, drift.new) == (str(second), str(base))
        (change,) = plan_definitions([str(vm.file)], moves_to(drive, vm.startup(), str(base), fmt))
        write_definition(change)
        assert vm.file.read_bytes() == original
        vm.kill9()
        vm.start()
        assert holds(vm, "vda", 3)
        assert vm.drift() == ()


def test_two_drives_that_swapped_their_images(workdir: Path) -> None:
    a, b = (images.create(workdir / f"{name}.qcow2", 8 * MIB) for name in "ab")
    images.fill(a, [(0, MIB, 1)])
    images.fill(b, [(0, MIB, 2)])
    spell = "-drive if=none,file={},format=qcow2,id=d{n} -device virtio-blk-pci,drive=d{n},id=vd{n}"
    arguments = f"{spell.format(a, n=0)} {spell.format(b, n=1)}"
    with booted(workdir, "sh", arguments, ["vd0", "vd1"]) as vm:
        startup, drives = vm.startup(), vm.observed()
        swap = [move for drive, new in zip(drives, (b, a)) for move in moves_to(drive, startup, str(new), "qcow2")]
        (change,) = plan_definitions([str(vm.file)], swap)
        write_definition(change)
        (again,) = plan_definitions([str(vm.file)], swap)
        assert not again.changed
        vm.kill9()
        vm.start()
        assert vm.holds("vd0", 0, MIB, 2)
        assert vm.holds("vd1", 0, MIB, 1)


@pytest.mark.parametrize(
    "style",
    [
        {"style": "drive"},
        {"style": "legacy"},
        {"style": "legacy", "device": "ide-hd"},
        {"style": "drive", "device": "scsi-hd"},
        {"device": "nvme"},
        {"device": "ide-hd"},
        {"throttle_bps": 1 << 30},
        {"node_name": "renamed", "device": "scsi-hd"},
    ],
)
def test_drift_is_seen_whichever_way_a_drive_was_given(
    qemu_factory: QemuFactory, workdir: Path, style: dict[str, t.Any]
) -> None:
    base = images.create(workdir / "a,b.qcow2", 8 * MIB)
    vm = qemu_factory("vm", [LabDrive("vda", base, **style)])
    startup, reason = read_startup(Process(vm.pid, 0, 0))
    assert startup is not None and reason is None and startup.gaps == ()
    (drive,) = observed(vm)
    assert drifts(startup, [drive]) == ()
    overlay = workdir / "s1.qcow2"
    vm.command("blockdev-snapshot-sync", node_name=drive.active.node, snapshot_file=str(overlay), format="qcow2",
               snapshot_node_name="s1")  # fmt: skip
    assert drifts(startup, observed(vm)) == (Drift("vda", str(base), str(overlay), "qcow2", "qcow2"),)


def test_drives_without_any_name(qemu_factory: QemuFactory, workdir: Path) -> None:
    paths = [images.create(workdir / f"{name}.qcow2", 8 * MIB) for name in "abc"]
    extra = ["-hda", str(paths[0]), "-drive", f"if=virtio,format=qcow2,file={paths[1]}"]
    extra += ["-blockdev", f"qcow2,node-name=n,file.driver=file,file.filename={paths[2]}"]
    extra += ["-device", "virtio-blk-pci,drive=n", "-device", "ide-cd,bus=ide.1"]
    vm = qemu_factory("vm", [], extra_args=extra)
    startup = read_startup(Process(vm.pid, 0, 0))[0]
    assert startup is not None
    assert drifts(startup, observed(vm)) == ()
    for number, drive in enumerate(drive for drive in observed(vm) if drive.layers):
        vm.command("blockdev-snapshot-sync", node_name=drive.active.node, snapshot_file=str(workdir / f"{number}.s"),
                   format="qcow2", snapshot_node_name=f"s{number}")  # fmt: skip
    found = {drift.old: os.path.basename(drift.new) for drift in drifts(startup, observed(vm))}
    assert len(found) == 3
    assert found[str(paths[0])] in ("0.s", "1.s", "2.s")
    assert all(images.chain(workdir / name)[1] == old for old, name in found.items())


def test_temporary_overlays_of_qemu_are_no_drift(qemu_factory: QemuFactory, workdir: Path) -> None:
    base = images.create(workdir / "a.qcow2", 8 * MIB)
    vm = qemu_factory("vm", [LabDrive("vda", base, style="drive")], extra_args=["-snapshot"])
    startup = read_startup(Process(vm.pid, 0, 0))[0]
    assert startup is not None and observed(vm)[0].active.file != str(base)
    assert drifts(startup, observed(vm)) == ()


def test_a_drive_that_came_later_and_a_mirrored_one(qemu_factory: QemuFactory, workdir: Path) -> None:
    base, late = (images.create(workdir / f"{name}.qcow2", 8 * MIB) for name in ("a", "late"))
    vm = qemu_factory("vm", [LabDrive("vda", base)])
    startup = read_startup(Process(vm.pid, 0, 0))[0]
    assert startup is not None
    vm.command("blockdev-add", driver="qcow2", node_name="late", file={"driver": "file", "filename": str(late)})
    vm.command("device_add", driver="virtio-blk-pci", drive="late", id="vdb")
    assert drifts(startup, observed(vm)) == ()
    target = workdir / "copy.raw"
    vm.command("drive-mirror", device="vda-node", target=str(target), format="raw", sync="full", job_id="j",
               node_name="copy")  # fmt: skip
    vm.wait_event("BLOCK_JOB_READY")
    vm.command("block-job-complete", device="j")
    vm.wait_event("BLOCK_JOB_COMPLETED")
    assert drifts(startup, observed(vm)) == (Drift("vda", str(base), str(target), "qcow2", "raw"),)


def test_processes_that_tell_nothing(workdir: Path) -> None:
    for pid in (-1, 0, os.getpid(), 1 << 30):
        startup, reason = read_startup(Process(pid, 0, 0))
        assert startup is None
        assert reason


def test_several_files_links_and_files_of_others(workdir: Path) -> None:
    one, other, foreign, variables = (workdir / name for name in ("one", "other", "foreign", "variables"))
    variables.write_bytes(b"\0file=/vms/a \0")
    one.write_text("-hda /vms/a\n")
    other.write_text("-hdb /vms/b\n")
    foreign.write_bytes(b"\xff nothing of it\r\n")
    (workdir / "link").symlink_to("one")
    wanted = [Move(f"vd{name}", (f"/vms/{name}",), f"/vms/{name}1", "qcow2", "qcow2") for name in "abc"]
    files = [str(workdir / name) for name in ("link", "one", "other", "foreign", "variables")]
    changes = plan_definitions(files, wanted)
    assert [(change.real, change.changed, change.untouched) for change in changes] == [
        (str(one), True, False),
        (str(other), True, False),
        (str(foreign), False, True),
        (str(variables), False, False),
    ]
    assert unmentioned(changes, wanted) == ("vdc",)
    assert changes[0].texts() == ("-hda /vms/a\n", "-hda /vms/a1\n")
    kept = [write_definition(change) for change in changes]
    assert kept == [f"{one}.before-snapshot", f"{other}.before-snapshot", None, None]
    assert (workdir / "link").is_symlink() and one.read_text() == "-hda /vms/a1\n"
    for change, copy in zip(changes, kept):
        undo_definition(change, copy)
    assert (one.read_text(), other.read_text()) == ("-hda /vms/a\n", "-hdb /vms/b\n")
    assert sorted(os.listdir(workdir)) == ["foreign", "link", "one", "other", "variables"]


def test_one_unsafe_file_keeps_all_from_being_touched(workdir: Path) -> None:
    good, bad = workdir / "good", workdir / "bad"
    good.write_text("-drive file=/vms/a,format=raw\n")
    bad.write_text("DISK=/vms/a\n")
    move = Move("vda", ("/vms/a",), "/vms/a1", "raw", "qcow2")
    with pytest.raises(DefinitionUnsafe) as caught:
        plan_definitions([str(good), str(bad)], [move])
    assert caught.value.data["file"] == str(bad)
    assert "/vms/a1 (format qcow2) in place of /vms/a (format raw)" in str(caught.value)
    assert sorted(os.listdir(workdir)) == ["bad", "good"]


def test_a_file_that_changed_after_planning(workdir: Path) -> None:
    file = workdir / "vm"
    file.write_text("-hda /vms/a\n")
    (change,) = plan_definitions([str(file)], [Move("vda", ("/vms/a",), "/vms/b", "raw", "raw")])
    file.write_text("-hda /vms/a -m 1G\n")
    with pytest.raises(DefinitionChanged):
        write_definition(change)
    assert file.read_text() == "-hda /vms/a -m 1G\n"
