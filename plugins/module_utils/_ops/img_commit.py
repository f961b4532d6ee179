# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Committing an image that nobody has open into an image below it, and what becomes of the image then.

The images above the base keep what they hold until the base has all of it, so they hide a base that is half written:
a commit that was interrupted is simply begun again. Only then does an empty overlay take the place of the image (or
nothing does), and the images in between, of no use to anybody now, go::

    records ("merging") -> qemu-img commit -> bitmaps -> empty overlay over the name -> images in between -> the image
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import typing as t
from dataclasses import dataclass, replace

from .._errors import FileFailed, ImageInUse
from .._image import qemu_img
from .._image.chain import Link, rules_for
from .._image.dependents import dependents
from .._image.extents import extents_of, joined, own, total, without
from .._image.qemu_img import Image
from .._image.snapshot_record import MERGED, MERGING, read_record, records_in, remove_record, write_record
from .._image.snapshot_table import has_data
from .._image.users import holders
from .._repository._files import named, sync_directory
from .._repository.space import require
from ._outcome import Outcome
from .img_commit_bitmaps import Merge, merge_bitmaps, plan_bitmaps
from .img_commit_types import CommitRequest, CommitUnsupported, ImageMissing, NoBase
from .img_info import bitmap_result, chain_result, safe_chain
from .img_rebase_build import options_of
from .img_rebase_swap import leftovers, recover, swap
from .img_snapshot_types import ImageHasDependents, in_use, refuse_in_use


