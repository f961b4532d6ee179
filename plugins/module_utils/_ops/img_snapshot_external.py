# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Going back to an external snapshot of a VM that is switched off: a fresh overlay on the snapshot takes the place of
the active image, under the same name, so that what starts the VM need not change.

The overlay is empty, so a bitmap added to it is exact: with one for each that the snapshot's image has, the next
backup goes on from there as an incremental.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import typing as t
from dataclasses import dataclass, replace

from .._block.names import bitmap_name, parse_bitmap
from .._errors import ImageInUse
from .._image import qemu_img
from .._image.chain import Link, rules_for, snapshot_records
from .._image.dependents import dependents
from .._image.snapshot_record import PRESENT, SnapshotRecord, read_record
from .._image.snapshot_table import has_data
from .._image.users import holders
from ._outcome import Outcome
from .img_info import bitmap_result, chain_result, safe_chain
from .img_snapshot_swap import Swap, free_name, recover, swap
from .img_snapshot_types import (
    DELETE,
    ImageHasDependents,
    SnapshotRequest,
    SnapshotUnsupported,
    ambiguous,
    in_use,
    missing,
    refuse_in_use,
)


@dataclass(frozen=True)
class Found:
    """Where the snapshot is in a chain: right below the overlay ``links[number]``, which has ``record``.

    ``described`` is the chain as it was found, for the result.
    """

    links: tuple[Link, ...]
    number: int
    record: SnapshotRecord
    described: tuple[dict[str, t.Any], ...]

    @property
    def snapshot(self) -> Link:
        return self.links[self.number + 1]

    @property
    def branch(self) -> tuple[Link, ...]:
        """What is above the snapshot, the active image first."""
        return self.links[: self.number + 1]

    @property
    def applied(self) -> bool:
        """Whether the active image is an overlay on the snapshot that nobody has written to."""
        active = self.links[0]
        return self.number == 0 and active.virtual_size == self.snapshot.virtual_size and not has_data(active.real)


async def apply_external(request: SnapshotRequest) -> Outcome:
    """Go back to it. Whatever a killed run left behind is finished or undone first.

    :raise BlockOpsError: it cannot be, and nothing was changed.
    """
    image = os.path.realpath(request.path)
    await asyncio.to_thread(safe_chain, request.path, "qcow2", rules_for(request.path, request.directories))
    # Also when it would be there already: what a VM has not yet written cannot be told from here.
    await asyncio.to_thread(refuse_in_use, image)
    if request.check_mode:
        found = await asyncio.to_thread(_find, request)
        return _outcome(request, found, await _plan(found, request))
    try:
        with qemu_img.held(image):
            recovered = await asyncio.to_thread(recover, image)
            found = await asyncio.to_thread(_find, request)
            plan = await _plan(found, request)
            if plan is not None:
                await swap(plan)
    except ImageInUse as exc:
        raise in_use(image, holders(image)) from exc
    return _outcome(request, found, plan, recovered=recovered)


def _find(request: SnapshotRequest) -> Found:
    links = safe_chain(request.path, "qcow2", rules_for(request.path, request.directories))
    records = snapshot_records(links)
    described = tuple(chain_result(links))
    matching = [
        Found(links, number, record, described)
        for number, record in enumerate(records)
        if record and record.name == request.name
    ]
    if not matching:
        known = ", ".join(record.name for record in records if record) or "none"
        raise missing(request.path, request, known)
    if len(matching) > 1:
        overlays = ", ".join(found.record.overlay for found in matching)
        raise ambiguous(request.path, request, overlays, ", with their records")
    return matching[0]


async def _plan(found: Found, request: SnapshotRequest) -> Swap | None:
    """``None``: it is so already.

    :raise BlockOpsError: it must not be done.
    """
    if found.applied:
        return None
    _refuse_unsuited(found)
    doomed = tuple(link.real for link in _ours(found)) if request.discarded == DELETE else ()
    await asyncio.to_thread(_refuse_dependents, found, doomed, request)
    active = found.links[0]
    size = (await qemu_img.info(found.snapshot.real, found.snapshot.format))["virtual-size"]
    info = await qemu_img.info(active.real, active.format)
    record = replace(
        found.record, overlay=active.real, image=found.snapshot.real, image_format=found.snapshot.format, state=PRESENT
    )
    return Swap(
        active=active.real,
        # What QEMU takes a relative name for depends on the name it opens the overlay by: only the plain case.
        backing=_backing_name(request.path, active.real, found.snapshot.real),
        record=record,
        size=size,
        options=_options(info),
        bitmaps=await _bitmaps(found.snapshot),
        delete=doomed,
        aside=free_name(active.real, delete=bool(doomed)),
    )


