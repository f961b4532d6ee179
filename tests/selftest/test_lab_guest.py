# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""The lab's guests, the tool that starts them, and the promise that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import filesystem, vmctl
from lab.drive import Drive
from lab.fixtures import LabVmFactory
from lab.guest import GuestImage
from lab.process import LabError, interruptible
from lab.qmp import QmpError
from lab.reaper import processes_with
from lab.vm import LabVm, data_drives, definition_text

TESTS = Path(__file__).resolve().parent.parent


def run_vmctl(action: str, definition: Path, *more: str) -> int:
    """Exit code of the tool, run as an administrator runs it: from anywhere, by path."""
    return subprocess.run(
        [sys.executable, vmctl.__file__, action, str(definition), *more], check=False, cwd="/"
    ).returncode


def test_a_guest_boots_writes_and_powers_off(workdir: Path, guest_image: GuestImage) -> None:
    with LabVm("vm", workdir, disks=2) as vm:
        vm.wait_agent()
        vm.write_file("/mnt/vda/a", b"one")
        vm.write_file("/mnt/vdb/b", b"two")
        assert vm.read_file("/mnt/vda/a") == b"one"
        assert vm.sha256("/mnt/vdb/b") == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"
        with pytest.raises(LabError, match="exit 3"):
            vm.exec("exit 3")
        begin = time.monotonic()
        vm.stop(60)
        assert time.monotonic() - begin < 60  # by the power button, not by quit
        assert vm.pid is None
    assert not filesystem.needs_recovery(workdir / "vm-vda.qcow2")
    assert filesystem.read_file(workdir / "vm-vdb.qcow2", "/b") == b"two"


def test_freeze_and_thaw_with_a_hook(lab_vm_factory: LabVmFactory) -> None:
    vm = lab_vm_factory("vm", disks=2)
    assert vm.agent("guest-fsfreeze-freeze") == 2
    with pytest.raises(QmpError, match=r"frozen|disabled"):
        vm.exec("true")
    assert vm.agent("guest-fsfreeze-status") == "frozen"
    assert vm.agent("guest-fsfreeze-thaw") == 2
    vm.thaw()
    assert vm.exec("cat /run/fsfreeze.log").split() == ["freeze", "thaw", "thaw"]


def test_a_hook_can_refuse_the_freeze(lab_vm_factory: LabVmFactory) -> None:
    vm = lab_vm_factory()
    vm.write_file("/run/hook", b'#!/bin/sh\n[ "$1" != freeze ]\n')
    vm.exec("chmod +x /run/hook")
    with pytest.raises(QmpError):
        vm.agent("guest-fsfreeze-freeze")
    assert vm.agent("guest-fsfreeze-status") == "thawed"


def test_a_power_cut_leaves_a_journal_to_replay(workdir: Path, lab_vm_factory: LabVmFactory) -> None:
    vm = lab_vm_factory()
    vm.write_file("/mnt/vda/n", b"1")
    vm.kill()
    assert filesystem.needs_recovery(workdir / "vm-vda.qcow2")
    assert filesystem.is_sound(workdir / "vm-vda.qcow2")
    assert filesystem.read_file(workdir / "vm-vda.qcow2", "/n") == b"1"
    vm.start()
    vm.wait_agent()
    assert vm.read_file("/mnt/vda/n") == b"1"


def test_other_controllers_show_their_disks(workdir: Path, guest_image: GuestImage) -> None:
    image = data_drives("vm", workdir)[0].image
    with LabVm("vm", workdir, definition_text([Drive("s", image, device="scsi-hd")], guest_image)) as vm:
        vm.wait_agent()
        assert vm.exec("ls /mnt").split() == ["sda"]


def test_vmctl_exit_codes(workdir: Path, guest_image: GuestImage) -> None:
    vm = LabVm("vm", workdir)
    definition = vm.definition
    try:
        assert run_vmctl("status", definition) == vmctl.NOT_RUNNING
        assert run_vmctl("stop", definition) == 0
        assert run_vmctl("start", definition) == 0
        assert run_vmctl("start", definition) == vmctl.RUNNING
        assert run_vmctl("status", definition) == 0
        assert run_vmctl("stop", definition, "--timeout", "0.1") == 0  # still in its BIOS: quit
        assert run_vmctl("status", definition) == vmctl.NOT_RUNNING
        assert run_vmctl("start", definition, "--", "-S") == 0
        assert run_vmctl("kill", definition) == 0
        assert run_vmctl("start", definition, "--", "-no-such-option") == vmctl.FAILED
        definition.write_text("# comment\nnot an option\n", encoding="utf-8")
        assert run_vmctl("start", definition) == vmctl.BAD_DEFINITION
    finally:
        vm.close()


ORPHANING_PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from lab.daemon import StorageDaemon
from lab.guard import workspace
from lab.qemu import Qemu
from lab.vm import LabVm, data_drives, definition_text
with workspace() as directory:
    with Qemu("q", [], directory), StorageDaemon("d", directory), LabVm("v", directory):
        print(directory, flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_behind_when_the_parent_dies(number: signal.Signals, guest_image: GuestImage) -> None:
    argv = interruptible([sys.executable, "-c", ORPHANING_PARENT, str(TESTS)])
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdout is not None
        directory = parent.stdout.readline().strip()
        assert len(processes_with(directory)) == 3
        os.kill(parent.pid, number)
        parent.wait(30)
    deadline = time.monotonic() + 10
    while (processes_with(directory) or Path(directory).exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes_with(directory) == []
    assert not Path(directory).exists()
