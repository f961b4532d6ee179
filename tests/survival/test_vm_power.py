# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stopping real QEMUs in every state, and waiting for real guests."""

from __future__ import annotations

import socket
import threading
import time
import typing as t
from pathlib import Path

from lab.fixtures import LabVmFactory, QemuFactory
from lab.qmp import Qmp
from lab.vm import LabVm
from support.module import Result, run_module


def power(state: str, *sockets: Path, check: bool = False, diff: bool = False, **more: t.Any) -> Result:
    params = {"state": state, "vms": [{"socket": str(path)} for path in sockets], "timeout": 10, **more}
    return run_module("qmp_vm_power", params, check=check, diff=diff)


def one(result: Result) -> dict[str, t.Any]:
    (vm,) = result.data["vms"]
    return t.cast("dict[str, t.Any]", vm)


def alive(pid: int | None) -> bool:
    """Zombies, which only their parent can bury, have no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_a_guest_shuts_down_by_itself(lab_vm_factory: LabVmFactory) -> None:
    vm = lab_vm_factory("web")
    vm.write_file("/mnt/vda/data", b"kept")
    pid = vm.pid
    predicted = power("stopped", vm.socket, check=True, diff=True).ok()
    assert predicted.changed
    assert one(predicted)["status"] == "running"
    assert alive(pid)
    done = power("stopped", vm.socket, diff=True).ok()
    assert done.changed
    assert (one(done)["name"], one(done)["status"], one(done)["ended"]) == ("web", "stopped", "powerdown")
    assert (
        done.data["diff"]
        == predicted.data["diff"]
        == {
            "before": {"web": {"status": "running"}},
            "after": {"web": {"status": "stopped"}},
        }
    )
    assert not alive(pid)
    again = power("stopped", vm.socket).ok()
    assert not again.changed
    assert one(again)["ended"] is None
    assert str(vm.socket) in one(again)["reason"]


def test_wait_for_a_booting_guest_and_its_agent(workdir: Path, guest_image: object) -> None:
    vm = LabVm("slow", workdir)
    starter = threading.Timer(1.0, vm.start)
    starter.start()
    try:
        result = power("running", vm.socket, wait_agent=True).ok()
        assert not result.changed
        assert (one(result)["status"], one(result)["agent"]) == ("running", True)
        assert one(result)["seconds"] > 1.0
        assert vm.exec("echo here").strip() == "here"
    finally:
        starter.join()
        vm.close()


def test_a_guest_that_ignores_the_button_is_switched_off(lab_vm_factory: LabVmFactory) -> None:
    vm = lab_vm_factory("deaf")
    vm.exec("rm /etc/acpi/PWRF/00000080")
    pid = vm.pid
    refused = power("stopped", vm.socket, powerdown_timeout=1, quit=False)
    assert one(refused)["error"]["kind"] == "VmStillRunning"
    assert "system_powerdown" in refused.msg
    assert alive(pid)
    assert vm.exec("echo on").strip() == "on"
    done = power("stopped", vm.socket, powerdown_timeout=1).ok()
    assert one(done)["ended"] == "quit"
    assert not alive(pid)


def test_a_guest_that_is_off_inside_of_its_qemu(workdir: Path, guest_image: object) -> None:
    with LabVm("stays", workdir) as vm:
        vm.command("set-action", shutdown="pause")  # as -no-shutdown does
        vm.wait_agent()
        pid = vm.pid
        done = power("stopped", vm.socket, quit=False).ok()
        assert one(done)["ended"] == "powerdown"
        assert not alive(pid)


def test_a_paused_qemu_is_not_waited_for(qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("paused")
    began = time.monotonic()
    refused = power("stopped", qemu.socket, quit=False)
    assert one(refused)["error"]["kind"] == "VmStillRunning"
    done = power("stopped", qemu.socket).ok()
    assert one(done)["ended"] == "quit"
    assert time.monotonic() - began < 20


def test_several_at_once_and_one_that_fails(qemu_factory: QemuFactory, workdir: Path) -> None:
    first, held, third = (qemu_factory(name) for name in ("first", "held", "third"))
    with Qmp(held.socket):
        result = power("stopped", first.socket, held.socket, third.socket, timeout=1)
    assert result.failed
    assert result.msg.startswith("1 of 3 VMs failed.")
    assert [vm["changed"] for vm in result.data["vms"]] == [True, False, True]
    assert result.data["vms"][1]["error"]["kind"] == "SocketBusy"
    assert power("stopped", held.socket).ok().changed


def test_a_dead_socket_is_a_stopped_vm(workdir: Path) -> None:
    path = workdir / "dead.qmp"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    result = power("stopped", path).ok()
    assert not result.changed
    assert "Nobody listens" in one(result)["reason"]


def test_what_does_not_run_is_told_in_time(qemu_factory: QemuFactory, workdir: Path) -> None:
    qemu = qemu_factory("waiting")
    missing = workdir / "missing.qmp"
    began = time.monotonic()
    result = power("running", qemu.socket, missing, running_timeout=1)
    assert time.monotonic() - began < 10
    assert [vm["error"]["kind"] for vm in result.data["vms"]] == ["VmNotRunning", "VmNotRunning"]
    assert "prelaunch" in result.data["vms"][0]["error"]["message"]
    looked = power("running", qemu.socket, missing, check=True).ok()
    assert [vm["status"] for vm in looked.data["vms"]] == ["prelaunch", "stopped"]


def test_an_agent_that_is_not_there(qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("dumb")
    qemu.command("cont")
    result = power("running", qemu.socket, wait_agent=True, running_timeout=1)
    assert one(result)["error"]["kind"] == "AgentUnusable"
    assert power("running", qemu.socket).ok().data["vms"][0]["agent"] is None


def test_something_else_on_the_socket(workdir: Path) -> None:
    path = workdir / "file.qmp"
    path.write_text("")
    for state in ("stopped", "running"):
        assert one(power(state, path))["error"]["kind"] == "NotQmp"
