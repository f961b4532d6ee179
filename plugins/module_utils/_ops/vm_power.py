# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""qmp_vm_power: stop a VM and be sure that its process has ended, or wait until a VM runs."""

from __future__ import annotations

import asyncio
import time
import typing as t
from contextlib import suppress
from dataclasses import dataclass

from .._errors import BlockOpsError, CommandTimedOut, SocketBusy, SocketDead, SocketMissing, VmGone
from .._guest.agent import Agent, AgentUnusable
from .._qmp.session import Session
from ._outcome import Outcome
from .vm import VmEntry, find_agent, session_for

_POLL = 0.1
# An agent that was asked before the guest had booted may never answer that question: ask anew.
_AGENT_TRY = 1.0
# Run states that never become "running" by themselves, and that no operator chose.
_HOPELESS = frozenset({"shutdown", "guest-panicked", "internal-error", "io-error"})
# Field 22 of /proc/PID/stat, counted from the one after the command name (field 3).
_STATE, _START_TIME = 0, 19


class VmStillRunning(BlockOpsError):
    template = "VM {vm} did not stop within {timeout:g} s of {asked}."
    advice = "It goes on running; nothing of its images may be touched."


class VmNotRunning(BlockOpsError):
    template = "VM {vm} does not run after {timeout:g} s: {reason}"


@dataclass(frozen=True)
class PowerOptions:
    """Times in seconds. ``quit``: whether a guest that does not shut down is switched off."""

    state: str
    powerdown_timeout: float
    quit: bool
    running_timeout: float
    wait_agent: bool
    timeout: float
    check_mode: bool


@dataclass(frozen=True)
class _Seen:
    name: str
    status: str
    agent_socket: str | None


class VmPower:
    """The operation on one entry of ``vms``."""

    def __init__(self, options: PowerOptions) -> None:
        self._options = options

    async def __call__(self, params: dict[str, t.Any]) -> Outcome:
        entry = VmEntry.from_params(params)
        started = time.monotonic()
        act = {"stopped": self._stopped, "running": self._running}
        outcome = await act[self._options.state](entry)
        outcome.result["seconds"] = round(time.monotonic() - started, 3)
        return outcome

    async def _stopped(self, entry: VmEntry) -> Outcome:
        read_only = self._options.check_mode
        try:
            async with session_for(entry, timeout=self._options.timeout, read_only=read_only) as session:
                seen = await _look(session, entry)
                ended = None if read_only else await self._end(session, seen)
        except (SocketMissing, SocketDead) as exc:
            return Outcome(False, {"name": entry.name, "status": "stopped", "ended": None, "reason": str(exc)})
        status = seen.status if read_only else "stopped"
        result = {"name": seen.name, "status": status, "ended": ended}
        return Outcome(True, result, before={"status": seen.status}, after={"status": "stopped"})

    async def _end(self, session: Session, seen: _Seen) -> str:
        """Power button, then quit. Returns which of them did it.

        :raise VmStillRunning: neither did, or quit is not allowed.
        """
        options, process = self._options, _Process(session)
        if seen.status == "running" and options.powerdown_timeout > 0:
            await session.command("system_powerdown")
            off = await self._powered_off(session, process)
            if process.ended():
                return "powerdown"
            if not off and not options.quit:
                raise VmStillRunning(vm=seen.name, timeout=options.powerdown_timeout, asked="system_powerdown")
        else:
            off = seen.status == "shutdown"
            if not off and not options.quit:
                raise VmStillRunning(vm=seen.name, timeout=0, asked=f"its run state being {seen.status}")
        with suppress(VmGone):  # its end may be quicker than its answer
            await session.command("quit")
        deadline = time.monotonic() + options.timeout
        while not process.ended():
            if time.monotonic() > deadline:
                raise VmStillRunning(vm=seen.name, timeout=options.timeout, asked="quit")
            await asyncio.sleep(_POLL)
        return "powerdown" if off else "quit"

    async def _powered_off(self, session: Session, process: _Process) -> bool:
        """Whether the guest shut itself down in time. With ``-no-shutdown`` QEMU is still there then."""
        deadline = time.monotonic() + self._options.powerdown_timeout
        while time.monotonic() < deadline:
            if process.ended():
                return True
            try:
                if (await session.command("query-status"))["status"] == "shutdown":
                    return True
            except (VmGone, CommandTimedOut):
                pass  # on its way out: the process tells
            await asyncio.sleep(_POLL)
        return process.ended()

    async def _running(self, entry: VmEntry) -> Outcome:
        options = self._options
        deadline = time.monotonic() + options.running_timeout
        seen = await self._seen(entry)
        while seen.status != "running" and not options.check_mode:
            if seen.status in _HOPELESS or time.monotonic() > deadline:
                raise VmNotRunning(vm=seen.name, timeout=options.running_timeout, reason=_why(entry, seen))
            await asyncio.sleep(_POLL)
            seen = await self._seen(entry)
        answers = None
        if options.wait_agent and not options.check_mode:
            await self._agent(entry, seen, deadline)
            answers = True
        return Outcome(False, {"name": seen.name, "status": seen.status, "agent": answers})

    async def _seen(self, entry: VmEntry) -> _Seen:
        """Where the VM is on its way up; one that does not listen yet is ``stopped``."""
        try:
            async with session_for(entry, timeout=self._options.timeout, read_only=True) as session:
                return await _look(session, entry)
        except (SocketMissing, SocketDead, SocketBusy, VmGone, CommandTimedOut):
            return _Seen(entry.name or entry.socket, "stopped", None)

    async def _agent(self, entry: VmEntry, seen: _Seen, deadline: float) -> None:
        socket = entry.agent_socket or seen.agent_socket
        if socket is None:
            raise AgentUnusable(socket="of no channel", reason="cannot answer: QEMU has no org.qemu.guest_agent.0")
        while True:
            try:
                agent = await Agent.open(socket, min(_AGENT_TRY, self._options.timeout))
            except AgentUnusable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_POLL)
            else:
                agent.close()
                return


def _why(entry: VmEntry, seen: _Seen) -> str:
    if seen.status == "stopped":
        return f"nobody answers on {entry.socket}."
    return f"its run state is {seen.status}."


async def _look(session: Session, entry: VmEntry) -> _Seen:
    """Name and state only: whatever is odd about the VM's drives must not keep it from being stopped."""
    status = (await session.command("query-status"))["status"]
    named = (await session.command("query-name")).get("name")
    return _Seen(entry.name or named or entry.socket, status, await find_agent(session))


class _Process:
    """The process behind a session. Where the kernel does not tell which, its connection stands for it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._born = _start_time(session.process.pid)

    def ended(self) -> bool:
        if self._born is None:
            return not self._session.connected
        return _start_time(self._session.process.pid) != self._born


def _start_time(pid: int) -> str | None:
    """When the process began, which tells a recycled pid apart. ``None``: no such process, or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[_STATE] in "ZX" else fields[_START_TIME]
