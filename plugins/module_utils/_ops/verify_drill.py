# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The restore drill: boot a backup for a moment, see that it lives, and leave nothing behind.

The backup's images are the read-only backing files of overlays in a private directory. Everything the drill has lies in
there: overlays, sockets, console. It ends with the directory, in this process, in the guard, or in the next run.
"""

from __future__ import annotations

import asyncio
import os
import time
import typing as t
import uuid
from dataclasses import dataclass

from .._errors import BlockOpsError, ImageToolFailed, SpaceExhausted, TargetUnwritable
from .._guest import program
from .._guest.agent import Agent, AgentUnusable
from .._guest.drill_guard import DrillGuard
from .._guest.program import Program
from .._guest.room import Room, new_room
from .._image import qemu_img
from .._image.qemu_img import Image
from .._repository import space
from .verify_command import AGENT, CONSOLE, QMP, Overlay, command_line
from .verify_types import Drill, DrillEnded, DrillImpossible, DrillRefused, DrillTimeout, Target

_POLL = 0.1
# An agent that was asked before the guest had booted may never answer that question: ask anew.
_AGENT_TRY = 1.0
_LAST_LOOK = 0.5  # seconds for what a guest said just before it switched itself off
_NEARLY_FULL = 4 << 20  # bytes; qemu-img says why it failed only in words, the file system in numbers
_WINDOW = 1 << 16  # bytes of console looked at again, for what was cut between two looks


@dataclass(frozen=True)
class Proof:
    """Seconds from the start of QEMU until everything asked for was seen, and what that was."""

    seconds: float
    conditions: tuple[str, ...]


class _Seen:
    """What a drill has seen so far, and what it waits for now."""

    def __init__(self) -> None:
        self.conditions: list[str] = []
        self.waiting = ""


async def boot(target: Target, drill: Drill, guard: DrillGuard) -> Proof:
    """Boot the point and wait for what the drill asks. Whatever happens, nothing of it is left afterwards.

    :raise DrillTimeout, DrillEnded, DrillRefused, DrillImpossible, ProgramMissing: as they say.
    """
    refuse_unbootable(target)
    try:
        room = new_room(drill.work_directory)
    except OSError as exc:
        raise TargetUnwritable(path=drill.work_directory, reason=exc.strerror or str(exc)) from exc
    guard.begins(room.directory)
    try:
        overlays = [await _overlay(target, room, number) for number in range(len(target.manifest.drives))]
        return await _run(target, drill, room, overlays)
    except (DrillTimeout, DrillEnded, DrillRefused) as exc:
        _blame_space(room, exc)
        raise
    finally:
        # In a thread and shielded: a cancelled run has to wait for this, too.
        await asyncio.shield(asyncio.to_thread(room.end))
        guard.ended(room.directory)


def refuse_unbootable(target: Target) -> None:
    """:raise DrillImpossible: an image lacks the data below it."""
    alone = [drive.name for drive in target.manifest.drives if not drive.standalone]
    if alone:
        raise DrillImpossible(
            backup=target.manifest.id,
            vm=target.store.name,
            reason=f"the image of drive {alone[0]} lacks the data below it (sync={target.manifest.sync})",
        )


def _blame_space(room: Room, exc: BlockOpsError) -> None:
    """A guest that cannot write to its overlay proves nothing about the backup. :raise SpaceExhausted: it cannot."""
    if space.available(room.directory) < _NEARLY_FULL:
        raise SpaceExhausted(path=os.path.dirname(room.directory), doing="a drill ran in it", reason=str(exc)) from exc


async def _overlay(target: Target, room: Room, number: int) -> Overlay:
    drive = target.manifest.drives[number]
    path = room.path(f"{number}.qcow2")
    backing = Image(target.store.image_path(target.manifest, drive), "qcow2")
    try:
        await qemu_img.create(path, "qcow2", drive.virtual_size, backing=backing)
    except ImageToolFailed as exc:
        _blame_space(room, exc)
        raise  # it opens what lies below, so this may well be the backup's fault
    return Overlay(drive.name, path, drive.source.serial)


async def _run(target: Target, drill: Drill, room: Room, overlays: t.Sequence[Overlay]) -> Proof:
    name = os.path.basename(room.directory).lstrip(".")
    began = time.monotonic()
    qemu = await program.start(
        room, command_line(drill.machine, overlays, room.directory, name, str(uuid.uuid4())), "qemu.log"
    )
    seen = _Seen()
    watching = asyncio.ensure_future(_watch(target, drill, room, seen))
    ending = asyncio.ensure_future(qemu.ended())
    try:
        await asyncio.wait({watching, ending}, timeout=drill.timeout, return_when=asyncio.FIRST_COMPLETED)
        if ending.done() and not watching.done():
            await asyncio.wait({watching}, timeout=_LAST_LOOK)
        if not watching.done():
            raise _failure(target, drill, room, qemu, seen)
        watching.result()
        return Proof(round(time.monotonic() - began, 3), tuple(seen.conditions))
    finally:
        watching.cancel()
        await qemu.kill()
        await asyncio.gather(watching, ending, return_exceptions=True)


def _failure(target: Target, drill: Drill, room: Room, qemu: Program, seen: _Seen) -> BlockOpsError:
    about: dict[str, t.Any] = {"backup": target.manifest.id, "vm": target.store.name}
    about.update(console=program.tail(room.path(CONSOLE)), said=qemu.said(), seen=list(seen.conditions))
    if qemu.process.returncode is None:
        return DrillTimeout(**about, timeout=drill.timeout, reason=f"{seen.waiting} is still waited for")
    lines = about["said"].splitlines()
    errors = [line for line in lines if line.startswith("qemu") and "warning:" not in line]  # hints may follow
    reason = (errors or lines or [f"{seen.waiting} was still waited for"])[-1]
    return DrillEnded(**about, status=qemu.process.returncode, reason=reason)


async def _watch(target: Target, drill: Drill, room: Room, seen: _Seen) -> None:
    """Come back when all was seen."""
    seen.waiting = "QEMU itself"
    await program.running(room.path(QMP))
    if drill.agent:
        seen.waiting = "the guest agent"
        await _agent(room.path(AGENT))
        seen.conditions.append("agent")
    if drill.console is not None:
        seen.waiting = f"{drill.console.pattern!r} on the console"
        await _console(room.path(CONSOLE), drill.console.search)
        seen.conditions.append("console")
    if drill.check:
        seen.waiting = "the end of the check"
        await _check(target, drill, room)
        seen.conditions.append("check")


async def _agent(path: str) -> None:
    while True:
        try:
            agent = await Agent.open(path, _AGENT_TRY)
        except AgentUnusable:
            await asyncio.sleep(_POLL)
        else:
            agent.close()
            return


async def _console(path: str, search: t.Callable[[str], object]) -> None:
    """Look at what is new, together with the end of what was there before: the guest may print without end."""
    position, window = 0, b""
    while True:
        try:
            with open(path, "rb") as stream:
                stream.seek(position)
                new = stream.read(_WINDOW)
        except FileNotFoundError:
            new = b""
        position += len(new)
        window = (window + new)[-2 * _WINDOW :]
        if new and search(window.decode(errors="replace").replace("\r", "")):
            return
        if len(new) < _WINDOW:
            await asyncio.sleep(_POLL)


async def _check(target: Target, drill: Drill, room: Room) -> None:
    """The user's command, which may take as long as the drill may."""
    environment = {
        "BLOCKOPS_VM": target.store.name,
        "BLOCKOPS_BACKUP": target.manifest.id,
        "BLOCKOPS_AGENT_SOCKET": room.path(AGENT),
        "BLOCKOPS_QMP_SOCKET": room.path(QMP),
        "BLOCKOPS_CONSOLE": room.path(CONSOLE),
    }
    check = await program.start(room, drill.check, "check.log", environment)
    try:
        status = await check.ended()
    finally:
        await check.kill()
    if status != 0:
        raise DrillRefused(
            backup=target.manifest.id,
            vm=target.store.name,
            status=status,
            said=check.said(),
            console=program.tail(room.path(CONSOLE)),
        )
