# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""The lab itself: a test that trusts a broken oracle proves nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lab import images
from lab.daemon import StorageDaemon
from lab.drive import Drive
from lab.fixtures import QemuFactory
from lab.process import LabError
from lab.qemu import Qemu
from lab.qmp import Qmp, QmpError

MIB = 1024 * 1024


@pytest.fixture
def disk(workdir: Path) -> Path:
    """An empty 64 MiB qcow2."""
    return images.create(workdir / "disk.qcow2", 64 * MIB)


def test_qemu_starts_fast_and_quits_cleanly(workdir: Path, disk: Path) -> None:
    begin = time.monotonic()
    with Qemu("vm", [Drive("vda", disk)], workdir) as qemu:
        assert time.monotonic() - begin < 5  # 0.1 s on an idle machine
        pid = qemu.pid
        assert qemu.node_names() == sorted(["vda-node", *[n for n in qemu.node_names() if n.startswith("#block")]])
        assert qemu.jobs() == []
        assert qemu.quit() == 0
    assert not Path(f"/proc/{pid}").exists()


def test_the_first_monitor_is_left_to_the_product(workdir: Path, disk: Path) -> None:
    with Qemu("vm", [Drive("vda", disk)], workdir) as qemu, Qmp(qemu.socket) as product:
        assert product.command("query-name") == {"name": "vm"} == qemu.command("query-name")


def test_a_single_monitor_can_be_shared_in_turns(workdir: Path) -> None:
    with Qemu("vm", [], workdir, second_monitor=False) as qemu:
        with Qmp(qemu.socket, timeout=5) as product:
            product.command("query-status")
        assert qemu.command("query-status")["running"] is False
        with pytest.raises(TimeoutError):
            Qmp(qemu.socket, timeout=0.2)  # the control monitor occupies it now
        qemu.detach()
        Qmp(qemu.socket, timeout=5).close()


def test_a_failed_start_tells_what_qemu_said(workdir: Path) -> None:
    with pytest.raises(LabError, match="No such file"):
        Qemu("vm", [Drive("vda", workdir / "missing.qcow2")], workdir).start()


def test_commands_that_qemu_refuses_raise(qemu_factory: QemuFactory) -> None:
    with pytest.raises(QmpError, match="CommandNotFound"):
        qemu_factory("vm").command("no-such-command")


DRIVES = {
    "virtio-blk": Drive("d", "IMAGE"),
    "virtio-scsi": Drive("d", "IMAGE", device="scsi-hd", serial="S1"),
    "ide": Drive("d", "IMAGE", device="ide-hd"),
    "nvme": Drive("d", "IMAGE", device="nvme"),
    "usb": Drive("d", "IMAGE", device="usb-storage", removable=True),
    "drive": Drive("d", "IMAGE", style="drive"),
    "drive with node name": Drive("d", "IMAGE", style="drive", node_name="named"),
    "legacy virtio": Drive("d", "IMAGE", style="legacy"),
    "legacy ide": Drive("d", "IMAGE", style="legacy", device="ide-hd"),
    "throttled": Drive("d", "IMAGE", throttle_bps=1_000_000_000),
    "throttled drive": Drive("d", "IMAGE", style="drive", throttle_bps=1_000_000_000),
    "named file node": Drive("d", "IMAGE", file_options={"node-name": "f0"}),
    "json file name": Drive("d", 'json:{"driver":"qcow2","file":{"driver":"file","filename":"IMAGE"}}', style="drive"),
}


@pytest.mark.parametrize("kind", DRIVES)
def test_writes_reach_the_image_on_every_kind_of_drive(
    kind: str, workdir: Path, disk: Path, qemu_factory: QemuFactory
) -> None:
    template = DRIVES[kind]
    drive = Drive(**{**vars(template), "image": str(template.image).replace("IMAGE", str(disk))})
    qemu = qemu_factory("vm", [drive])
    qemu.write("d", MIB, 65536, 0x5A)
    assert qemu.holds("d", MIB, 65536, 0x5A)
    assert not qemu.holds("d", 2 * MIB, 65536, 0x5A)
    node = qemu.active_node("d")
    qemu.command("block-dirty-bitmap-add", node=node, name="b")
    assert set(qemu.bitmaps("d")) == {"b"}
    qemu.quit()
    images.fill(workdir / images.create(workdir / "expected.qcow2", 64 * MIB), [(MIB, 65536, 0x5A)])
    assert images.compare(disk, workdir / "expected.qcow2")


