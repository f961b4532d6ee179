# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Booted guests at once: boot one, keep its state in the cache, start copies with ``-incoming``.

A booted copy answers its agent in 0.25 s instead of 5. The state belongs to one QEMU version and one number of disks.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lab.cache import built_once
from lab.drive import Drive
from lab.guard import workspace
from lab.guest import guest_image
from lab.process import LabError
from lab.qemu import system_binary
from lab.qmp import Qmp
from lab.vm import DISK_SIZE, LabVm, data_drives, definition_text
from lab.vmctl import Vm


def saved_guest(disks: int = 1, size: int = DISK_SIZE) -> Path:
    """Directory in the cache with ``state`` and the disks vda.qcow2, ... as they were at that moment."""
    image = guest_image()
    version = subprocess.run([system_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    machine = inspect.getsource(definition_text) + inspect.getsource(Vm.argv)
    key = f"{version}{image.kernel}{image.initrd.stat().st_mtime_ns}{disks}{size}{machine}"
    entry = f"state-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return built_once(entry, lambda _work, target: _save(target, disks, size))


def _save(target: Path, disks: int, size: int) -> None:
    with workspace() as directory:
        drives = data_drives("boot", directory, disks, size)
        with LabVm("boot", directory, definition_text(drives, guest_image())) as vm:
            vm.wait_agent()
            vm.exec("sync")
            with Qmp(vm.control_socket) as monitor:
                # migrated while running: the copy continues by itself
                monitor.execute("migrate", {"uri": f"exec:cat >{target / 'state'}"})
                _migrated(monitor, 60.0)
                monitor.execute("quit")
            vm.stop()
        for drive in drives:
            shutil.move(str(drive.image), target / f"{drive.id}.qcow2")


def _migrated(monitor: Qmp, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        status = monitor.execute("query-migrate").get("status")
        if status == "completed":
            return
        if status in ("failed", "cancelled") or time.monotonic() > deadline:
            raise LabError(f"migration: {status}")
        time.sleep(0.005)


def instant_vm(name: str, directory: str | Path, disks: int = 1, size: int = DISK_SIZE) -> LabVm:
    """A running, booted VM with its own copies of the disks in ``directory``; close it (or use ``with``-exit) later."""
    directory = Path(directory).absolute()
    saved = saved_guest(disks, size)
    drives = []
    for number in range(disks):
        device = f"vd{chr(ord('a') + number)}"
        image = directory / f"{name}-{device}.qcow2"
        shutil.copy(saved / f"{device}.qcow2", image)
        drives.append(Drive(device, image, serial=device))
    vm = LabVm(name, directory, definition_text(drives, guest_image()))
    vm.start("-incoming", f"exec:cat {saved / 'state'}")
    return vm


@contextmanager
def instant_vms(count: int, directory: str | Path, disks: int = 1, size: int = DISK_SIZE) -> Iterator[list[LabVm]]:
    """``count`` booted VMs vm0, vm1, ... whose agents answer."""
    with ExitStack() as stack:
        vms = []
        for number in range(count):
            vm = instant_vm(f"vm{number}", directory, disks, size)
            stack.callback(vm.close)
            vms.append(vm)
        for vm in vms:
            vm.wait_agent()
        yield vms
