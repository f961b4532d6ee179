# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each drive gets, and why: a table of situations."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.fitness import fitness
from ansible_collections.blockops.qemu.plugins.module_utils._block.graph import Drive
from ansible_collections.blockops.qemu.plugins.module_utils._block.names import bitmap_name
from ansible_collections.blockops.qemu.plugins.module_utils._ops.backup_plan import Candidate, DrivePlan, plan_drive
from ansible_collections.blockops.qemu.plugins.module_utils._repository.manifest import DriveRecord, SourceRecord
from support.blocks import MIB, bitmap, drive, layer

REPOSITORY = "0123abcd"
FULL, NEWEST = "20261101T000000Z-00000001", "20261102T000000Z-00000002"


def candidate(
    backup: str = NEWEST, level: str = "incremental", defect: str | None = None, **changes: t.Any
) -> Candidate:
    record: dict[str, t.Any] = {
        "name": "vda", "file": "vda.qcow2", "level": level, "virtual_size": 64 * MIB, "size": MIB, "copied": MIB,
        "source": SourceRecord("/vms/a.qcow2", "qcow2"), **changes,
    }  # fmt: skip
    return Candidate(backup, DriveRecord(**record), defect)


def tracked(*backups: str, **changes: t.Any) -> Drive:
    return drive(layer("/vms/a.qcow2", *(bitmap(bitmap_name(REPOSITORY, b), **changes) for b in backups)))


def plan(subject: Drive, *candidates: Candidate, level: str = "auto", repository: str | None = REPOSITORY) -> DrivePlan:
    return plan_drive(subject, fitness(subject), level, candidates, repository)


def test_from_the_newest_backup() -> None:
    made = plan(tracked(NEWEST, FULL), candidate(), candidate(FULL, "full"))
    assert (made.level, made.sync, made.parent, made.reason) == ("incremental", "bitmap", NEWEST, None)
    assert made.merge == (("node of /vms/a.qcow2", bitmap_name(REPOSITORY, NEWEST)),)
    assert (made.track, made.persistent, made.bytes_bound, made.lost) == (True, True, MIB, False)
    assert made.reservation > made.bytes_bound


def test_differential_is_from_the_newest_full() -> None:
    made = plan(tracked(NEWEST, FULL), candidate(), candidate(FULL, "full"), level="differential")
    assert (made.level, made.parent) == ("differential", FULL)


def test_a_damaged_newest_is_passed_over_for_its_full() -> None:
    made = plan(tracked(NEWEST, FULL), candidate(defect="gone"), candidate(FULL, "full"))
    assert (made.level, made.parent) == ("incremental", FULL)
    assert "gone" in str(made.reason) and NEWEST in str(made.reason)


FALLBACKS: dict[str, tuple[Drive, Candidate, str]] = {
    "absent": (tracked(), candidate(), "there is no bitmap"),
    "of another repository": (
        drive(layer("/vms/a.qcow2", bitmap(bitmap_name("ffffffff", NEWEST)))),
        candidate(),
        "there is no bitmap",
    ),
    "of another backup": (tracked(FULL), candidate(), "there is no bitmap"),
    "inconsistent": (tracked(NEWEST, inconsistent=True, recording=False), candidate(), "inconsistent"),
    "busy": (tracked(NEWEST, busy=True), candidate(), "in use"),
    "disabled": (tracked(NEWEST, recording=False), candidate(), "disabled"),
    "damaged": (tracked(NEWEST), candidate(defect="vda.qcow2 is missing"), "vda.qcow2 is missing"),
    "shrunk": (tracked(NEWEST), candidate(virtual_size=65 * MIB), "shrunk"),
    "raw and restarted": (drive(layer("/vms/a.qcow2", driver="raw", compat=None)), candidate(), "restarted"),
    "raw and grown": (
        drive(layer("/vms/a.qcow2", bitmap(bitmap_name(REPOSITORY, NEWEST)), driver="raw", compat=None)),
        candidate(virtual_size=63 * MIB),
        "grown",
    ),
    "another image": (
        drive(layer("/vms/b.qcow2", bitmap(bitmap_name(REPOSITORY, NEWEST)))),
        candidate(),
        "no longer in the drive's chain",
    ),
    "an overlay without": (
        drive(layer("/vms/over.qcow2"), layer("/vms/a.qcow2", bitmap(bitmap_name(REPOSITORY, NEWEST)))),
        candidate(),
        "/vms/over.qcow2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("situation", FALLBACKS)
@pytest.mark.parametrize("level", ["auto", "incremental"])
def test_a_full_with_the_reason(situation: str, level: str) -> None:
    subject, newest, says = FALLBACKS[situation]
    made = plan(subject, newest, level=level)
    assert (made.level, made.sync, made.parent, made.lost, made.track) == ("full", "full", None, True, True)
    assert says in str(made.reason)


@pytest.mark.parametrize(
    ("options", "level", "reason", "track"),
    [
        ({}, "full", "no earlier backup", True),
        ({"repository": None}, "full", "no earlier backup", True),
        ({"level": "differential"}, "full", "no earlier backup", True),
        ({"level": "full"}, "full", None, True),
        ({"level": "copy"}, "copy", None, False),
    ],
)
def test_without_a_backup_to_follow(options: dict[str, t.Any], level: str, reason: str | None, track: bool) -> None:
    made = plan(tracked(), **options)
    assert (made.level, made.track, made.lost) == (level, track, False)
    assert made.reason is None if reason is None else reason in str(made.reason)


def test_a_read_only_drive_is_never_tracked() -> None:
    made = plan(drive(layer(read_only=True)), candidate())
    assert (made.level, made.track, made.lost) == ("full", False, False)
    assert "read-only" in str(made.reason)


def test_all_layers_since_the_parent_are_merged() -> None:
    name, above = (bitmap_name(REPOSITORY, NEWEST, number) for number in (0, 1))
    top = layer("/vms/over.qcow2", bitmap(above, granularity=32768))
    made = plan(drive(top, layer("/vms/a.qcow2", bitmap(name, recording=False)), layer("/vms/base.qcow2")), candidate())
    assert made.merge == (("node of /vms/over.qcow2", above), ("node of /vms/a.qcow2", name))
    assert (made.granularity, made.bytes_bound) == (32768, 2 * MIB)


def test_a_qcow2_that_grew_goes_on() -> None:
    assert plan(tracked(NEWEST), candidate(virtual_size=32 * MIB)).level == "incremental"
