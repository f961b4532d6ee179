# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Another backing file for an image that nobody has open, or none, without a guest seeing a difference; and trimming.

Three methods, the cheapest that is right: ``header`` (what is below is equal, so only its name changes), ``build`` (a
new image beside it holds what differs), ``copy`` (qemu-img rebase, in place). The first two end with a rename.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import typing as t
from dataclasses import dataclass, replace

from .._errors import ImageInUse, InputInvalid
from .._image import qemu_img
from .._image.chain import Chain, Link, printable, rules_for, snapshot_records, walk
from .._image.qemu_img import Image
from .._image.snapshot_record import SnapshotRecord, read_record, write_record
from .._image.users import holders
from .._repository.space import require
from ._outcome import Outcome
from .img_info import chain_result, refuse_problems, safe_chain
from .img_rebase_build import Build, first_difference, make, plan_build
from .img_rebase_swap import aside_name, duplicate, leftovers, recover, swap
from .img_rebase_types import (
    COMPARE,
    CONTENTS_EQUAL,
    Backing,
    BackingMissing,
    ContentsDiffer,
    RebaseRequest,
    RebaseUnsupported,
)
from .img_snapshot_types import in_use, refuse_in_use


@dataclass(frozen=True)
class Found:
    """The image and what is below it now (as far as it can be read), and what shall be below it.

    ``described`` is the chain as it was found, for the result.
    """

    links: tuple[Link, ...]
    below: tuple[Link, ...]
    backing: Backing | None
    broken: bool
    described: tuple[dict[str, t.Any], ...]

    @property
    def image(self) -> Link:
        return self.links[0]

    @property
    def same_file(self) -> bool:
        """Whether what shall be below is what is below, whatever it is called."""
        old = self.links[1:2]
        return not self.broken and [(each.real, each.format) for each in old] == [
            (each.real, each.format) for each in self.below[:1]
        ]

    @property
    def spelled_so(self) -> bool:
        header = self.image.header
        name, fmt = (header.backing_file, header.backing_format) if header is not None else (None, None)
        return (name, fmt) == ((self.backing.name, self.backing.format) if self.backing is not None else (None, None))


@dataclass(frozen=True)
class Plan:
    method: t.Literal["header", "build", "copy"] | None
    build: Build | None = None
    record: SnapshotRecord | None = None
    warnings: tuple[str, ...] = ()


async def rebase_image(request: RebaseRequest) -> Outcome:
    """Make it so. Whatever a killed run left behind is removed first.

    :raise BlockOpsError: it cannot be, and the image is as it was.
    """
    found = await asyncio.to_thread(_find, request)
    image = found.image.real
    if found.same_file and found.spelled_so and not request.trim and not await asyncio.to_thread(leftovers, image):
        return _outcome(request, found, Plan(None), ())
    await asyncio.to_thread(refuse_in_use, image)
    try:
        with qemu_img.held(image, writing=request.in_place), contextlib.ExitStack() as kept:
            recovered = [] if request.check_mode else await asyncio.to_thread(recover, image)
            found = await asyncio.to_thread(_find, request)  # nobody changes it from here on
            for link in {link.real: link for link in (*found.links[1:], *found.below)}.values():
                kept.enter_context(qemu_img.unwritten(link.real))
            plan = await _plan(request, found)
            aside = aside_name(image) if request.backup and plan.method is not None else None
            if plan.method is not None and not request.check_mode:
                await _execute(request, found, plan, aside)
    except ImageInUse as exc:
        raise in_use(exc.data["image"], holders(exc.data["image"])) from exc
    return _outcome(request, found, plan, recovered, aside)


def _find(request: RebaseRequest) -> Found:
    rules = rules_for(request.path, request.directories)
    chain = walk(request.path, "qcow2", rules)
    broken = _broken(request, chain)
    if not broken:
        refuse_problems(request.path, chain)
    links, described = chain.links, tuple(chain_result(chain.links))
    if request.backing is None:
        header = links[0].header
        name = header.backing_file if header is not None else None
        backing = None if name is None else Backing(name, links[1].path, links[1].real, links[1].format)
        return Found(links, links[1:], _respelled(request, links[0], backing), broken, described)
    if not request.backing:
        return Found(links, (), None, broken, described)
    path = os.path.join(os.path.dirname(request.path), request.backing)
    below = safe_chain(path, request.backing_format or _known_format(links, path), rules)
    if any(link.real == links[0].real for link in below):
        raise InputInvalid(message=f"{path} is based on {request.path}, which can therefore not be based on it.")
    backing = Backing("", below[0].path, below[0].real, below[0].format)
    return Found(links, below, _respelled(request, links[0], backing), broken, described)