def test_a_write_that_fails_is_noticed(disk: Path, qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("vm", [Drive("vda", disk)])
    with pytest.raises(LabError, match="Input/output error"):
        qemu.write("vda", 128 * MIB, 65536, 1)


def test_cdroms_and_firmware(workdir: Path, qemu_factory: QemuFactory) -> None:
    for number in range(2):
        images.create(workdir / f"fw{number}.raw", 256 * 1024, "raw")
    iso = images.create(workdir / "a,b.iso", MIB, "raw")
    drives = [Drive(f"fw{n}", workdir / f"fw{n}.raw", "raw", device=f"pflash{n}", readonly=n == 0) for n in range(2)]
    drives += [Drive("cd0", None, device="ide-cd"), Drive("cd1", iso, "raw", device="scsi-cd")]
    drives += [
        Drive("cd2", iso, "raw", device="ide-cd", style="drive"),
        Drive("cd3", None, "raw", "ide-cd", "drive", device_options={"bus": "ide.0"}),
    ]
    qemu = qemu_factory("vm", drives)
    assert "inserted" not in qemu.block("cd0")
    assert "inserted" not in qemu.block("cd3")
    assert qemu.block("cd1")["inserted"]["ro"] is True
    assert {"fw0-node", "fw1-node", "cd1-node"} <= set(qemu.node_names())


def test_chains_and_external_data_files(workdir: Path, qemu_factory: QemuFactory) -> None:
    base = images.create(workdir / "base.qcow2", 16 * MIB)
    images.fill(base, [(0, MIB, 1)])
    top = images.create(workdir / "top.qcow2", backing="base.qcow2")
    data = images.create(workdir / "meta.qcow2", 16 * MIB, data_file=workdir / "data.raw", data_file_raw=True)
    qemu = qemu_factory("vm", [Drive("vda", top), Drive("vdb", data)])
    assert qemu.holds("vda", 0, MIB, 1)
    qemu.write("vdb", 0, 65536, 2)
    qemu.quit()
    assert [Path(name).name for name in images.chain(top)] == ["top.qcow2", "base.qcow2"]
    assert (workdir / "data.raw").read_bytes()[:65536] == b"\2" * 65536


def test_persistent_bitmaps_survive_quit_but_not_kill(disk: Path, qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("vm", [Drive("vda", disk)])
    qemu.command("block-dirty-bitmap-add", node="vda-node", name="b", persistent=True)
    qemu.write("vda", 0, 65536, 1)
    qemu.restart()
    assert qemu.bitmaps("vda")["b"]["count"] == 65536
    assert "auto" in images.bitmaps(disk)["b"]
    qemu.kill9()
    qemu.restart()
    assert qemu.bitmaps("vda")["b"]["inconsistent"] is True


def test_events_are_kept_until_somebody_waits(workdir: Path, disk: Path, qemu_factory: QemuFactory) -> None:
    images.create(workdir / "target.qcow2", 64 * MIB)
    qemu = qemu_factory("vm", [Drive("vda", disk)])
    target = {
        "driver": "qcow2",
        "node-name": "t",
        "file": {"driver": "file", "filename": str(workdir / "target.qcow2")},
    }
    qemu.execute("blockdev-add", target)
    qemu.write("vda", 0, MIB, 7)
    qemu.command("blockdev-backup", device="vda-node", target="t", sync="full", job_id="j")
    qemu.wait_event("JOB_STATUS_CHANGE", id="j", status="null")
    assert qemu.control.events  # earlier states are still there
    with pytest.raises(TimeoutError):
        qemu.wait_event("SHUTDOWN", timeout=0.05)
    qemu.quit()
    assert images.compare(disk, workdir / "target.qcow2")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_qemu_runs_as_another_user(disk: Path, qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("vm", [Drive("vda", disk)], user=65534)
    assert Path(f"/proc/{qemu.pid}").stat().st_uid == 65534
    qemu.write("vda", 0, 65536, 1)
    with Qmp(qemu.socket) as product:
        assert product.command("query-status")["running"] is False


def test_the_storage_daemon_serves_qmp(workdir: Path, disk: Path) -> None:
    node = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": str(disk)}}
    with StorageDaemon("sd", workdir, [node]) as daemon, Qmp(daemon.socket) as product:
        assert "n" in daemon.node_names()
        assert product.command("query-jobs") == []


def test_random_data_is_deterministic_and_unique(workdir: Path) -> None:
    paths = [images.create(workdir / f"{name}.qcow2", 32 * MIB) for name in ("a", "b", "c")]
    for path, seed in zip(paths, (1, 1, 2)):
        images.fill_random(path, 20 * MIB, seed)
    assert images.compare(paths[0], paths[1])
    assert not images.compare(paths[0], paths[2])
    images.fill_random(workdir / "d.raw", 20 * MIB, 1, fmt="raw")
    images.run_tool("qemu-img", "resize", "-q", "-f", "raw", workdir / "d.raw", "32M")
    assert images.compare(paths[0], workdir / "d.raw", fmt_b="raw")
    assert images.check(paths[0])["check-errors"] == 0
    blocks = (workdir / "d.raw").read_bytes()[: 20 * MIB]
    assert len({blocks[at : at + 4096] for at in range(0, 20 * MIB, 4096)}) == 5120
