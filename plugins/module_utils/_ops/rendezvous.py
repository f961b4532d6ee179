# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Several VMs at one instant: they wait for each other at each stage, and when one gives up, all do."""

from __future__ import annotations

import asyncio
import typing as t
from contextlib import contextmanager
from dataclasses import dataclass

from .._errors import BlockOpsError


class GroupBroken(BlockOpsError):
    template = "VM {vm} was not snapshotted because the group is to share one instant and {culprit} failed{how}."
    advice = "It was not touched, and its guest is thawed. Mend the other VM, or run without group."


@dataclass
class _Instant:
    first: float
    last: float


class Rendezvous:
    """``members`` parties meet at stage after stage.

    ``meet`` returns when all have come. A member that fails (``member``) releases the others, who get GroupBroken; one
    that has nothing to do leaves early.
    """

    def __init__(self, members: int) -> None:
        self._members = members
        self._names: dict[asyncio.Task[t.Any] | None, str] = {}  # each member is a task
        self._waiting: dict[asyncio.Task[t.Any] | None, asyncio.Future[bool]] = {}
        self._culprit: str | None = None
        self._how = ""
        self._instant: _Instant | None = None

    @contextmanager
    def member(self, vm: str) -> t.Iterator[None]:
        """One party, from beginning to end."""
        self._names[asyncio.current_task()] = vm
        try:
            yield
        except BaseException:
            self._break(vm)
            raise
        finally:
            self._members -= 1
            del self._names[asyncio.current_task()]
            self._release_if_all()

    async def meet(self, vm: str, timeout: float | None = None) -> None:
        """Wait for the others, ``timeout`` seconds at most.

        :raise GroupBroken: one of them failed, or did not come in time.
        """
        all_came = False
        if self._culprit is None:
            arrival: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._waiting[asyncio.current_task()] = arrival
            self._release_if_all()
            done, _pending = await asyncio.wait({arrival}, timeout=timeout)
            if not done:
                late = sorted(name for task, name in self._names.items() if task not in self._waiting)
                self._break(", ".join(late) or "another one", " (it was not ready in time)")
            all_came = arrival.result()
        if not all_came:
            raise GroupBroken(vm=vm, culprit=self._culprit, how=self._how)

    def note(self, first: float, last: float) -> None:
        """A member's point in time lies between these two moments (time.monotonic)."""
        known = self._instant
        self._instant = _Instant(min(known.first, first), max(known.last, last)) if known else _Instant(first, last)

    @property
    def spread_ms(self) -> float | None:
        """Within how many milliseconds all points in time lie."""
        return round((self._instant.last - self._instant.first) * 1000, 1) if self._instant else None

    def _break(self, culprit: str, how: str = "") -> None:
        if self._culprit is None:
            self._culprit, self._how = culprit, how
        self._release(all_came=False)

    def _release_if_all(self) -> None:
        if self._waiting and len(self._waiting) >= self._members:
            self._release(all_came=True)

    def _release(self, *, all_came: bool) -> None:
        for arrival in self._waiting.values():
            if not arrival.done():
                arrival.set_result(all_came)
        self._waiting = {}
