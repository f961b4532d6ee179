# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is done to a bitmap, by tables."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.graph import Bitmap
from ansible_collections.blockops.qemu.plugins.module_utils._errors import InputInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._ops.dirty_bitmap_plan import (
    BitmapBusy,
    BitmapDiffers,
    BitmapInconsistent,
    BitmapMissing,
    BitmapOptions,
    BitmapProtected,
    BitmapSizes,
    Change,
    Source,
    below,
    plan,
)
from support.blocks import MIB, bitmap, drive, layer

TRACKING = "bo-0123abcd-20261123T054500Z-0000abcd"


def planned(options: BitmapOptions, *bitmaps: Bitmap, **changes: t.Any) -> Change:
    one = drive(layer("/vms/a.qcow2", *bitmaps, node="n", **changes))
    return plan(options.checked(), "vm", [one], [one])[0]


def verbs(change: Change) -> list[str]:
    return [action["type"].removeprefix("block-dirty-bitmap-") for action in change.actions]


IDLE, PAUSED, EMPTY = bitmap("b"), bitmap("b", recording=False), bitmap("b", 0)
TABLE = [
    # state, before: actions, and whether it records afterwards
    ("present", None, ["add"], True),
    ("present", IDLE, [], True),
    ("present", PAUSED, [], False),
    ("present", bitmap("b", busy=True), [], True),
    ("absent", None, [], None),
    ("absent", IDLE, ["remove"], None),
    ("absent", bitmap("b", inconsistent=True, recording=False), ["remove"], None),
    ("enabled", None, ["add"], True),
    ("enabled", IDLE, [], True),
    ("enabled", PAUSED, ["enable"], True),
    ("disabled", None, ["add"], False),
    ("disabled", PAUSED, [], False),
    ("disabled", IDLE, ["disable"], False),
    ("cleared", None, ["add"], True),
    ("cleared", IDLE, ["clear"], True),
    ("cleared", PAUSED, ["clear"], False),
    ("cleared", EMPTY, [], True),
]


@pytest.mark.parametrize(("state", "before", "actions", "records"), TABLE)
def test_a_state_is_reached(state: str, before: Bitmap | None, actions: list[str], records: bool | None) -> None:
    change = planned(BitmapOptions("b", state), *([] if before is None else [before]))
    assert verbs(change) == actions
    assert (change.after.recording if change.after is not None else None) == records
    if change.after is not None and change.after != before:
        # Planned again, from what is expected, nothing is left to do.
        assert not planned(BitmapOptions("b", state), change.after).actions


@pytest.mark.parametrize(
    ("image", "options", "made"),
    [
        ({}, {}, (65536, True)),
        ({"cluster_size": 512}, {}, (4096, True)),
        ({"cluster_size": 2 * MIB}, {}, (65536, True)),
        ({"driver": "raw", "compat": None}, {}, (65536, False)),
        ({"compat": "0.10"}, {}, (65536, False)),
        ({}, {"granularity": 1 << 20, "persistent": False}, (1 << 20, False)),
    ],
)
def test_a_new_one_is_as_good_as_the_image_allows(
    image: dict[str, t.Any], options: dict[str, t.Any], made: tuple[int, bool]
) -> None:
    data = planned(BitmapOptions("b", **options), **image).actions[0]["data"]
    assert (data["granularity"], data["persistent"]) == made


@pytest.mark.parametrize(
    ("state", "found", "options", "error"),
    [
        ("present", bitmap("b", inconsistent=True), {}, BitmapInconsistent),
        ("enabled", bitmap("b", inconsistent=True), {}, BitmapInconsistent),
        ("present", IDLE, {"granularity": 4096}, BitmapDiffers),
        ("cleared", IDLE, {"persistent": False}, BitmapDiffers),
        ("absent", bitmap("b", busy=True), {}, BitmapBusy),
        ("cleared", bitmap("b", busy=True), {}, BitmapBusy),
        ("disabled", bitmap("b", busy=True), {}, BitmapBusy),
    ],
)
def test_what_qemu_would_refuse_is_refused(state: str, found: Bitmap, options: t.Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        planned(BitmapOptions("b", state, **options), found)


@pytest.mark.parametrize(
    "options",
    [
        BitmapOptions(""),
        BitmapOptions("x" * 1024),
        BitmapOptions("b", granularity=1000),
        BitmapOptions("b", granularity=256),
        BitmapOptions("b", granularity=1 << 32),
        BitmapOptions("b", "merged"),
        BitmapOptions("b", "present", (Source("x"),)),
        BitmapOptions("b", "merged", (Source("x", "vda", "n"),)),
        BitmapOptions("b", timeout=0),
    ],
)
def test_what_cannot_be_meant(options: BitmapOptions) -> None:
    with pytest.raises(InputInvalid):
        options.checked()


def test_bitmaps_of_backups_can_only_be_removed() -> None:
    for name in (TRACKING, f"{TRACKING}.2", "bo-0123abcd-0000abcd-0-merge"):
        for state in ("present", "absent", "enabled", "disabled", "cleared"):
            with pytest.raises(BitmapProtected):
                BitmapOptions(name, state).checked()
            if state != "absent":
                with pytest.raises(BitmapProtected):
                    BitmapOptions(name, state, ours=True).checked()
    assert verbs(planned(BitmapOptions(TRACKING, "absent", ours=True), bitmap(TRACKING))) == ["remove"]


def merged(*sources: Source) -> list[dict[str, t.Any]]:
    """Into vda's "sum", which is there: from the chain of vda, and from vdb, and from vdc, which is larger."""
    vda = drive(
        layer("/a1", bitmap("sum"), bitmap("x"), bitmap("none", 0), node="a1"),
        layer("/a0", bitmap("sum"), bitmap("x"), bitmap("lost", inconsistent=True), node="a0"),
    )
    vdb = drive(layer("/b", bitmap("x"), bitmap("taken", busy=True), node="b"), name="vdb")
    vdc = drive(layer("/c", bitmap("x"), node="c", virtual_size=128 * MIB), name="vdc")
    options = BitmapOptions("sum", "merged", sources).checked()
    assert below(options, vda) == ["/a0"]
    (change,) = plan(options, "vm", [vda], [vda, vdb, vdc])
    return [source for action in change.actions for source in action["data"]["bitmaps"]]


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ([Source("x")], ["a1 x", "a0 x"]),
        ([Source("sum")], ["a0 sum"]),
        ([Source("x", node="a0")], ["a0 x"]),
        ([Source("x", "vdb"), Source("x", node="b")], ["b x"]),
        ([Source("none")], []),
    ],
)
def test_sources_are_found(sources: list[Source], found: list[str]) -> None:
    assert [f"{each['node']} {each['name']}" for each in merged(*sources)] == found


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (Source("nothing"), BitmapMissing),
        (Source("x", "vdz"), BitmapMissing),
        (Source("sum", node="a1"), BitmapMissing),
        (Source("lost"), BitmapInconsistent),
        (Source("taken", "vdb"), BitmapBusy),
        (Source("x", "vdc"), BitmapSizes),
    ],
)
def test_sources_that_cannot_be_merged(source: Source, error: type[Exception]) -> None:
    with pytest.raises(error):
        merged(source)


def test_a_new_sum_does_not_record() -> None:
    one = drive(layer("/a", bitmap("x"), node="a"))
    (change,) = plan(BitmapOptions("sum", "merged", (Source("x"),)), "vm", [one], [one])
    assert verbs(change) == ["add", "merge"] and change.actions[0]["data"]["disabled"] and not change.counted
