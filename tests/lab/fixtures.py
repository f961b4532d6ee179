# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Types of the fixtures in conftest.py, for the annotations of tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from lab.drive import Drive
from lab.qemu import Qemu
from lab.vm import LabVm


class QemuFactory(Protocol):
    """Start a paused QEMU in the test's directory; it is closed after the test."""

    def __call__(self, name: str, drives: Sequence[Drive] = (), /, **options: Any) -> Qemu: ...


class LabVmFactory(Protocol):
    """Give a booted VM whose agent answers; it is closed after the test."""

    def __call__(self, name: str = "vm", /, *, disks: int = 1, instant: bool = True) -> LabVm: ...
