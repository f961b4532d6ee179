# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The frame of each operation that changes the chains of a VM: connect, claim the VM, act, and say how long it took."""

from __future__ import annotations

import errno
import time
import typing as t
from contextlib import contextmanager

from .._errors import BlockOpsError
from .._qmp.session import Session
from .._unix import Claim
from ._outcome import Outcome
from .vm import VmEntry, session_for


class VmClaimed(BlockOpsError):
    template = "Another task changes the snapshots of the VM at {socket} at this moment."
    advice = "Nothing was touched. Run again when it has ended."


class _Limits(t.Protocol):
    """What of an operation's options the frame has to know."""

    @property
    def timeout(self) -> float: ...

    @property
    def check_mode(self) -> bool: ...


Act = t.Callable[[Session, VmEntry], t.Awaitable[Outcome]]


async def act_on(entry: VmEntry, options: _Limits, act: Act) -> Outcome:
    """Do it to one VM, alone.

    :raise VmClaimed: another task is at work on it.
    """
    started = time.monotonic()
    async with session_for(entry, timeout=options.timeout, read_only=options.check_mode) as session:
        with _claimed(session):
            outcome = await act(session, entry)
    outcome.result["seconds"] = round(time.monotonic() - started, 3)
    return outcome


def claim_name(pid: int) -> str:
    """Of the claim on the snapshots and chains of the QEMU process ``pid``."""
    return f"snapshot/{pid}"


@contextmanager
def _claimed(session: Session) -> t.Iterator[None]:
    """One change at a time: a VM with two monitors could be worked on by two tasks. Looking needs no claim."""
    if session.read_only or session.process.pid <= 0:
        yield
        return
    try:
        claim = Claim(claim_name(session.process.pid))
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise
        raise VmClaimed(socket=session.path) from exc
    try:
        yield
    finally:
        claim.close()
