# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Make a backup independent of older ones that go: new images, proved equal to the old chain, then one exchange.

Nothing that is published is ever written to. On nothing, the chain is copied by ``convert``, which reads and writes it
once. On a kept ancestor, a copy of the backup's own image is rebased: what ``convert -B`` would write is wrong, because
it copies only what the top image itself has allocated (measured with QEMU 7.2).
"""

from __future__ import annotations

import asyncio
import json
import os
import typing as t
from dataclasses import dataclass

from .._errors import ImageToolFailed, SpaceExhausted
from .._image import qemu_img
from .._image.header import read_header
from .._image.qemu_img import Image
from .._repository import chain, merge, space
from .._repository.chain import Link
from .._repository.manifest import DriveRecord, Manifest
from .._repository.merge import Replacement
from .._repository.names import MANIFEST
from .._repository.store import VmStore
from .backup_proof import proved, together
from .prune_observe import busy
from .prune_types import BecameBusy, MergeDiffers, MergeStep
from .restore_images import check_headers, verify

_NEARLY_FULL = 4 << 20  # bytes; qemu-img says why it failed only in words, the file system in numbers
_METADATA = 1 << 20  # bytes of an image without data, generously

ById = dict[str, Manifest]


@dataclass(frozen=True)
class Merged:
    """One new image: its record, and the bytes it occupies."""

    record: DriveRecord
    written: int


def links_of(store: VmStore, by_id: ById, backup: str, drive: str) -> list[Link]:
    """The chain from the backup down, as it lies there; what is wrong with it raises (see ``restore_images``)."""
    links = chain.chain(by_id.values(), backup, drive, damage=store.looks_intact)
    check_headers(store, links)
    return links


async def needed(store: VmStore, by_id: ById, steps: t.Iterable[MergeStep]) -> int:
    """Bytes that the new images of one backup take at most. Raises what :func:`links_of` does."""
    total = 0
    for step in steps:
        links = await asyncio.to_thread(links_of, store, by_id, step.backup, step.drive)
        if step.base is None:
            total += await qemu_img.measure(Image(store.image_path(*links[0]), "qcow2"), "qcow2")
        else:
            total += sum(record.size for _manifest, record in links[: 1 + len(step.absorbed)]) + _METADATA
    return total


async def merge_backup(
    store: VmStore, by_id: ById, backup: str, steps: t.Sequence[MergeStep], *, check: bool
) -> tuple[Manifest, int]:
    """Replace one backup by a merged one; its new manifest, and the bytes that were written.

    An error, a cancellation or a kill leaves the backup as it was, and everything it needs.
    """
    chains = [await asyncio.to_thread(links_of, store, by_id, step.backup, step.drive) for step in steps]
    if check:
        await verify(store, chains)  # damage must not be copied into an image with a fresh checksum
    replacement = Replacement(store.directory, backup)
    try:
        await asyncio.to_thread(replacement.begin)
        merged = [await _image(store, replacement, step, links) for step, links in zip(steps, chains)]
        text = _manifest(store, by_id[backup], steps, merged)
        without = {MANIFEST, *(part.record.file for part in merged)}
        await asyncio.to_thread(replacement.carry, without)
        manifest = await asyncio.to_thread(replacement.complete, text)
    except BaseException:
        replacement.drop()
        raise
    await asyncio.to_thread(_check_unused, store, replacement, by_id[backup])
    await asyncio.to_thread(replacement.swap)
    return manifest, sum(part.written for part in merged)


def _check_unused(store: VmStore, replacement: Replacement, manifest: Manifest) -> None:
    """A last look, as merging takes its time. Who opens it from here on reads the same from either."""
    reason = busy(store, manifest)
    if reason is not None:
        replacement.drop()
        raise BecameBusy(backup=manifest.id, vm=store.name, reason=reason)


async def _image(store: VmStore, replacement: Replacement, step: MergeStep, links: t.Sequence[Link]) -> Merged:
    old, record = Image(store.image_path(*links[0]), "qcow2"), links[0][1]
    backing = _backing(step, links)
    try:
        if backing is None:
            path = await asyncio.to_thread(replacement.image, record.file)
            await qemu_img.convert(old, path, "qcow2")
        else:
            path = await asyncio.to_thread(replacement.copy, record.file)
            await qemu_img.rebase(path, Image(backing, "qcow2"), unsafe=False)
    except ImageToolFailed as exc:
        if space.available(replacement.place) >= _NEARLY_FULL:
            raise
        raise SpaceExhausted(path=replacement.place, doing="merging", reason=exc.data["said"]) from exc
    size = await asyncio.to_thread(replacement.seal, record.file)
    header = read_header(path)
    if (header.backing_file, header.virtual_size) != (backing, record.virtual_size):
        raise MergeDiffers(drive=step.drive, backup=step.backup, reason="its header is another")
    # Beside each other: comparing waits for disks most of the time, hashing does not.
    digest = (await together((proved(path), _compared(old, path, step))))[0]
    new = _record(record, step, size, digest)
    return Merged(new, os.stat(path).st_blocks * 512)


async def _compared(old: Image, path: str, step: MergeStep) -> str:
    if not await qemu_img.compare(old, Image(path, "qcow2")):
        raise MergeDiffers(drive=step.drive, backup=step.backup, reason="qemu-img compare found a difference")
    return path


def _backing(step: MergeStep, links: t.Sequence[Link]) -> str | None:
    if step.base is None:
        return None
    base, record = links[1 + len(step.absorbed)]
    return f"../{base.id}/{record.file}"


def _record(record: DriveRecord, step: MergeStep, size: int, digest: str) -> DriveRecord:
    count, span = len(step.absorbed), f"{step.absorbed[-1]} to {step.absorbed[0]}"
    what = step.absorbed[0] if count == 1 else f"{count} backups, {span},"
    return DriveRecord(
        **{
            **vars(record),
            "level": "full" if step.base is None else record.level,
            "parent": step.base,
            "reason": f"merged with {what} when these were pruned",
            "size": size,
            "sha256": digest,
        }
    )


def _manifest(store: VmStore, old: Manifest, steps: t.Sequence[MergeStep], merged: t.Sequence[Merged]) -> bytes:
    """The published manifest with these drives changed, and all that this release does not know in it as it was."""
    data = json.loads(merge.read_raw_manifest(store.directory, old.id))
    changed = {step.drive: part.record for step, part in zip(steps, merged)}
    for entry in data["drives"]:
        record = changed.get(entry["name"])
        if record is not None:
            entry.update({key: getattr(record, key) for key in ("level", "parent", "reason", "size", "sha256")})
    levels = {entry["level"] for entry in data["drives"]}
    if levels == {"full"}:
        data["level"] = "full"
    else:
        data["level"] = "differential" if "differential" in levels else "incremental"
    return json.dumps(data, indent=1).encode()
