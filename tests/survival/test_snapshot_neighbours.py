# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs whose images lie in one directory, with drives and even overlays of one name."""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from lab.qemu import Drive, Qemu
from support.killer import Trap, prelude
from support.module import Result, run_module, start_module

MIB, UNIT = 1 << 20, 64 << 10


@pytest.fixture
def vms(workdir: Path, qemu_factory: QemuFactory) -> list[Qemu]:
    made = []
    for name in ("a", "b", "c", "d"):
        made.append(qemu_factory(name, [Drive("vda", images.create(workdir / f"{name}.qcow2", 4 * MIB))], paused=False))
    return made


def params(vms: t.Sequence[Qemu], **options: t.Any) -> dict[str, t.Any]:
    entries = [{"name": vm.name, "socket": str(vm.socket)} for vm in vms]
    return {"name": "s", "quiesce": "off", "overlay_name": "{drive}.{name}.qcow2", "vms": entries, **options}


def expect_whole(vms: t.Sequence[Qemu], directory: Path) -> None:
    """Each VM writes into a file of its own that has a name, and reads it again."""
    for number, vm in enumerate(vms):
        vm.write("vda", number * UNIT, UNIT, 0x31 + number)
    for number, vm in enumerate(vms):
        assert vm.holds("vda", number * UNIT, UNIT, 0x31 + number)
        links = [str(link.readlink()) for link in Path(f"/proc/{vm.pid}/fd").iterdir() if link.is_symlink()]
        assert not [link for link in links if re.search(r"\.qcow2 \(deleted\)", link)], links
    assert not list(directory.glob("*.new"))


@pytest.mark.parametrize("round_", range(3))
def test_one_task_for_all(vms: list[Qemu], workdir: Path, round_: int) -> None:
    """Whoever loses the race for a name is told, and nobody's file is touched; run again, all have theirs."""
    result = run_module("qmp_snapshot", params(vms, max_parallel=4))
    for vm in result.data["vms"]:
        assert "error" not in vm or vm["error"]["kind"] == "SnapshotFailed", vm
    expect_whole(vms, workdir)
    for vm in run_module("qmp_snapshot", params(vms, max_parallel=1)).ok().data["vms"]:
        assert vm["status"] in ("taken", "present")
    expect_whole(vms, workdir)
    run_module("qmp_snapshot", params(vms, state="absent")).ok()
    expect_whole(vms, workdir)
    for number, vm in enumerate(vms):
        vm.quit()
        assert images.info(workdir / f"{vm.name}.qcow2").get("backing-filename") is None, number


def test_two_tasks_at_the_same_moment(vms: list[Qemu], workdir: Path) -> None:
    """One is stopped right before it makes its file; the other takes the name meanwhile."""
    first = start_module("qmp_snapshot", params(vms[:1]), prelude=prelude(Trap(label="file open in _claim", sends=19)))
    try:
        while Path(f"/proc/{first.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            assert first.process.poll() is None
        second: Result = run_module("qmp_snapshot", params(vms[1:2])).ok()
    finally:
        first.process.send_signal(18)
    ended = first.finish()
    assert second.data["vms"][0]["status"] == "taken"
    assert ended.failed or ended.data["vms"][0]["status"] == "taken"
    expect_whole(vms, workdir)


def test_the_default_names_are_each_vms_own(vms: list[Qemu], workdir: Path) -> None:
    options = {key: value for key, value in params(vms, max_parallel=4).items() if key != "overlay_name"}
    predicted = run_module("qmp_snapshot", options, check=True).ok().data["vms"]
    taken = run_module("qmp_snapshot", options).ok().data["vms"]
    for said, did in zip(predicted, taken):
        assert said["drives"] == did["drives"]
        assert did["drives"][0]["overlay"] == str(workdir / f"{did['name']}-vda.s.qcow2")
    expect_whole(vms, workdir)
