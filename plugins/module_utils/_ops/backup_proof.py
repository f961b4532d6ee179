# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Proving finished images before they are published: qemu-img check and SHA-256, several at once, but not too many.

SHA-256 of one file is bound to one core (1.5 GB/s with SHA instructions); two drives use two. More at once than
``_AT_ONCE`` would add memory (the buffers of each) and little speed, because then the disk is the limit.
"""

from __future__ import annotations

import asyncio
import typing as t
import weakref

from .._image import qemu_img
from .._repository.checksum import sha256

T = t.TypeVar("T")

_AT_ONCE = 2
# One gate for all VMs of a call. By loop, because Python 3.9 ties a semaphore to a loop when it is made.
_gates: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


async def proved(path: str) -> str:
    """The SHA-256 of an image that qemu-img found sound. Raises what check() and sha256() raise."""
    loop = asyncio.get_running_loop()
    async with _gates.setdefault(loop, asyncio.Semaphore(_AT_ONCE)):
        return (await together((sha256(path), _checked(path))))[0]


async def _checked(path: str) -> str:
    await qemu_img.check(path)
    return path


async def together(work: t.Iterable[t.Coroutine[t.Any, t.Any, T]]) -> list[T]:
    """Do all at the same time. When one fails, the others are cancelled and have ended before its error is raised."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
