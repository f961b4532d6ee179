# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the doctor says of a QEMU, by tables."""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils import _ops
from ansible_collections.blockops.qemu.plugins.module_utils._block.graph import Bitmap
from ansible_collections.blockops.qemu.plugins.module_utils._ops.doctor_images import tight
from ansible_collections.blockops.qemu.plugins.module_utils._ops.doctor_qemu import inside_qemu
from ansible_collections.blockops.qemu.plugins.module_utils._ops.doctor_types import (
    SEVERITY,
    Finding,
    sorted_findings,
)
from ansible_collections.blockops.qemu.plugins.module_utils._ops.vm import Vm
from ansible_collections.blockops.qemu.plugins.module_utils._qmp.jobs import Job
from ansible_collections.blockops.qemu.plugins.module_utils._qmp.session import Process
from support.blocks import bitmap, drive, layer

REPOSITORY, BACKUP = "0123abcd", "20261123T054500Z-0000abcd"
TRACKING = f"bo-{REPOSITORY}-{BACKUP}"
RUN = f"bo-{REPOSITORY}-0000abcd-0"


def vm(*bitmaps: Bitmap, below: t.Sequence[Bitmap] = (), jobs: t.Sequence[Job] = (), nodes: t.Any = ()) -> Vm:
    one = drive(layer("/a1", *bitmaps, node="a1"), layer("/a0", *below, node="a0", read_only=True))
    by_id = {job.id: job for job in jobs}
    return Vm("vm", None, "running", "7.2.0", Process(1, 0, 0), (one,), by_id, ("a1", "a0", *nodes))


def job(name: str, status: str, **changes: t.Any) -> Job:
    return Job(name, "backup", status, 0, 1, **changes)


LOST = {"inconsistent": True, "recording": False}
TABLE: list[tuple[str, Vm, list[str]]] = [
    ("nothing", vm(), []),
    ("tracking", vm(bitmap(TRACKING), bitmap(f"{TRACKING}.1")), []),
    ("tracking, lost", vm(bitmap(TRACKING, **LOST)), [f"InconsistentBitmap {TRACKING}"]),
    ("no backup", vm(bitmap(TRACKING.replace("abcd", "abce"))), []),
    ("foreign", vm(bitmap("x")), ["ForeignBitmap x"]),
    ("foreign, lost", vm(bitmap("x", **LOST)), ["InconsistentBitmap x"]),
    ("foreign, below", vm(below=[bitmap("x")]), ["ForeignBitmap x"]),
    ("temporary", vm(bitmap(f"{RUN}-merge")), [f"BackupLeftover {RUN}-merge"]),
    ("node", vm(nodes=[f"{RUN}-target"]), [f"BackupLeftover {RUN}-target"]),
    ("backup runs", vm(bitmap(f"{RUN}-merge"), nodes=[f"{RUN}-target"], jobs=[job(f"{RUN}-copy", "running")]), []),
    ("backup ended", vm(jobs=[job(f"{RUN}-copy", "concluded")]), [f"BackupLeftover {RUN}-copy"]),
    ("backup stalled", vm(jobs=[job(f"{RUN}-copy", "paused", io_status="nospace")]), [f"StalledJob {RUN}-copy"]),
    ("paused by a user", vm(jobs=[job("x", "paused")]), []),
    ("ended", vm(jobs=[job("x", "concluded", error="No space")]), ["UndismissedJob x"]),
    ("merge ended", vm(jobs=[job("bos-0123abcd-commit", "concluded")]), []),
]


@pytest.mark.parametrize(("vm_", "found"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_is_inside_qemu(vm_: Vm, found: list[str]) -> None:
    known = {REPOSITORY: frozenset({BACKUP}), "ffffffff": frozenset()}
    assert [
        f"{one.kind} {one.object}" for one in inside_qemu(vm_, (), known if "abce" not in str(vm_) else {})
    ] == found


@pytest.mark.parametrize("name", [TRACKING, f"{TRACKING}.2", f"{TRACKING}@0123456789abcdef"])
def test_a_bitmap_of_no_backup(name: str) -> None:
    (found,) = inside_qemu(vm(bitmap(name)), (), {REPOSITORY: frozenset()})
    assert found.kind == "BitmapOfNoBackup" and "ours=true" in found.fix
    (below,) = inside_qemu(vm(below=[bitmap(name)]), (), {REPOSITORY: frozenset()})
    assert "qmp_dirty_bitmap" not in below.fix


@pytest.mark.parametrize(
    ("free", "size", "growth", "found"),
    [
        (4 << 30, 100 << 30, 10 << 30, True),
        (4 << 30, 100 << 30, 1 << 30, False),
        (6 << 30, 100 << 30, 10 << 30, False),
        (11 << 30, 1 << 40, 1 << 40, False),
        (9 << 30, 1 << 40, 1 << 40, True),
        (0, 1 << 40, 0, False),
    ],
)
def test_little_space(free: int, size: int, growth: int, found: bool) -> None:
    assert tight(free, size, growth) == found


def test_the_gravest_first_and_once() -> None:
    findings = [Finding(kind, "x", "w", "f") for kind in ("ForeignBitmap", "DeepChain", "WrongBacking", "DeepChain")]
    assert [finding.kind for finding in sorted_findings(findings)] == ["WrongBacking", "DeepChain", "ForeignBitmap"]


def test_every_kind_has_a_severity_and_is_documented() -> None:
    directory = Path(next(iter(_ops.__path__)))
    code = "".join(path.read_text() for path in directory.glob("doctor*.py"))
    used = set(re.findall(r'inding\(\s*"([A-Za-z]+)"', code))
    assert used == set(SEVERITY)
    text = (directory.parents[1] / "modules" / "qmp_vm_info.py").read_text()
    assert not [kind for kind in SEVERITY if f"V({kind})" not in text]