def _known_format(links: t.Sequence[Link], path: str) -> str | None:
    """The one that the chain gives the file now; of others only qcow2 is recognised."""
    return next((link.format for link in links[1:] if link.real == os.path.realpath(path)), None)


def _broken(request: RebaseRequest, chain: Chain) -> bool:
    """Whether what is below cannot be read, and need not be.

    :raise BackingMissing: it would have to be.
    """
    problem = next(iter(chain.problems), None)
    if problem is None or problem.kind != "Unreadable" or not chain.links:
        return False
    if request.unsafe and request.acknowledge == CONTENTS_EQUAL and len(chain.links) == 1:
        return True
    raise BackingMissing(image=chain.links[-1].path, backing=printable(problem.path), reason=problem.reason)


def _respelled(request: RebaseRequest, image: Link, backing: Backing | None) -> Backing | None:
    """The backing file with the name that the header shall have."""
    if backing is None:
        return None
    current = image.header.backing_file if image.header is not None else None
    now = None if current is None else os.path.realpath(os.path.join(os.path.dirname(image.path), current))
    if request.relative is None and current is not None and now == backing.real:
        return replace(backing, name=current)
    directory = os.path.dirname(image.real)
    # What QEMU takes a relative name for depends on the name it opens the image by: only where that is plain.
    plain = os.path.realpath(os.path.dirname(image.path)) == directory and not os.path.islink(image.path)
    below = os.path.commonpath([directory, backing.real]) == directory
    relative = request.relative if request.relative is not None else plain and below
    absolute = os.path.join(os.path.realpath(os.path.dirname(backing.path)), os.path.basename(backing.path))
    name = os.path.relpath(absolute, directory) if relative else absolute
    return replace(backing, name=name if relative and ":" not in name.split("/", 1)[0] else absolute)


async def _plan(request: RebaseRequest, found: Found) -> Plan:
    info = await qemu_img.info(found.image.real, "qcow2")
    if not request.trim and found.same_file:
        return Plan(None) if found.spelled_so else Plan("header", record=_record(found, equal=True))
    if request.unsafe:
        return await _plan_unsafe(request, found, info)
    _refuse_unsuited(found, info)
    if request.in_place:
        return Plan("copy", record=_record(found, equal=False))
    build = await plan_build(found.links, info, found.below, trim=request.trim)
    if found.same_file and not build.dropped and not build.zeroed:
        return Plan(None, build) if found.spelled_so else Plan("header", record=_record(found, equal=True))
    require(os.path.dirname(found.image.real), build.needed, f"The new image for {found.image.path}")
    warnings = tuple(
        f"The bitmap {name} of {found.image.path} is inconsistent and was not kept." for name in build.lost_bitmaps
    )
    return Plan("build", build, _record(found, equal=found.same_file), warnings)


async def _plan_unsafe(request: RebaseRequest, found: Found, info: t.Mapping[str, t.Any]) -> Plan:
    if request.proof == COMPARE:
        offset = await first_difference(found.links[1:], found.below, info["virtual-size"])
        if offset is not None:
            path = found.backing.path if found.backing is not None else "Nothing (zeroes)"
            raise ContentsDiffer(image=found.image.path, backing=path, offset=offset)
        return Plan("header", record=_record(found, equal=True))
    warning = f"Nobody looked whether {found.image.path} still shows the same: contents_equal was acknowledged."
    return Plan("header", record=_record(found, equal=True), warnings=(warning,))


