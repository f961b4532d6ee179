# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Snapshots of an image that nobody has open; here the internal ones, which lie in the image itself.

Whether an image still is at a snapshot is told from its tables, so that applying again changes nothing. QEMU applies
no snapshot to an image with dirty bitmaps, and rightly so: they would not know of the jump. Ours are removed, and the
next backup is a full one.
"""

from __future__ import annotations

import asyncio
import os
import typing as t
from dataclasses import dataclass, field

from .._block.names import is_ours
from .._errors import ImageInUse
from .._image import qemu_img
from .._image.chain import Link, rules_for
from .._image.dependents import dependents
from .._image.snapshot_table import at_snapshot
from .._image.users import holders
from ._outcome import Outcome
from .img_info import bitmap_result, safe_chain, snapshot_result
from .img_snapshot_external import apply_external
from .img_snapshot_types import (
    ABSENT,
    APPLIED,
    PRESENT,
    ImageHasDependents,
    SnapshotRequest,
    ambiguous,
    in_use,
    missing,
    refuse_in_use,
)
from .snapshot_errors import BitmapsInTheWay

Entry = dict[str, t.Any]


@dataclass(frozen=True)
class State:
    """An image as it is. ``at``: ids of the snapshots whose disk it shows right now."""

    image: str
    snapshots: tuple[Entry, ...]
    bitmaps: tuple[str, ...]
    at: frozenset[str] = frozenset()
    dependents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """``argument`` is how qemu-img is told which snapshot. ``action`` ``None``: it is so already."""

    action: t.Literal["create", "apply", "delete"] | None = None
    argument: str = ""
    remove_bitmaps: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())


async def change_snapshot(request: SnapshotRequest) -> Outcome:
    """Make it so.

    :raise BlockOpsError: it cannot be, and or not to the end; the error says which.
    """
    if request.type == "external":
        return await apply_external(request)
    links = await asyncio.to_thread(safe_chain, request.path, "qcow2", rules_for(request.path, request.directories))
    state = await _observe(links[0], request)
    plan = plan_internal(state, request)
    if plan.action is not None:
        await asyncio.to_thread(refuse_in_use, state.image)
        if not request.check_mode:
            await _execute(state.image, plan)
    return await _outcome(links[0], state, plan, request)


async def _observe(link: Link, request: SnapshotRequest) -> State:
    # Shared, because what is there already needs no change, whoever has the image open.
    info = await qemu_img.info(link.real, shared=True)
    snapshots = tuple(snapshot_result(entry) for entry in info.get("snapshots", ()))
    bitmaps = tuple(entry["name"] for entry in _bitmaps(info))
    if request.state != APPLIED:
        return State(link.real, snapshots, bitmaps)
    await asyncio.to_thread(refuse_in_use, link.real)  # its tables are in the memory of whoever has it open
    named = [entry["id"] for entry in snapshots if entry["name"] == request.name]
    directories = {os.path.dirname(link.real), *request.directories}
    return State(
        link.real,
        snapshots,
        bitmaps,
        frozenset(found for found in named if at_snapshot(link.real, found)),
        tuple(await asyncio.to_thread(dependents, link.real, directories)),
    )


def _bitmaps(info: t.Mapping[str, t.Any]) -> list[Entry]:
    return [bitmap_result(entry, False) for entry in info["format-specific"]["data"].get("bitmaps", ())]


def plan_internal(state: State, request: SnapshotRequest) -> Plan:
    """What to do.

    :raise SnapshotMissing, SnapshotAmbiguous, ImageHasDependents, BitmapsInTheWay: nothing can be done.
    """
    named = [entry for entry in state.snapshots if entry["name"] == request.name]
    if request.state == PRESENT:
        return Plan() if named else Plan("create", request.name)
    if request.state == ABSENT and not named:
        return Plan()
    if not named:
        known = ", ".join(entry["name"] for entry in state.snapshots) or "none"
        raise missing(state.image, request, known)
    if len(named) > 1:
        ids, way_out = ", ".join(entry["id"] for entry in named), ": qemu-img snapshot -d takes the first"
        raise ambiguous(state.image, request, ids, way_out)
    if request.state == ABSENT:
        return Plan("delete", request.name)
    return Plan() if named[0]["id"] in state.at else _plan_apply(state, named[0], request)


def _plan_apply(state: State, snapshot: Entry, request: SnapshotRequest) -> Plan:
    if state.dependents:
        raise ImageHasDependents(image=state.image, doing="taken back", dependents=", ".join(state.dependents))
    foreign = [name for name in state.bitmaps if not is_ours(name)]
    if foreign and request.remove_bitmaps != "all":
        about = {"of": state.image, "image": state.image, "way_out": "remove_bitmaps=all does it"}
        raise BitmapsInTheWay(bitmaps=", ".join(foreign), **about)
    warnings = []
    if snapshot["vm_state_size"]:
        warnings.append(f"Snapshot {request.name} has the memory of the VM in it; only its disk was applied.")
    if state.bitmaps:
        warnings.append(f"{state.image} lost its dirty bitmaps; the next backup of its drive is a full one.")
    return Plan("apply", _argument(state, snapshot), state.bitmaps, tuple(warnings))


def _argument(state: State, snapshot: Entry) -> str:
    """What means this snapshot and no other; at worst its id, which ``-a`` looks for before it looks for a name."""
    for word in (snapshot["name"], snapshot["id"]):
        if [entry for entry in state.snapshots if word in (entry["id"], entry["name"])] == [snapshot]:
            return t.cast(str, word)
    return t.cast(str, snapshot["id"])


async def _execute(image: str, plan: Plan) -> None:
    """Bitmaps first: killed in between, the image is as it was and the next backup is a full one."""
    try:
        for name in plan.remove_bitmaps:
            await qemu_img.remove_bitmap(image, name)
        if plan.action is not None:
            await qemu_img.snapshot(image, plan.action, plan.argument)
    except ImageInUse as exc:
        raise in_use(image, holders(image)) from exc


async def _outcome(link: Link, state: State, plan: Plan, request: SnapshotRequest) -> Outcome:
    snapshots, bitmaps = list(state.snapshots), [name for name in state.bitmaps if name not in plan.remove_bitmaps]
    if plan.action is not None and not request.check_mode:
        info = await qemu_img.info(link.real, shared=True)
        snapshots = [snapshot_result(entry) for entry in info.get("snapshots", ())]
        bitmaps = [entry["name"] for entry in _bitmaps(info)]
    elif plan.action == "create":
        snapshots.append({"id": None, "name": request.name, "vm_state_size": 0, "date": None})
    elif plan.action == "delete":
        snapshots = [entry for entry in snapshots if entry["name"] != request.name]
    result = {
        "image": request.path,
        "snapshots": snapshots,
        "removed_bitmaps": list(plan.remove_bitmaps),
    }
    before: Entry = {"snapshots": [entry["name"] for entry in state.snapshots]}
    after: Entry = {"snapshots": [entry["name"] for entry in snapshots]}
    if request.state == APPLIED:
        before.update(at=None if plan.action else request.name, bitmaps=list(state.bitmaps))
        after.update(at=request.name, bitmaps=bitmaps)
    return Outcome(plan.action is not None, result, before, after, plan.warnings)
