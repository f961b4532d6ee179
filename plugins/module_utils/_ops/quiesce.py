# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Freezing a guest's file systems for an instant, and thawing them again without fail.

The word ``filesystem`` is earned: only when the agent froze something, and by the time of the thaw it was still frozen
(Windows thaws by itself after ten seconds), is the point in time file-system consistent. Everything else is ``crash``.
"""

from __future__ import annotations

import asyncio
import time
import typing as t
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime

from .._errors import BlockOpsError, QuiesceFailed
from .._guest.agent import Agent, AgentRefused, AgentUnusable
from .._guest.guard import ThawGuard

_THAW_TRIES = 3


@dataclass
class Frozen:
    """What became of a freeze: ``held`` while the guest is frozen for us, ``still_frozen`` when it may not have thawed.

    ``refused``: the agent would not freeze it.

    ``until`` (time.monotonic) is when the budget of a held freeze is used up. ``freeze_ms`` is the window from the
    freeze's order to the thaw's answer.
    """

    consistency: str = "crash"
    freeze_ms: float | None = None
    point: datetime | None = None
    transaction_ms: float = 0.0
    held: bool = False
    until: float = 0.0
    still_frozen: bool = False
    refused: bool = False
    warnings: list[str] = field(default_factory=list)


@asynccontextmanager
async def quiesced(
    vm: str,
    agent_socket: str | None,
    *,
    mode: str,
    running: bool,
    budget: float,
    timeout: float,
    guard: ThawGuard | None,
    frozen: Frozen,
) -> t.AsyncIterator[None]:
    """Hold the guest frozen for the block, as far as ``mode`` (required, try, off) asks and the guest can.

    ``budget``: seconds the guest may be frozen at most. Raises QuiesceFailed with mode ``required``, before the block.
    What became of it is noted in ``frozen``, also when the block raises.
    """
    agent, started = None, time.monotonic()
    if mode != "off":
        try:
            agent, started = await _freeze(agent_socket, running, budget, timeout, guard, frozen)
        except BlockOpsError as exc:
            if mode == "required":
                raise QuiesceFailed(vm=vm, reason=str(exc)) from exc
            frozen.warnings.append(f"The point in time is crash consistent only: {exc}")
    if agent is None or agent_socket is None:
        yield
        return
    frozen.held, frozen.until = True, started + budget
    try:
        yield
    finally:
        # Shielded: a cancelled task (a time-out, Ctrl-C) thaws as well.
        await asyncio.shield(_thaw(agent, agent_socket, started, budget, timeout, guard, frozen))


class NotFreezable(BlockOpsError):
    """There is nothing to ask: no agent is known, or the guest does not run."""

    template = "{reason}"


async def _freeze(
    agent_socket: str | None, running: bool, budget: float, timeout: float, guard: ThawGuard | None, frozen: Frozen
) -> tuple[Agent, float]:
    if agent_socket is None:
        raise NotFreezable(reason="no agent_socket is given and QEMU has no channel for a guest agent")
    if not running:
        raise NotFreezable(reason="the VM is paused, so its guest agent cannot answer")
    agent = await Agent.open(agent_socket, min(timeout, budget))
    if guard is not None:
        guard.frozen(agent_socket, budget + timeout)
    started = time.monotonic()
    try:
        count = await agent.call("guest-fsfreeze-freeze", budget)
        if not isinstance(count, int) or isinstance(count, bool):
            raise AgentUnusable(socket=agent_socket, reason=f"answered guest-fsfreeze-freeze with {count!r}")
        if count == 0:
            raise NotFreezable(reason="the guest agent froze no file system")
    except BlockOpsError as exc:
        # The order may have arrived although its answer did not, or only a part of the file systems is frozen.
        undone = Frozen(refused=isinstance(exc, AgentRefused))
        await asyncio.shield(_thaw(agent, agent_socket, started, budget, timeout, guard, undone))
        if undone.still_frozen:
            frozen.still_frozen = True
            frozen.warnings += undone.warnings
        raise
    return agent, started


async def _thaw(
    agent: Agent, path: str, started: float, budget: float, timeout: float, guard: ThawGuard | None, frozen: Frozen
) -> None:
    """Thaw, on a new connection when the old one is of no use, and judge what the point in time was worth."""
    try:
        thawed = await _thaw_once(agent, timeout, frozen)
    finally:
        agent.close()  # first: the channel serves one client, so a second connection would wait for this one
    for _try in range(_THAW_TRIES - 1):
        if thawed is None:
            thawed = await _thaw_anew(path, timeout, frozen)
    window = time.monotonic() - started
    frozen.freeze_ms = round(window * 1000, 1)
    if thawed is None:
        frozen.still_frozen = True
        frozen.warnings.append(
            f"THE GUEST MAY STILL BE FROZEN: its agent did not confirm guest-fsfreeze-thaw on {path}. It is tried "
            "again in the background; if the guest hangs, reset the agent inside it or the VM."
        )
        return
    if guard is not None:
        guard.thawed(path)
    if thawed == 0:
        frozen.warnings.append("The guest thawed by itself before the point in time, which is crash consistent only.")
    elif window > budget:
        frozen.warnings.append(f"The guest was frozen for {window:.1f} s, longer than freeze_timeout ({budget:g} s).")
        frozen.consistency = "filesystem"
    else:
        frozen.consistency = "filesystem"


async def _thaw_once(agent: Agent, timeout: float, frozen: Frozen) -> int | None:
    """How many file systems the agent thawed; ``None`` when the guest may still be frozen."""
    try:
        count = await agent.call("guest-fsfreeze-thaw", timeout)
    except AgentRefused:
        return await _thawed_already(agent, timeout, frozen)
    except AgentUnusable:
        return None
    return count if isinstance(count, int) and not isinstance(count, bool) else None


async def _thawed_already(agent: Agent, timeout: float, frozen: Frozen) -> int | None:
    """What a refused thaw means: nothing is frozen any more, or the agent cannot thaw. Its status tells."""
    try:
        status = await agent.call("guest-fsfreeze-status", timeout)
    except AgentRefused:
        return 0 if frozen.refused else None  # an agent without these commands has not frozen anything either
    except AgentUnusable:
        return None
    return 0 if status == "thawed" else None


async def _thaw_anew(path: str, timeout: float, frozen: Frozen) -> int | None:
    try:
        agent = await Agent.open(path, timeout)
    except AgentUnusable:
        return None
    try:
        return await _thaw_once(agent, timeout, frozen)
    finally:
        agent.close()