def _refuse_unsuited(found: Found, info: t.Mapping[str, t.Any]) -> None:
    """A new image would hold what a guest reads now, and nothing else."""
    reason = None
    if info.get("snapshots"):
        reason = "it has internal snapshots, which would be lost or change"
    for link in (*found.links, *found.below):
        if link.header is not None and (link.header.encrypted or link.header.data_file or link.header.corrupt):
            reason = f"{link.path} is encrypted, damaged, or has its data in another file"
    if reason is not None:
        raise RebaseUnsupported(image=found.image.path, reason=reason)


def _record(found: Found, *, equal: bool) -> SnapshotRecord | None:
    """What the record beside the image has to say then; ``None``: what it says now.

    The same content below: the same snapshot. An image further down: the snapshot that this one is. Any other: none,
    which shows because the record names an image that is not below.
    """
    record = read_record(found.image.real)
    if record is None or found.backing is None:
        return None
    if not equal:
        above = zip(found.links[1:], snapshot_records(found.links)[1:], found.links[2:])
        same = [its for _link, its, below in above if below.real == found.backing.real and its is not None]
        if not same:
            return None
        record = replace(same[0], overlay=found.image.real, state=record.state)
    return replace(record, image=found.backing.real, image_format=found.backing.format)


async def _execute(request: RebaseRequest, found: Found, plan: Plan, aside: str | None) -> None:
    image, backing = found.image.real, found.backing
    below = None if backing is None else Image(backing.name, backing.format)

    async def made(new: str) -> None:
        if plan.build is not None and plan.method == "build":
            await make(plan.build, image, backing, new)
        else:
            await asyncio.to_thread(duplicate, image, new)
            await qemu_img.rebase(new, below, unsafe=plan.method == "header")

    if request.in_place:
        await _in_place(request, found, plan, below)
    else:
        await swap(image, made, aside=aside, record=plan.record)


async def _in_place(request: RebaseRequest, found: Found, plan: Plan, below: Image | None) -> None:
    """The header is written last, at once; until then the image is based on what it was, and looks as it did."""
    path = found.image.real if plan.method == "header" else found.image.path
    await qemu_img.rebase(path, below, unsafe=plan.method == "header")
    if plan.record is not None:
        write_record(plan.record)


def _outcome(
    request: RebaseRequest, found: Found, plan: Plan, recovered: t.Sequence[str], aside: str | None = None
) -> Outcome:
    changed = plan.method is not None
    before = list(found.described)
    header = found.image.header
    named = (header.backing_file, header.backing_format) if header is not None else (None, None)
    if changed:
        named = (None, None) if found.backing is None else (found.backing.name, found.backing.format)
    below = chain_result(found.below) if changed else before[1:]
    top = {**before[0], "backing_file": named[0], "backing_format": named[1]}
    if changed:
        top.update(_after(request, found, plan))
    build = plan.build
    result = {
        "image": request.path,
        "method": plan.method or "none",
        "backing_file": named[0],
        "backing_format": named[1],
        "chain": [top, *below],
        "dropped_bytes": build.dropped if build else 0,
        "zeroed_bytes": build.zeroed if build else 0,
        "copied_bytes": build.copied if build else 0,
        "allocated_before": found.image.allocated,
        "allocated": top["allocated"],
        "bitmaps": [each.name for each in build.bitmaps] if build else [],
        "lost_bitmaps": list(build.lost_bitmaps) if build and changed else [],
        "kept_as": aside,
        "recovered": list(recovered),
    }
    return Outcome(
        changed or bool(recovered),
        result,
        {"chain": _names(before), "redundant_bytes": result["dropped_bytes"] + result["zeroed_bytes"]},
        {"chain": _names(result["chain"]), "redundant_bytes": 0},
        plan.warnings,
    )


def _after(request: RebaseRequest, found: Found, plan: Plan) -> dict[str, t.Any]:
    record = plan.record or read_record(found.image.real)
    shown = record is not None and found.backing is not None and record.image == found.backing.real
    allocated = None
    if not request.check_mode:
        with contextlib.suppress(OSError):
            allocated = os.stat(found.image.real).st_blocks * 512
    return {"allocated": allocated, "snapshot": record.name if record is not None and shown else None}


def _names(chain: t.Iterable[t.Mapping[str, t.Any]]) -> list[str]:
    return [f"{link['path']} (snapshot {link['snapshot']})" if link["snapshot"] else link["path"] for link in chain]
