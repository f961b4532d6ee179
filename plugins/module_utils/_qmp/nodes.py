# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Target images inside QEMU: attaching new ones, detaching them, and removing what a run left there.

QEMU never opens a path of the repository: the module opens the file and passes the descriptor, so a repository may
be closed to the user QEMU runs as.
"""

from __future__ import annotations

import fcntl
import os
import typing as t
from dataclasses import dataclass

from .._errors import CommandFailed
from .jobs import run_to_end
from .session import Command, Session

NODES = Command("query-named-block-nodes", {"flat": True})


@dataclass(frozen=True)
class TargetNames:
    """Names inside QEMU of one target: its image node, its file node, and the job that makes its header."""

    image: str
    file: str
    create: str


@dataclass(frozen=True)
class TargetImage:
    """What a target image is to be. ``backing`` is written into the header; the backing image is not opened.

    It need not be: the job copies whole clusters, so nothing is ever read from below.
    """

    virtual_size: int
    backing: str | None = None
    compression: str | None = None


async def attach_target(session: Session, names: TargetNames, fd: int, image: TargetImage) -> None:
    """Format the open, empty file as qcow2 and attach it. The descriptor stays the caller's."""
    cache = {"direct": made_direct(fd)}
    passed = await session.pass_file(fd, names.file)
    file_name = f"/dev/fdset/{passed}"
    await session.command("blockdev-add", driver="file", node_name=names.file, filename=file_name, cache=cache)
    options: dict[str, t.Any] = {"driver": "qcow2", "file": names.file, "size": image.virtual_size}
    if image.backing is not None:
        options.update({"backing-file": image.backing, "backing-fmt": "qcow2"})
    if image.compression is not None:
        options["compression-type"] = image.compression
    await run_to_end(session, "blockdev-create", names.create, options=options)
    await session.command(
        "blockdev-add", driver="qcow2", node_name=names.image, file=names.file, backing=None, cache=cache
    )
    await session.command("remove-fd", fdset_id=passed)


async def detach_target(session: Session, names: TargetNames) -> int:
    """Detach the image, which flushes it, and answer the highest offset that was written in its file (bytes)."""
    await session.command("blockdev-del", node_name=names.image)
    stats = await session.command("query-blockstats", query_nodes=True)
    end = next((node["stats"]["wr_highest_offset"] for node in stats if node.get("node-name") == names.file), 0)
    await session.command("blockdev-del", node_name=names.file)
    return int(end)


async def forget_files(session: Session, doomed: t.Callable[[str], bool]) -> None:
    """Close passed files whose label is ``doomed``, which a killed run left. QEMU closes them once its guest runs."""
    for fdset in await session.command("query-fdsets"):
        if any(doomed(fd.get("opaque", "")) for fd in fdset["fds"]):
            await session.command("remove-fd", fdset_id=fdset["fdset-id"])


async def remove_bitmaps(session: Session, doomed: t.Sequence[tuple[str, str]]) -> None:
    """Remove ``(node, bitmap)`` pairs and look whether they have gone: QEMU may agree and keep one (issue 3516)."""
    if not doomed:
        return
    for node, name in doomed:
        await session.command("block-dirty-bitmap-remove", node=node, name=name)
    (nodes,) = await session.ask(NODES)
    there = {(node.get("node-name"), bitmap.get("name")) for node in nodes for bitmap in node.get("dirty-bitmaps", ())}
    for node, name in doomed:
        if (node, name) in there:
            said = "it agreed, but the bitmap is still there"
            raise CommandFailed(command="block-dirty-bitmap-remove", about=f" for {name}", said=said)


def made_direct(fd: int) -> bool:
    """Have the file written past the page cache (cache.direct) if it can be: tmpfs and some network ones cannot.

    Direct writes are twice as fast for a backup and leave the host's cache to the guests. The flag has to be on the
    descriptor before it is passed: newer QEMUs (10.0, not 7.2) take only one whose flags are those they open with.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class OverlayImage:
    """An overlay that is to become a node of its own, unattached. ``cache`` as of the image it is put on.

    ``backing_file`` is written into the header, so that the overlay opens by itself after a restart.
    """

    path: str
    node: str
    virtual_size: int
    backing_file: str
    backing_format: str
    cache: t.Mapping[str, bool]
    detect_zeroes: str = "off"


async def attach_overlay(session: Session, image: OverlayImage, helper: str, below: str | None) -> None:
    """Format the empty file and attach it, on top of the node ``below`` or, for ``blockdev-snapshot``, on nothing.

    ``helper`` names the file node and the job that format it. QEMU opens the path by itself: other than a backup's
    target, an overlay stays, and its name has to mean something to QEMU and to the next one that starts.
    """
    cache = dict(image.cache)
    file = {"driver": "file", "filename": image.path, "cache": cache}
    await session.command("blockdev-add", node_name=helper, **file)
    options: dict[str, t.Any] = {"driver": "qcow2", "file": helper, "size": image.virtual_size}
    options.update({"backing-file": image.backing_file, "backing-fmt": image.backing_format})
    try:
        await run_to_end(session, "blockdev-create", helper, options=options)
    finally:
        await session.command("blockdev-del", node_name=helper)
    await session.command(
        "blockdev-add",
        driver="qcow2",
        node_name=image.node,
        file={**file, "discard": "unmap"},  # what the guest discards is given back, or the overlay only ever grows
        discard="unmap",
        detect_zeroes=image.detect_zeroes,
        cache=cache,
        backing=below,
    )


async def flush(session: Session, node: str) -> None:
    """Have QEMU write out what it holds of an image in memory.

    There is no QMP command for that. (blockdev-snapshot begins with it, but not while a job has the node.)
    """
    await session.command("human-monitor-command", command_line=f"qemu-io {node} flush")
