# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What images are: chain, snapshots, bitmaps, users, soundness. Reads images that nobody vouches for, and never writes.

The headers come first. Only when nothing in the whole chain is suspicious does qemu-img see any of its images, one by
one, without what lies below, and with bounds on time and memory.
"""

from __future__ import annotations

import asyncio
import os
import typing as t
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from .._errors import BlockOpsError
from .._image import qemu_img
from .._image.chain import Chain, Link, Rules, printable, rules_for, snapshot_records, walk
from .._image.qemu_img import Limits
from .._image.snapshot_record import SnapshotRecord
from .._image.users import holders
from ._outcome import Outcome


class ImageUnsafe(BlockOpsError):
    """A chain that qemu-img was kept away from. ``kind`` of the problem is ``problem``."""

    template = "{image} was not opened, because of {path} in its chain: {reason}."
    advice = "If it is as you want it, name the directories in allowed_directories, or the format, or raise the limit."


class ImagesFailed(BlockOpsError):
    template = "{failed} of {total} images could not be described. {reasons}"


@dataclass(frozen=True)
class ImageRequest:
    """An image to describe; without ``format`` it must be qcow2."""

    path: str
    format: str | None = None


@dataclass(frozen=True)
class InfoRequest:
    """``directories`` empty: of each image its own. ``timeout`` in seconds, for each call of qemu-img."""

    images: tuple[ImageRequest, ...]
    directories: tuple[str, ...]
    max_depth: int
    max_virtual_size: int
    check: bool
    timeout: float


async def describe_images(request: InfoRequest) -> Outcome:
    """Describe them, as many at once as there are processors. One that fails does not stop the others."""
    room = asyncio.Semaphore(max(os.cpu_count() or 1, 2))

    async def one(image: ImageRequest) -> tuple[dict[str, t.Any], BlockOpsError | None]:
        async with room:
            return await _describe(image, request)

    answers = await asyncio.gather(*(one(image) for image in request.images))
    failed = [error for _result, error in answers if error is not None]
    result = {"images": [answer for answer, _error in answers]}
    error = None
    if failed:
        reasons = " | ".join(str(error) for error in failed)
        error = (
            failed[0] if len(answers) == 1 else ImagesFailed(failed=len(failed), total=len(answers), reasons=reasons)
        )
    return Outcome(changed=False, result=result, error=error)


async def _describe(image: ImageRequest, request: InfoRequest) -> tuple[dict[str, t.Any], BlockOpsError | None]:
    path = os.path.abspath(image.path)
    rules = rules_for(path, request.directories, max_depth=request.max_depth, max_virtual_size=request.max_virtual_size)
    chain = await asyncio.to_thread(walk, path, image.format, rules)
    result = {"path": path, **_from_headers(chain), **await asyncio.to_thread(_users, chain)}
    try:
        refuse_problems(path, chain)
        top = chain.links[0]
        limits = Limits(seconds=request.timeout)
        result.update(_from_qemu_img(await qemu_img.info(top.path, top.format, shared=True, limits=limits), result))
        if request.check:
            result.update(await _check(top, limits))
    except BlockOpsError as exc:
        return {**result, "error": exc.to_result()}, exc
    return result, None


def safe_chain(path: str, fmt: str | None, rules: Rules) -> tuple[Link, ...]:
    """The chain of an image that tools may open.

    :raise ImageUnsafe: they may not.
    """
    chain = walk(path, fmt, rules)
    refuse_problems(path, chain)
    return chain.links


def refuse_problems(path: str, chain: Chain) -> None:
    for problem in chain.problems:
        raise ImageUnsafe(image=path, path=printable(problem.path), problem=problem.kind, reason=problem.reason)


def _from_headers(chain: Chain) -> dict[str, t.Any]:
    top = chain.links[0] if chain.links else None
    header = top.header if top is not None else None
    return {
        "format": top.format if top is not None else None,
        "virtual_size": top.virtual_size if top is not None else None,
        "allocated": top.allocated if top is not None else None,
        "encrypted": header.encrypted if header is not None else None,
        "corrupt": header.corrupt if header is not None else None,
        "compat": None if header is None else "0.10" if header.version == 2 else "1.1",
        "cluster_size": None,
        "dirty": None,
        "snapshots": [],
        "bitmaps": [],
        "chain": chain_result(chain.links),
        "problems": [{**asdict(problem), "path": printable(problem.path)} for problem in chain.problems],
        "check": None,
        "check_skipped": None,
    }


def chain_result(links: t.Sequence[Link]) -> list[dict[str, t.Any]]:
    """A chain as modules return it, the active image first."""
    return [_link_result(link, record) for link, record in zip(links, snapshot_records(links))]


def _link_result(link: Link, record: SnapshotRecord | None) -> dict[str, t.Any]:
    header = link.header
    backing = header.backing_file if header is not None else None
    return {
        "path": printable(link.path),
        "format": link.format,
        "backing_file": None if backing is None else printable(backing),
        "backing_format": header.backing_format if header is not None else None,
        "virtual_size": link.virtual_size,
        "allocated": link.allocated,
        "snapshot": record.name if record is not None else None,
    }


def _users(chain: Chain) -> dict[str, t.Any]:
    """Of a file that may not even be touched there is nothing to say."""
    if not chain.links:
        return {"in_use": None, "open_for_writing": None, "holders": []}
    real = chain.links[0].real
    return {
        "in_use": qemu_img.in_use(real),
        "open_for_writing": qemu_img.open_for_writing(real),
        "holders": [asdict(holder) for holder in holders(real)],
    }


def _from_qemu_img(info: t.Mapping[str, t.Any], known: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    data = (info.get("format-specific") or {}).get("data") or {}
    return {
        "cluster_size": info.get("cluster-size"),
        "dirty": info.get("dirty-flag"),
        "snapshots": [snapshot_result(entry) for entry in info.get("snapshots", ())],
        "bitmaps": [bitmap_result(entry, known["open_for_writing"]) for entry in data.get("bitmaps", ())],
    }


def snapshot_result(entry: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    try:
        date = datetime.fromtimestamp(entry["date-sec"], timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, OSError, ValueError):
        date = None  # no year that a calendar knows
    return {
        "id": entry["id"],
        "name": entry["name"],
        "vm_state_size": entry["vm-state-size"],
        "date": date,
    }


def bitmap_result(entry: t.Mapping[str, t.Any], written: bool) -> dict[str, t.Any]:
    """On disk "in-use" is a bitmap that some QEMU has in memory; when nobody writes, it was never saved."""
    flags = list(entry.get("flags", ()))
    return {
        "name": entry["name"],
        "granularity": entry["granularity"],
        "recording": "auto" in flags,
        "inconsistent": "in-use" in flags and not written,
    }


async def _check(link: Link, limits: Limits) -> dict[str, t.Any]:
    if link.format != "qcow2":
        return {"check_skipped": f"{link.format} images have nothing to check"}
    if qemu_img.open_for_writing(link.real):
        return {"check_skipped": "the image is open for writing, and would look damaged"}
    report = await qemu_img.check_report(link.path, link.format, limits=limits)
    found = {
        "corruptions": report.get("corruptions", 0),
        "leaks": report.get("leaks", 0),
        "errors": report.get("check-errors", 0),
    }
    return {"check": {**found, "sound": not found["corruptions"] and not found["errors"]}}
