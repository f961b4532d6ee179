# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The instant of a snapshot: freeze, one command, thaw; for a group, all of them at once."""

from __future__ import annotations

import time
import typing as t
from datetime import datetime, timezone

from .._errors import BlockOpsError, GuestFrozen
from .._qmp.session import Command
from .quiesce import Frozen, quiesced
from .rendezvous import GroupBroken
from .snapshot_options import Scene
from .vm import find_agent

_LEAST_WINDOW = 0.1  # seconds for the command, however long the freeze took


async def take_point(scene: Scene, command: Command, frozen: Frozen) -> None:
    """Carry out ``command`` with the guest frozen as far as the options ask. Raises what any of it raises.

    Everything is prepared before. The guest is thawed whatever happens, and ``frozen`` tells what became of it.

    :raise GroupBroken: another VM of the group failed before the instant.
    """
    options, vm, group = scene.options, scene.vm, scene.group
    agent = scene.entry.agent_socket or (await find_agent(scene.session) if options.quiesce != "off" else None)
    if group is not None:
        await group.meet(vm.name)
    async with quiesced(
        vm.name,
        agent,
        mode=options.quiesce,
        running=vm.running,
        budget=options.freeze_timeout,
        timeout=options.timeout,
        guard=scene.guard,
        frozen=frozen,
    ):
        if group is not None:
            await group.meet(vm.name, max(_LEAST_WINDOW, frozen.until - time.monotonic()) if frozen.held else None)
        frozen.point = datetime.now(timezone.utc)
        before = time.monotonic()
        left = max(_LEAST_WINDOW, frozen.until - before)  # the freeze itself has used up some of its time
        await scene.session.execute(command, timeout=left if frozen.held else None)
        after = time.monotonic()
        frozen.transaction_ms = (after - before) * 1000
        if group is not None:
            group.note(before, after)


def about_point(scene: Scene, frozen: Frozen) -> dict[str, t.Any]:
    """What a result says about the instant."""
    return {
        "consistency": frozen.consistency,
        "point": None if frozen.point is None else frozen.point.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "freeze_ms": frozen.freeze_ms,
        "transaction_ms": round(frozen.transaction_ms, 1),
    }


def still_frozen(scene: Scene, frozen: Frozen, besides: BlockOpsError | None = None) -> GuestFrozen | None:
    """The error that goes before all others, when the guest did not confirm its thaw."""
    if not frozen.still_frozen:
        return None
    socket = scene.entry.agent_socket or "its channel"
    return GuestFrozen(vm=scene.vm.name, socket=socket, besides=f" Besides: {besides}" if besides else "")


async def settle(scene: Scene) -> float | None:
    """Wait until every VM of the group has its point: within how many milliseconds all of them lie, once that is known.

    ``None`` outside a group, and when one of the others failed at the last moment, which is its error and not ours.
    """
    if scene.group is None:
        return None
    try:
        await scene.group.meet(scene.vm.name)
    except GroupBroken:
        return None
    return scene.group.spread_ms
