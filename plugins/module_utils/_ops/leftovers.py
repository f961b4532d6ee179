# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What runs of ours left inside QEMU: finding it (pure) and removing it (idempotent).

One mechanism for three occasions: a run that failed, a run that was killed, and the end of every good run. Only names
of our own repository are looked at; what other tools or other repositories made is never touched.
"""

from __future__ import annotations

import asyncio
import typing as t
from dataclasses import dataclass

from .._block.graph import Drive
from .._block.names import parse_bitmap, parse_object, run_of
from .._errors import CommandFailed
from .._qmp.jobs import cancel, read_jobs
from .._qmp.nodes import forget_files, remove_bitmaps
from .._qmp.session import Session
from .._repository import chain
from .._repository.manifest import Manifest
from .vm import read_drives


@dataclass(frozen=True)
class Leftovers:
    """Jobs, nodes (in the order in which they can go) and ``(node, bitmap)`` pairs that nothing needs."""

    jobs: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    bitmaps: tuple[tuple[str, str], ...] = ()

    def sentences(self) -> list[str]:
        """For the result: what was (or would be) removed."""
        return [
            *(f"job {job}" for job in self.jobs),
            *(f"node {node}" for node in self.nodes),
            *(f"bitmap {bitmap} on node {node}" for node, bitmap in self.bitmaps),
        ]


@dataclass(frozen=True)
class Scope:
    """Whose leftovers count: of ``repository``, of the run ``only`` or of all runs but those in ``spare``.

    Bitmaps that a backup in ``manifests`` needs are kept in any case, and so are those of backups whose manifest is
    ``unreadable`` at the moment.
    """

    repository: str
    manifests: tuple[Manifest, ...] = ()
    only: str | None = None
    spare: frozenset[str] = frozenset()
    unreadable: frozenset[str] = frozenset()

    def covers(self, run: str) -> bool:
        return run == self.only if self.only is not None else run not in self.spare


def find(scope: Scope, drives: t.Iterable[Drive], nodes: t.Iterable[str], jobs: t.Iterable[str]) -> Leftovers:
    """What of ours is inside this QEMU and not needed."""
    return Leftovers(
        jobs=tuple(job for job in jobs if _doomed(scope, job)),
        # An image node goes before its file node.
        nodes=tuple(sorted((node for node in nodes if _doomed(scope, node)), key=lambda node: node.endswith("-file"))),
        bitmaps=tuple(
            (layer.node, bitmap.name)
            for drive in drives
            for kept in [followed_backups(scope, drive.name)]
            for layer in drive.layers
            # QEMU removes none from an image below a snapshot. Their turn comes when the image is written again.
            if not layer.read_only
            for bitmap in layer.bitmaps
            if _followed(bitmap.name) not in kept and _doomed(scope, bitmap.name)
        ),
    )


def followed_backups(scope: Scope, drive: str) -> set[str]:
    """Backups whose bitmaps stay: a next one of the drive can continue from its newest, and from its newest full."""
    followed = (
        chain.newest_with_drive(scope.manifests, drive),
        chain.newest_full_of_drive(scope.manifests, drive),
    )
    return {manifest.id for manifest in followed if manifest is not None} | scope.unreadable


def _followed(name: str) -> str | None:
    bitmap = parse_bitmap(name)
    return bitmap.backup if bitmap is not None else None


def _doomed(scope: Scope, name: str) -> bool:
    thing = parse_object(name)
    if thing is not None:
        return thing.repository == scope.repository and scope.covers(thing.run)
    bitmap = parse_bitmap(name)
    return bitmap is not None and bitmap.repository == scope.repository and scope.covers(run_of(bitmap.backup))


async def sweep(session: Session, scope: Scope, *, files: bool = True) -> list[str]:
    """Find and remove. Answers sentences on what was removed. Raises what QEMU refuses, and VmGone.

    ``files``: also those passed to QEMU and forgotten, which a run that comes to its end does not leave.
    """
    found = await look(session, scope)
    await cancel(session, found.jobs)
    for node in found.nodes:
        await _remove_node(session, node)
    await remove_bitmaps(session, found.bitmaps)
    if files:
        await forget_files(session, lambda label: _doomed(scope, label))
    return found.sentences()


async def look(session: Session, scope: Scope) -> Leftovers:
    (drives, nodes), jobs = await asyncio.gather(read_drives(session), read_jobs(session))
    return find(scope, drives, nodes, jobs)


async def _remove_node(session: Session, node: str) -> None:
    try:
        await session.command("blockdev-del", node_name=node)
    except CommandFailed:
        # A file node that the image above it owned goes with the image.
        if node in (await read_drives(session))[1]:
            raise
