# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tables: which drives take part in a snapshot inside images, and what is found of one name."""

from __future__ import annotations

import dataclasses
import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.graph import Drive, InternalSnapshot
from ansible_collections.blockops.qemu.plugins.module_utils._errors import BlockOpsError
from ansible_collections.blockops.qemu.plugins.module_utils._ops import snapshot_inside as common
from ansible_collections.blockops.qemu.plugins.module_utils._ops.snapshot_options import Scene, SnapshotOptions
from ansible_collections.blockops.qemu.plugins.module_utils._ops.vm import Vm, VmEntry
from ansible_collections.blockops.qemu.plugins.module_utils._qmp.session import Process
from support.blocks import drive, layer


def has(*snapshots: tuple[str, str, int]) -> dict[str, t.Any]:
    """Changes of a layer: it has these snapshots (id, name, size of the memory)."""
    return {"snapshots": tuple(InternalSnapshot(id_, name, size, 0) for id_, name, size in snapshots)}


def scene(*drives: Drive, name: str = "s1", **options: t.Any) -> Scene:
    vm = Vm("vm", None, "running", "7.2.0", Process(1, 0, 0), drives, {}, ())
    session: t.Any = None  # nothing is asked
    return Scene(session, vm, VmEntry("/run/vm.qmp"), SnapshotOptions(name, **options))


def named(name: str, *layers: t.Any, **changes: t.Any) -> Drive:
    return dataclasses.replace(drive(*layers, name=name), **changes)


GOOD = named("good", layer())


@pytest.mark.parametrize(
    ("other", "kind", "skipped"),
    [
        (named("other", layer(read_only=True)), "internal", True),
        (named("other", layer(read_only=True, driver="raw")), "memory", True),
        (named("other"), "memory", True),
        (named("other", layer(driver="raw"), qdev=None), "memory", True),
        (named("other", layer(driver="raw"), removable=True), "internal", True),
        (named("other", layer(), removable=True), "memory", False),
        (named("other", layer(compat="0.10")), "internal", False),
        (named("other", layer(encrypted=True)), "internal", False),
    ],
)
def test_choose(other: Drive, kind: str, skipped: bool) -> None:
    chosen = common.choose(scene(GOOD, other), kind)
    assert [each.name for each in chosen.drives] == (["good"] if skipped else ["good", "other"])
    assert [skip["name"] for skip in chosen.skipped] == (["other"] if skipped else [])


@pytest.mark.parametrize(
    ("other", "kind", "way_out"),
    [
        (named("other", layer(driver="raw")), "internal", "type=external"),
        (named("other", layer(driver="raw")), "memory", "Convert it to qcow2"),
        (named("other", layer(driver="raw"), removable=True), "memory", "Convert it to qcow2"),
        (named("other", layer(data_file="/vms/data.raw")), "internal", "type=external"),
        (named("other", layer(driver="raw"), qdev="/machine/system.flash1"), "memory", "NVRAM as qcow2"),
        (named("other", layer(driver="raw"), qdev="/machine/system.flash1"), "internal", "NVRAM as qcow2"),
    ],
)
def test_a_disk_is_never_left_out_in_silence(other: Drive, kind: str, way_out: str) -> None:
    with pytest.raises(common.DriveUnsuited, match=way_out):
        common.choose(scene(GOOD, other), kind)
    assert common.choose(scene(GOOD, other, exclude_drives=("other",)), kind).drives == (GOOD,)
    assert common.choose(scene(GOOD, other, drives=("good",)), kind).drives == (GOOD,)


@pytest.mark.parametrize(
    ("first", "second", "internal", "memory"),
    [
        ([], [], set(), set()),
        ([("1", "a", 0)], [("1", "b", 0)], {"a", "b"}, set()),
        ([("1", "a", 9)], [("1", "a", 0)], set(), {"a"}),
        ([("1", "a", 0), ("2", "b", 0)], [("5", "a", 9)], {"b"}, {"a"}),
    ],
)
def test_names(first: t.Any, second: t.Any, internal: set[str], memory: set[str]) -> None:
    vm = scene(named("a", layer(**has(*first))), named("b", layer(**has(*second))), named("cd")).vm
    assert (common.names_of(vm, "internal"), common.names_of(vm, "memory")) == (internal, memory)


@pytest.mark.parametrize(
    ("kind", "name", "first", "second", "expected"),
    [
        ("internal", "s1", [], [], 0),
        ("internal", "s1", [("1", "s1", 0)], [("1", "s1", 0)], 2),
        ("internal", "s1", [("1", "s1", 0)], [], "SnapshotIncomplete"),
        ("internal", "s1", [("1", "s1", 9)], [("1", "s1", 0)], "SnapshotNameTaken"),
        ("memory", "s1", [("1", "s1", 0)], [], "SnapshotNameTaken"),
        ("memory", "s1", [("1", "s1", 9)], [("1", "s1", 0)], 2),
        ("memory", "s1", [("1", "s1", 9)], [], "SnapshotIncomplete"),
        ("internal", "s1", [("1", "s1", 0), ("3", "s1", 0)], [("1", "s1", 0)], "SnapshotAmbiguous"),
        ("internal", "s1", [("s1", "other", 0)], [], 0),
        ("internal", "7", [], [], "SnapshotNameNumeric"),
        ("internal", "7", [("1", "7", 0)], [("1", "7", 0)], 2),
    ],
)
def test_there(kind: str, name: str, first: t.Any, second: t.Any, expected: int | str) -> None:
    drives = (named("a", layer(**has(*first))), named("b", layer(**has(*second))))
    asked = scene(*drives, name=name)
    if isinstance(expected, int):
        assert len(common.there(asked, kind, drives)) == expected
        return
    with pytest.raises(BlockOpsError) as caught:
        common.there(asked, kind, drives)
    assert caught.value.kind == expected and "Nothing was touched" in str(caught.value)


@pytest.mark.parametrize(
    ("snapshots", "refused"),
    [
        ([("1", "2", 9)], False),
        ([("2", "2", 9)], False),
        ([("1", "2", 9), ("2", "other", 0)], True),
    ],
)
def test_a_name_that_is_another_ones_id(snapshots: t.Any, refused: bool) -> None:
    only = named("a", layer(**has(*snapshots)))
    asked = scene(only, name="2")
    held = common.holdings(asked, [only], "memory")
    if refused:
        with pytest.raises(common.SnapshotAmbiguous):
            common.refuse_ids(asked, held)
    else:
        common.refuse_ids(asked, held)


def test_below_an_external_snapshot() -> None:
    asked = scene(named("a", layer("/vms/over.qcow2"), layer("/vms/a.qcow2", **has(("1", "s1", 0)))))
    assert common.below_active(asked) == ["/vms/a.qcow2"]
    assert "/vms/a.qcow2" in str(common.missing(asked, "internal"))
    assert "/vms/a.qcow2" in common.left_alone(asked, "internal")[0]


def test_inside_tells_before_and_after() -> None:
    only = named("a", layer(**has(("1", "old", 0))))
    assert common.inside([only]) == {"a": ["old"]}
    assert common.inside([only], plus="s1") == {"a": ["old", "s1"]}
    assert common.inside([only], minus="old") == {"a": []}
