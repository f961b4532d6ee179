# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from datetime import datetime, timezone

from ansible_collections.blockops.qemu.plugins.module_utils._block.names import bitmap_name, object_name
from ansible_collections.blockops.qemu.plugins.module_utils._ops.leftovers import Scope, find
from ansible_collections.blockops.qemu.plugins.module_utils._repository.manifest import DriveRecord, Manifest
from support.blocks import bitmap, drive, layer

OURS, OTHERS = "0123abcd", "ffffffff"
FULL, OLD, NEWEST, RUNNING = (f"2026110{n}T000000Z-0000000{n}" for n in (1, 2, 3, 4))
NOW = datetime(2026, 11, 5, tzinfo=timezone.utc)


def manifest(number: int, backup: str, level: str, parent: str | None) -> Manifest:
    record = DriveRecord("vda", "vda.qcow2", level, 1 << 20, 1, 1, parent)
    return Manifest(
        backup, OURS, number, "vm", None, level, "full", "crash", NOW, NOW, NOW, (record,)
    )  # fmt: skip


CHAIN = (
    manifest(1, FULL, "full", None),
    manifest(2, OLD, "incremental", FULL),
    manifest(3, NEWEST, "incremental", OLD),
)
ALL = [bitmap_name(OURS, backup) for backup in (FULL, OLD, NEWEST, RUNNING)]
FOREIGN = ["bitmap0", bitmap_name(OTHERS, FULL)]
NODES = [object_name(OURS, RUNNING, 0, "file"), object_name(OURS, RUNNING, 0, "target"), "vda-node", "#block1"]
JOBS = [object_name(OURS, RUNNING, 0, "job"), object_name(OTHERS, RUNNING, 0, "job"), "backup-of-others"]
DRIVES = [drive(layer("/vms/a.qcow2", *map(bitmap, [*ALL, *FOREIGN, object_name(OURS, RUNNING, 0, "tmp")])))]


def names(scope: Scope) -> set[str]:
    return {name for _node, name in find(scope, DRIVES, NODES, JOBS).bitmaps}


def test_everything_of_ours_that_nothing_needs() -> None:
    found = find(Scope(OURS, CHAIN), DRIVES, NODES, JOBS)
    assert found.jobs == (JOBS[0],)
    assert found.nodes == (NODES[1], NODES[0])  # the image before its file
    assert names(Scope(OURS, CHAIN)) == {
        bitmap_name(OURS, OLD), bitmap_name(OURS, RUNNING), object_name(OURS, RUNNING, 0, "tmp")
    }  # fmt: skip
    assert len(found.sentences()) == 6


def test_a_run_that_is_adopted_is_spared() -> None:
    found = find(Scope(OURS, CHAIN, spare=frozenset({"00000004"})), DRIVES, NODES, JOBS)
    assert (found.jobs, found.nodes) == ((), ())
    assert names(Scope(OURS, CHAIN, spare=frozenset({"00000004"}))) == {bitmap_name(OURS, OLD)}


def test_unwinding_one_run_touches_nothing_else() -> None:
    assert names(Scope(OURS, only="00000004")) == {bitmap_name(OURS, RUNNING), object_name(OURS, RUNNING, 0, "tmp")}


def test_an_empty_repository_needs_no_bitmaps_but_foreign_ones_stay() -> None:
    assert names(Scope(OURS)) == {*ALL, object_name(OURS, RUNNING, 0, "tmp")}
    assert find(Scope("00000000"), DRIVES, NODES, JOBS).sentences() == []
