# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Trust before use: are the images of a chain what their manifests say?

Headers first (rule 2 of the repository format), because QEMU opens whatever a header names; then checksums.
"""

from __future__ import annotations

import asyncio
import os
import typing as t

from .._errors import ChainBroken, ChecksumMismatch, ImageInvalid
from .._image.header import read_header
from .._repository.chain import Link
from .._repository.checksum import sha256
from .._repository.store import VmStore


def check_headers(store: VmStore, links: t.Sequence[Link]) -> None:
    """Refuse a chain whose images are not exactly as rule 2 wants them. Opens nothing with QEMU.

    :raise ImageInvalid: a header names, holds or hides something else.
    :raise ChainBroken: an image is missing or has another length.
    """
    for number, (manifest, record) in enumerate(links):
        damage = store.looks_intact(manifest, record)
        if damage is not None:
            raise ChainBroken(backup=links[0][0].id, vm=store.name, drive=record.name, reason=damage)
        path = store.image_path(manifest, record)
        parent = links[number + 1] if number + 1 < len(links) else None
        expected = None if parent is None else f"../{parent[0].id}/{parent[1].file}"
        header = read_header(path)
        wrong = {
            f"its backing file is {header.backing_file!r} instead of {expected!r}": header.backing_file != expected,
            f"its backing format is {header.backing_format!r}": expected is not None
            and header.backing_format != "qcow2",
            f"its virtual size is {header.virtual_size}": header.virtual_size != record.virtual_size,
            "it has an external data file": header.data_file,
            "it is encrypted": header.encrypted,
            "it is marked corrupt": header.corrupt,
        }
        for reason, applies in wrong.items():
            if applies:
                raise ImageInvalid(path=path, reason=reason)


async def verify(store: VmStore, chains: t.Iterable[t.Sequence[Link]]) -> tuple[bool, list[str]]:
    """Compare the SHA-256 of every file of the chains with its manifest, as many at once as there are processors.

    Answers whether every file had a checksum to compare with, and the paths of those that had none.

    :raise ChecksumMismatch: a file differs; the others are no longer read.
    """
    files = {store.image_path(manifest, record): record.sha256 for links in chains for manifest, record in links}
    room = asyncio.Semaphore(max(os.cpu_count() or 1, 2))

    async def one(path: str, expected: str) -> None:
        async with room:
            found = await sha256(path)
        if found != expected:
            raise ChecksumMismatch(path=path, algorithm="sha256", found=found, expected=expected)

    tasks = [asyncio.ensure_future(one(path, digest)) for path, digest in files.items() if digest is not None]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    without = [path for path, digest in files.items() if digest is None]
    return not without, without