@dataclass(frozen=True)
class Found:
    """``going``: the image and those between it and the ``base``, the image first. ``described``: for the result."""

    links: tuple[Link, ...]
    going: tuple[Link, ...]
    base: Link
    described: tuple[dict[str, t.Any], ...]

    @property
    def image(self) -> Link:
        return self.links[0]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to commit: the image is right above the base, as large, and holds nothing."""
        return len(self.going) == 1 and not has_data(self.image.real)


@dataclass(frozen=True)
class Plan:
    """``commit``: whether anything has to be written. ``delete``: images to delete, the image last."""

    commit: bool
    backing: str
    info: t.Mapping[str, t.Any]
    delete: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    committed: int = 0
    needed: int = 0
    merges: tuple[Merge, ...] = ()
    lost: tuple[str, ...] = ()
    forget: bool = False

    @property
    def changes(self) -> bool:
        return self.commit or bool(self.delete) or self.forget


async def commit_image(request: CommitRequest) -> Outcome:
    """Make it so.

    :raise BlockOpsError: it cannot be, or not to the end; the image shows what it showed.
    """
    if not os.path.lexists(request.path):
        return await asyncio.to_thread(_missing, request)
    found = await asyncio.to_thread(_find, request)
    try:
        for link in (*found.going, found.base):
            await asyncio.to_thread(refuse_in_use, link.real)
        with contextlib.ExitStack() as stack:
            shut = stack.enter_context(qemu_img.held(found.image.real, writing=True))
            stack.enter_context(qemu_img.held(found.base.real, writing=True))
            for link in found.going[1:]:
                stack.enter_context(qemu_img.unwritten(link.real))
            again = await asyncio.to_thread(_find, request)
            if [link.real for link in again.links] != [link.real for link in found.links]:
                raise ImageInUse(image=request.path, said="its chain has just changed")
            found = again  # nobody changes it from here on
            recovered = [] if request.check_mode else await asyncio.to_thread(_recover, found)
            plan = await _plan(request, found)
            if plan.changes and not request.check_mode:
                await _execute(found, plan, shut)
    except ImageInUse as exc:
        raise in_use(exc.data["image"], holders(exc.data["image"])) from exc
    return _outcome(request, found, plan, recovered)


def _missing(request: CommitRequest) -> Outcome:
    if not request.missing_ok:
        raise ImageMissing(image=request.path)
    result = _result(request, None, None, [], [])
    return Outcome(False, result, {"chain": []}, {"chain": []})


def _find(request: CommitRequest) -> Found:
    links = safe_chain(request.path, "qcow2", rules_for(request.path, request.directories))
    wanted = None if request.base is None else os.path.join(os.path.dirname(request.path), request.base)
    for number, link in enumerate(links[1:], start=1):
        if wanted is None or link.real == os.path.realpath(wanted):
            return Found(links, links[:number], link, tuple(chain_result(links)))
    known = ", ".join(link.path for link in links[1:]) or "none"
    raise NoBase(image=request.path, base=wanted or "its backing file", known=known)


def _recover(found: Found) -> list[str]:
    """What a killed run of ours left: unfinished files, and images in between that were to go."""
    done = recover(found.image.real)
    for path in _abandoned(found):
        _delete(path)
        done.append(f"finished deleting {os.path.basename(path)}")
    return done


def _abandoned(found: Found) -> list[str]:
    alive = {link.real for link in found.links}
    directories = {os.path.dirname(link.real) for link in found.links}
    marked = [
        record.overlay
        for directory in sorted(directories)
        for record in records_in(directory)
        if record.state == MERGED and record.discards == (found.image.real,) and record.overlay not in alive
    ]
    return [path for path in marked if not set(dependents(path, directories)) - set(marked)]


async def _plan(request: CommitRequest, found: Found) -> Plan:
    image, base = found.image, found.base
    info = await qemu_img.info(image.real, "qcow2")
    await _refuse_unsuited(request, found)
    commit = not found.empty or (request.delete and image.virtual_size != base.virtual_size)
    await asyncio.to_thread(_refuse_dependents, request, found, commit)
    ours = [link.real for link in reversed(found.going[1:]) if read_record(link.real) is not None]
    plan = Plan(
        commit=commit,
        backing=_backing_name(found),
        info=info,
        delete=tuple([*ours, image.real] if request.delete else ()),
        left=tuple(link.path for link in found.going[1:] if not (request.delete and link.real in ours)),
        forget=any(_merging(link) for link in found.going[:1]),
    )
    if commit or request.delete:
        merges, lost = await _bitmaps(found, info, into_base=request.delete)
        plan = replace(plan, merges=tuple(merges), lost=tuple(lost))
    if not commit:
        return plan
    committed, needed = await _sizes(found)
    require(os.path.dirname(base.real), needed, f"Committing {image.path}")
    return replace(plan, committed=committed, needed=needed)


def _merging(link: Link) -> bool:
    record = read_record(link.real)
    return record is not None and record.state == MERGING


async def _refuse_unsuited(request: CommitRequest, found: Found) -> None:
    reason = None
    for link in (*found.going, found.base):
        if link.header is not None and (link.header.encrypted or link.header.data_file or link.header.corrupt):
            reason = f"{link.path} is encrypted, damaged, or has its data in another file"
    for link in found.going:
        if (await qemu_img.info(link.real, "qcow2")).get("snapshots"):
            reason = f"{link.path} has internal snapshots, which would be lost or change"
    if request.delete and found.base.virtual_size > found.image.virtual_size:
        reason = f"{found.base.path} is larger, so without the image the guest would see a larger disk"
    if reason is not None:
        raise CommitUnsupported(image=found.image.path, reason=reason)


def _refuse_dependents(request: CommitRequest, found: Found, commit: bool) -> None:
    """Nothing else may be based on what gets another content, nor on what is deleted."""
    directories = {os.path.dirname(link.real) for link in found.links} | set(request.directories)
    ignored = {link.real for link in found.going} | set(leftovers(found.image.real))
    changing = {link.real: "changed" for link in (*found.going[1:], found.base)} if commit else {}
    for path, doing in {**changing, **({found.image.real: "deleted"} if request.delete else {})}.items():
        others = [other for other in dependents(path, directories) if other not in ignored and not _merged(other)]
        if others:
            raise ImageHasDependents(image=path, doing=doing, dependents=", ".join(others))


def _merged(image: str) -> bool:
    """Whether its record says that nothing needs it any more."""
    record = read_record(image)
    return record is not None and record.state == MERGED


def _backing_name(found: Found) -> str:
    """How the empty overlay names the base: as the image does, or as the images in the same directory do."""
    lowest = found.going[-1]
    name = lowest.header.backing_file if lowest.header is not None else None
    if name is not None and os.path.dirname(lowest.path) == os.path.dirname(found.image.path):
        return name
    return found.base.real


async def _bitmaps(found: Found, info: t.Mapping[str, t.Any], *, into_base: bool) -> tuple[list[Merge], list[str]]:
    infos = [info] + [await qemu_img.info(link.real, "qcow2") for link in found.going[1:]]
    base = None
    if found.base.format == "qcow2":
        base = _entries(await qemu_img.info(found.base.real, "qcow2"))
    going = [(link.real, _entries(each)) for link, each in zip(found.going, infos)]
    return plan_bitmaps(going, base, into_base=into_base)


def _entries(info: t.Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
    return [bitmap_result(entry, False) for entry in info["format-specific"]["data"].get("bitmaps", ())]


async def _sizes(found: Found) -> tuple[int, int]:
    """Bytes of the disk that are written into the base, and how many of them it has no room for yet."""
    files = [link.real for link in found.links]
    everything = extents_of(await qemu_img.mapped(Image(found.image.path, "qcow2")), files)
    above = {link.real for link in found.going}
    moved = joined((each.start, each.end) for each in everything if each.file in above and not each.zero)
    there = extents_of(await qemu_img.mapped(Image(found.base.path, found.base.format)), [found.base.real])
    return total(moved), total(without(moved, own(there, zero=False)))


async def _execute(found: Found, plan: Plan, shut: t.Callable[[], None]) -> None:
    image, base = found.image, found.base
    if plan.commit:
        _mark(found, MERGING)
        await qemu_img.commit(image.path, base.path)
    shut()  # what is written to the image from now on would not be in the base
    deletes = image.real in plan.delete
    if deletes:
        await merge_bitmaps(base.real, plan.merges)
    if plan.commit and (len(found.going) > 1 or not deletes):  # an overlay that is empty is as it shall be
        _mark(found, MERGED, discards=(image.real,) if deletes else ())
        await _empty(found, plan, () if deletes else plan.merges)
    with named(image.real, "deleting what was committed"):
        for path in plan.delete:
            _delete(path)
        if read_record(image.real) is not None:
            remove_record(image.real)  # the snapshot that it followed is no more
        sync_directory(os.path.dirname(image.real))


def _mark(found: Found, state: str, discards: tuple[str, ...] = ()) -> None:
    """The snapshots that the images follow are no longer what they were from the first byte on."""
    for link, record in zip(found.going, map(read_record, [link.real for link in found.going])):
        if record is not None and not (state == MERGED and link is found.image):
            write_record(record.in_state(state, discards=discards))


async def _empty(found: Found, plan: Plan, merges: t.Sequence[Merge]) -> None:
    image, below = found.image, Image(plan.backing, found.base.format)

    async def made(new: str) -> None:
        await qemu_img.create(new, "qcow2", image.virtual_size, backing=below, options=options_of(plan.info))
        await merge_bitmaps(new, merges)

    await swap(image.real, made, aside=None, record=None)


def _delete(path: str) -> None:
    """The image before its record, which says that it is ours to delete."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        remove_record(path)
    except OSError as exc:
        raise FileFailed(path=path, doing="deleting the image", reason=exc.strerror or str(exc)) from exc