def _refuse_unsuited(found: Found) -> None:
    for link in (*found.branch, found.snapshot):
        if link.header is not None and (link.header.encrypted or link.header.data_file):
            reason = "it is encrypted" if link.header.encrypted else "its data is in another file"
            raise SnapshotUnsupported(image=link.path, reason=f"{reason}, and an overlay made here would not be")
    for link in found.links[1:]:
        if qemu_img.open_for_writing(link.real):
            raise in_use(link.real, holders(link.real))


def _ours(found: Found) -> list[Link]:
    """The images of the branch that may be deleted: from the top down to the first one that has no record of ours."""
    ours: list[Link] = []
    for link in found.branch:
        if read_record(link.real) is None:
            break
        ours.append(link)
    return ours


def _refuse_dependents(found: Found, doomed: t.Sequence[str], request: SnapshotRequest) -> None:
    """Nothing may be based on the active image, which gets another content; nor on what is deleted."""
    directories = {os.path.dirname(link.real) for link in found.links} | set(request.directories)
    for image in {found.links[0].real, *doomed}:
        others = [path for path in dependents(image, directories) if not _is_one_of(path, doomed)]
        if others:
            doing = "deleted" if image in doomed else "replaced"
            raise ImageHasDependents(image=image, doing=doing, dependents=", ".join(others))
        if image in doomed and image != found.links[0].real:  # that one is looked at already, and held by us
            refuse_in_use(image)


def _is_one_of(path: str, images: t.Iterable[str]) -> bool:
    """Under any name: a killed run may have left the active image a second one."""
    return any(os.path.samefile(path, image) for image in images)


def _backing_name(path: str, active: str, snapshot: str) -> str:
    directory = os.path.dirname(active)
    plain = os.path.dirname(snapshot) == directory and os.path.realpath(os.path.dirname(path)) == directory
    name = os.path.basename(snapshot)
    return name if plain and ":" not in name else snapshot


def _options(info: t.Mapping[str, t.Any]) -> dict[str, str]:
    """The new overlay is made like the old one, in what matters to a guest's speed."""
    extended = info["format-specific"]["data"].get("extended-l2", False)
    return {"cluster_size": str(info["cluster-size"]), "extended_l2": "on" if extended else "off"}


async def _bitmaps(snapshot: Link) -> tuple[tuple[str, int], ...]:
    """Name and granularity of what the overlay needs for the next backup to go on from the snapshot."""
    if snapshot.format != "qcow2":
        return ()
    info = await qemu_img.info(snapshot.real, snapshot.format)
    entries = [bitmap_result(entry, False) for entry in info["format-specific"]["data"].get("bitmaps", ())]
    carried = []
    for entry in entries:
        name = parse_bitmap(entry["name"])
        if name is not None and entry["recording"] and not entry["inconsistent"]:
            carried.append((bitmap_name(name.repository, name.backup, name.layer + 1), entry["granularity"]))
    return tuple(carried)


def _outcome(request: SnapshotRequest, found: Found, plan: Swap | None, recovered: t.Sequence[str] = ()) -> Outcome:
    before = list(found.described)
    after, discarded, left = before, [], []
    if plan is not None:
        top = {
            "path": request.path,
            "format": "qcow2",
            "backing_file": plan.backing,
            "backing_format": plan.record.image_format,
            "virtual_size": plan.size,
            "allocated": None,
            "snapshot": request.name,
        }
        if not request.check_mode:
            with contextlib.suppress(OSError):
                top["allocated"] = os.stat(plan.active).st_blocks * 512
        after = [top, *before[found.number + 1 :]]
        discarded = [_discarded(link, plan) for link in found.branch if link.real in (plan.active, *plan.delete)]
        left = [link.path for link in found.branch if link.real not in (plan.active, *plan.delete)]
    result = {
        "image": request.path,
        "chain": after,
        "discarded": discarded,
        "discarded_bytes": sum(link.allocated for link in found.branch) if plan is not None else 0,
        "left_behind": left,
        "bitmaps": [name for name, _granularity in plan.bitmaps] if plan is not None else [],
        "recovered": list(recovered),
    }
    return Outcome(plan is not None or bool(recovered), result, {"chain": _paths(before)}, {"chain": _paths(after)})


def _discarded(link: Link, plan: Swap) -> dict[str, t.Any]:
    deleted = link.real in plan.delete
    kept = None if deleted else plan.aside
    return {"path": link.path, "allocated": link.allocated, "deleted": deleted, "kept_as": kept}


def _paths(chain: t.Iterable[t.Mapping[str, t.Any]]) -> list[str]:
    return [f"{link['path']} (snapshot {link['snapshot']})" if link["snapshot"] else link["path"] for link in chain]
