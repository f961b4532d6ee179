# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Fixtures that every test may use: short temporary directories and real QEMUs that go away again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lab.drive import Drive
from lab.fixtures import LabVmFactory, QemuFactory
from lab.guard import leftovers, workspace
from lab.guest import GuestImage
from lab.guest import guest_image as build_guest_image
from lab.instant import instant_vm
from lab.qemu import Qemu
from lab.vm import LabVm


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay with one worker, as they share its fixtures; integration targets share nothing."""
    for item in items:
        if item.path.parent.name != "integration":
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}.{item.path.stem}"))


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """The suite must not leave a process of its own, whichever test started it."""
    yield
    left = leftovers()
    if left:
        pytest.fail(f"processes left behind: {left}")


@pytest.fixture
def workdir() -> Iterator[Path]:
    """A directory with a short path (UNIX sockets end at 108 bytes); its processes go with it."""
    with workspace() as directory:
        yield directory


@pytest.fixture
def qemu_factory(workdir: Path) -> Iterator[QemuFactory]:
    """Paused QEMUs in ``workdir``."""
    with ExitStack() as stack:

        def start(name: str, drives: Sequence[Drive] = (), /, **options: Any) -> Qemu:
            qemu = Qemu(name, drives, options.pop("directory", workdir), **options)
            stack.callback(qemu.close)
            qemu.start()
            return qemu

        yield start


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """Kernel and initramfs of the lab's guest, built into the cache by the first run."""
    return build_guest_image()


@pytest.fixture
def lab_vm_factory(workdir: Path, guest_image: GuestImage) -> Iterator[LabVmFactory]:
    """Booted VMs in ``workdir``, from a saved state unless ``instant=False``."""
    with ExitStack() as stack:

        def start(name: str = "vm", /, *, disks: int = 1, instant: bool = True) -> LabVm:
            if instant:
                vm = instant_vm(name, workdir, disks)
                stack.callback(vm.close)
            else:
                vm = stack.enter_context(LabVm(name, workdir, disks=disks))
            vm.wait_agent()
            return vm

        yield start