def _outcome(request: CommitRequest, found: Found, plan: Plan, recovered: t.Sequence[str]) -> Outcome:
    before = list(found.described)
    after = before[len(found.going) :] if plan.changes else before
    deleted = found.image.real in plan.delete
    if plan.changes and not deleted:
        named_so = {"backing_file": plan.backing, "backing_format": found.base.format}
        after = [{**before[0], **named_so, "allocated": None, "snapshot": None}, *after]
    if plan.changes and not request.check_mode:
        after = chain_result(safe_chain(after[0]["path"], after[0]["format"], rules_for(request.path, ("/",))))
    elif plan.changes:
        after[int(not deleted)].update(allocated=None)
        size = max(found.base.virtual_size, found.image.virtual_size)
        after[int(not deleted)].update(virtual_size=size if plan.commit else found.base.virtual_size)
    result = _result(request, found, plan, after, recovered)
    warnings = [f"{path} is of no use any more, and is not ours to delete." for path in plan.left]
    if plan.lost:
        warnings.append(f"Bitmaps that could not go on: {', '.join(plan.lost)}. Who made them needs a full backup.")
    return Outcome(
        plan.changes or bool(recovered), result, {"chain": _names(before)}, {"chain": _names(after)}, tuple(warnings)
    )


def _result(
    request: CommitRequest,
    found: Found | None,
    plan: Plan | None,
    chain: list[dict[str, t.Any]],
    recovered: t.Sequence[str],
) -> dict[str, t.Any]:
    paths = {link.real: link.path for link in found.going} if found is not None else {}
    return {
        "image": request.path,
        "base": found.base.path if found is not None else None,
        "chain": chain,
        "committed_bytes": plan.committed if plan else 0,
        "needed_bytes": plan.needed if plan else 0,
        "deleted": [paths[path] for path in plan.delete] if plan else [],
        "left_behind": list(plan.left) if plan else [],
        "bitmaps": [merge.name for merge in plan.merges] if plan and plan.changes else [],
        "lost_bitmaps": list(plan.lost) if plan else [],
        "recovered": list(recovered),
    }


def _names(chain: t.Iterable[t.Mapping[str, t.Any]]) -> list[str]:
    return [f"{link['path']} (snapshot {link['snapshot']})" if link["snapshot"] else link["path"] for link in chain]
