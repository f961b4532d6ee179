# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Restore drives of a point into new files: all of them or none, never over anything, never touching a backup."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import typing as t

from .._errors import ImageToolFailed, SpaceExhausted
from .._image import qemu_img
from .._repository import space
from .._repository.place import Place, claim, remove_leftovers, undoing
from ._outcome import Outcome
from .restore_definition import put_definition, write_definition
from .restore_plan import plan_restore
from .restore_types import DefinitionStep, DriveStep, Plan, Request

_NEARLY_FULL = 4 << 20  # bytes; qemu-img says why it failed only in words, the file system in numbers
_AT_ONCE = 2  # one qemu-img keeps 16 requests in flight; a second one fills the gaps at its ends


async def restore(request: Request, *, check_mode: bool) -> Outcome:
    """Observe, plan, execute. After an error nothing is there that was not there before."""
    began = time.monotonic()
    plan = await plan_restore(request)
    if plan.changes and not check_mode:
        await _execute(request, plan)
    elif not check_mode:
        for step in plan.drives:
            remove_leftovers(step.request.dest)
    return Outcome(
        changed=plan.changes,
        result=_result(plan, time.monotonic() - began),
        before=plan.view(after=False),
        after=plan.view(after=True),
        warnings=plan.warnings,
    )


async def _execute(request: Request, plan: Plan) -> None:
    """Write everything next to where it goes, then let it appear. A failure takes back what has appeared."""
    drives = [step for step in plan.drives if not step.present]
    definition = [step for step in plan.definition if step.state != "same"]
    for step in plan.drives:
        remove_leftovers(step.request.dest)
    places: list[Place] = []
    with contextlib.ExitStack() as stack:
        for drive in drives:
            place = claim(drive.request.dest)
            stack.callback(place.drop)
            places.append(place)
        await _write_all(request, list(zip(drives, places)))
        saved: list[tuple[DefinitionStep, Place]] = []
        for file in definition:
            saved.append((file, write_definition(file)))
            stack.callback(saved[-1][1].drop)
        _appear(places, saved)


def _appear(places: t.Sequence[Place], saved: t.Sequence[tuple[DefinitionStep, Place]]) -> None:
    with undoing() as undo:
        for place in places:
            place.appear()
            undo.append(_unlink(place.dest))
        for step, place in saved:
            undo.append(put_definition(step, place))


def _unlink(path: str) -> t.Callable[[], None]:
    return lambda: os.unlink(path)


async def _write_all(request: Request, pairs: t.Sequence[tuple[DriveStep, Place]]) -> None:
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(step: DriveStep, place: Place) -> None:
        async with room:
            await _write(request, step, place)
            await asyncio.to_thread(place.finish, request.owner)

    tasks = [asyncio.ensure_future(one(step, place)) for step, place in pairs]
    try:
        await asyncio.gather(*tasks)
    finally:  # the first failure ends the others, and no qemu-img outlives us
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _write(request: Request, step: DriveStep, place: Place) -> None:
    if step.instant:
        await qemu_img.create(place.content, "qcow2", step.record.virtual_size, backing=step.source)
        return
    options = {} if request.preallocation == "off" else {"preallocation": request.preallocation}
    fmt = step.request.format
    try:
        await qemu_img.convert(step.source, place.content, fmt, options=options, pass_fds=(place.lock,))
    except ImageToolFailed as exc:
        if space.available(place.directory) >= _NEARLY_FULL:
            raise
        raise SpaceExhausted(path=step.request.dest, doing="writing", reason=exc.data["said"]) from exc


def _result(plan: Plan, seconds: float) -> dict[str, t.Any]:
    return {
        "backup": plan.manifest.id,
        "level": plan.manifest.level,
        "verified": plan.verified,
        "seconds": round(seconds, 3),
        "drives": [_drive_result(step) for step in plan.drives],
        "definition": [
            {"path": step.dest, "from": step.record.path, "changed": step.state != "same"} for step in plan.definition
        ],
    }


def _drive_result(step: DriveStep) -> dict[str, t.Any]:
    try:
        info = os.stat(step.request.dest)
    except OSError:  # check mode
        size, allocated = None, None
    else:
        size, allocated = info.st_size, info.st_blocks * 512
    return {
        "name": step.record.name,
        "path": step.request.dest,
        "format": step.request.format,
        "changed": not step.present,
        "bytes": size,
        "allocated": allocated,
        "needed": step.needed,
        "virtual_size": step.record.virtual_size,
        "backup": step.links[0][0].id,
        "chain": [manifest.id for manifest, _record in step.links],
    }
