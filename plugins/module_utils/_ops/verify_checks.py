# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Reading the files of backups, each one once for a whole run, however many of its points need it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import typing as t

from .._errors import ChecksumMismatch
from .._image import qemu_img
from .._repository._files import named, read_small
from .._repository.checksum import sha256
from .._repository.manifest import MAX_BYTES, DefinitionRecord
from .verify_types import Target

_Work = t.Callable[[], t.Coroutine[t.Any, t.Any, int]]


class Proofs:
    """What was found out about files in this run. ``close()`` ends what is still being read."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[str, str], asyncio.Task[int]] = {}
        self._room = asyncio.Semaphore(max(os.cpu_count() or 1, 2))  # sha256 of one file is bound to one processor

    async def checksums(self, target: Target) -> tuple[int, list[str]]:
        """Bytes that were compared, and the files that have no checksum. :raise ChecksumMismatch: as it says."""
        files = _files(target)
        await asyncio.to_thread(_definition, target)
        known = {path: digest for path, digest in files.items() if digest is not None}
        work = [self._once("sha256", path, self._hashing(path, digest)) for path, digest in known.items()]
        return sum(await _all(work)), [path for path, digest in files.items() if digest is None]

    async def images(self, target: Target) -> int:
        """Let qemu-img check the structure of every image; how many there are. :raise ImageToolFailed: damaged."""
        return sum(await _all([self._once("check", path, self._checking(path)) for path in _files(target)]))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _once(self, kind: str, path: str, work: _Work) -> asyncio.Task[int]:
        key = (kind, path)
        if key not in self._tasks:
            self._tasks[key] = asyncio.ensure_future(work())
        return self._tasks[key]

    def _hashing(self, path: str, expected: str) -> _Work:
        async def work() -> int:
            async with self._room:
                found = await sha256(path)
            if found != expected:
                raise ChecksumMismatch(path=path, algorithm="sha256", found=found, expected=expected)
            return os.stat(path).st_size

        return work

    def _checking(self, path: str) -> _Work:
        async def work() -> int:
            async with self._room:
                await qemu_img.check(path)
            return 1

        return work


async def _all(tasks: t.Sequence[asyncio.Task[int]]) -> list[int]:
    """Their results, or the first failure. The others go on: other points may need them."""
    return list(await asyncio.gather(*(asyncio.shield(task) for task in tasks)))


def _files(target: Target) -> dict[str, str | None]:
    return {
        target.store.image_path(manifest, record): record.sha256
        for links in target.chains
        for manifest, record in links
    }


def _definition(target: Target) -> None:
    for record in target.manifest.definition:
        _saved(os.path.join(target.directory, record.file), record)


def _saved(path: str, record: DefinitionRecord) -> None:
    with named(path, "reading"):
        found = hashlib.sha256(read_small(path, max(MAX_BYTES, record.size))).hexdigest()
    if found != record.sha256:
        raise ChecksumMismatch(path=path, algorithm="sha256", found=found, expected=record.sha256)
