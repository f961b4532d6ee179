# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Overlays: planning one, making its file and its record, attaching it, and taking all of that back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
import typing as t
from dataclasses import dataclass
from datetime import datetime, timezone

from .._block.graph import Drive, Layer
from .._block.names import bitmap_name, overlay_node, parse_bitmap, snapshot_object
from .._errors import BlockOpsError, CommandFailed, FileFailed
from .._image.snapshot_record import PREPARING, SnapshotRecord, claim_record, is_free, read_record, remove_record
from .._qmp.nodes import OverlayImage, attach_overlay
from .._qmp.session import Session
from .._repository._files import named, sync_directory
from .snapshot_options import DriveUnsuited, Scene

_STRANGE = re.compile(r"[^A-Za-z0-9_.-]+")
_MOST = 1000


class OverlayExists(BlockOpsError):
    template = "The overlay {path} of drive {drive} exists already, and is not one that this collection made."
    advice = "Nothing was touched. Move it away, or choose another name, overlay_name or overlay_directory."


@dataclass(frozen=True)
class Overlay:
    """One overlay to make: for ``drive``, on top of ``below``. ``bitmaps``: (name, granularity) it begins with."""

    drive: Drive
    below: Layer
    node: str
    record: SnapshotRecord
    bitmaps: tuple[tuple[str, int], ...]

    @property
    def path(self) -> str:
        return self.record.overlay

    @property
    def helper(self) -> str:
        return snapshot_object(self.record.name, self.drive.name, "create")

    def image(self) -> OverlayImage:
        return OverlayImage(
            path=self.path,
            node=self.node,
            virtual_size=self.below.virtual_size,
            backing_file=backing_name(self.path, self.below.file),
            backing_format=self.below.driver,
            cache={"direct": self.below.direct, "no-flush": self.below.no_flush},
            detect_zeroes=self.below.detect_zeroes,
        )

    def bitmap_actions(self) -> list[dict[str, t.Any]]:
        """For the transaction that puts it into use: every later change is recorded from its first instant."""
        return [
            {
                "type": "block-dirty-bitmap-add",
                "data": {"node": self.node, "name": name, "granularity": granularity, "persistent": True},
            }
            for name, granularity in self.bitmaps
        ]


def backing_name(overlay: str, below: str) -> str:
    """How the header names the image below: by its plain name in the same directory, so that both can move together."""
    if os.path.dirname(overlay) == os.path.dirname(below):
        return os.path.basename(below)
    return below


def plan_overlay(scene: Scene, drive: Drive, below: Layer, taken: t.Container[str], what: str) -> Overlay:
    """The overlay for one drive.

    :raise OverlayExists: its file is there and not ours.
    :raise DriveUnsuited: it is not known where to put it.
    """
    options, vm = scene.options, scene.vm
    record = SnapshotRecord(
        name=options.name,
        drive=drive.name,
        overlay=_free_path(drive, _path(scene, drive, below, what), scene.gone),
        image=below.file,
        image_format=below.driver,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        state=PREPARING,
        vm=vm.name,
        uuid=vm.uuid,
        definition=scene.definition,
    )
    return Overlay(drive, below, overlay_node(options.name, drive.name, taken), record, tuple(_carried(below)))


def _path(scene: Scene, drive: Drive, below: Layer, what: str) -> str:
    options, directory = scene.options, scene.options.overlay_directory
    if directory is None and below.protocol != "file":
        raise DriveUnsuited(
            drive=drive.name,
            vm=scene.vm.name,
            what=what,
            reason=f"its image {below.file} is no file, so there is no directory to put the overlay in",
            way_out="Say overlay_directory, a directory on storage that has room for what the guest writes.",
        )
    if below.protocol == "file" and not os.path.exists(below.file):
        # QEMU may tell a name relative to a directory it has left since (-daemonize), or the file was moved.
        reason = f"QEMU names its image {below.file}, and there is no such file"
        way_out = "Start the VM with absolute paths of its images."
        raise DriveUnsuited(drive=drive.name, vm=scene.vm.name, what=what, reason=reason, way_out=way_out)
    directory = directory or os.path.dirname(below.file)
    if not os.path.isdir(directory):
        raise FileFailed(path=directory, doing="looking for the directory of the overlays", reason="there is none")
    name = options.overlay_name
    for field, value in (("drive", drive.name), ("name", options.name), ("vm", scene.vm.name)):
        name = name.replace(f"{{{field}}}", _STRANGE.sub("_", value))
    return os.path.join(directory, name)


def _free_path(drive: Drive, path: str, gone: t.Container[str]) -> str:
    """The path itself, or with a number when an overlay of ours has it (a branch that was kept aside)."""
    stem, extension = os.path.splitext(path)
    candidate = path
    for number in range(2, _MOST):
        if candidate in gone or is_free(candidate):
            return candidate
        if read_record(candidate) is None:
            break
        candidate = f"{stem}-{number}{extension}"
    raise OverlayExists(path=candidate, drive=drive.name)


def _carried(below: Layer) -> t.Iterator[tuple[str, int]]:
    """Tracking bitmaps that go on in the overlay: NAME as NAME.1, NAME.1 as NAME.2, so that a gap shows.

    Of several that follow one backup, in an image that others were merged into, the one with the highest number.
    """
    highest: dict[tuple[str, str], tuple[int, int]] = {}
    for bitmap in below.bitmaps:
        ours = parse_bitmap(bitmap.name)
        if ours is not None and not bitmap.inconsistent and not bitmap.busy:
            key = (ours.repository, ours.backup)
            highest[key] = max(highest.get(key, (0, 0)), (ours.layer + 1, bitmap.granularity))
    for (repository, backup), (layer, granularity) in highest.items():
        yield bitmap_name(repository, backup, layer), granularity


async def make(session: Session, overlay: Overlay, backing_node: str | None, like: str | None) -> None:
    """Its record, its file (owner, mode and label as of ``like``), and its node, in this order. Durable when done.

    A failure leaves what was made to ``take_back``.
    """
    await asyncio.to_thread(_claim, overlay, like, session.process.pid)
    try:
        await attach_overlay(session, overlay.image(), overlay.helper, backing_node)
    except CommandFailed as exc:
        raise FileFailed(path=overlay.path, doing="QEMU's opening or formatting the overlay", reason=str(exc)) from exc
    directory = os.path.dirname(overlay.path)
    with named(directory, "flushing the directory"):
        await asyncio.to_thread(sync_directory, directory)


def _claim(overlay: Overlay, like: str | None, pid: int) -> None:
    if not claim_record(overlay.record):
        raise OverlayExists(path=overlay.path, drive=overlay.drive.name)
    with named(overlay.path, "making the overlay"):
        try:
            fd = os.open(overlay.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            remove_record(overlay.path)  # a file that has come up meanwhile must not seem to be ours
            raise
        try:
            dress(fd, like, pid)
        finally:
            os.close(fd)


def dress(fd: int, like: str | None, pid: int) -> None:
    """Owner, mode and security label of the image below, so that this QEMU, and the next one, may open the overlay."""
    known = os.stat(like) if like is not None else os.stat(f"/proc/{pid}")
    mine = os.fstat(fd)
    if like is None or not stat.S_ISREG(known.st_mode):
        known, mode = os.stat(f"/proc/{pid}"), 0o600
    else:
        mode = stat.S_IMODE(known.st_mode) | 0o600
    if (known.st_uid, known.st_gid) != (mine.st_uid, mine.st_gid):
        os.fchown(fd, known.st_uid, known.st_gid)
    os.fchmod(fd, mode)
    if like is not None:
        with contextlib.suppress(OSError):  # no labels here, or not ours to set: the directory's default holds
            os.setxattr(fd, "security.selinux", os.getxattr(like, "security.selinux"))


async def take_back(session: Session, overlays: t.Iterable[Overlay], nodes: t.Container[str]) -> None:
    """Remove overlays that are not in use, of those that were made. ``nodes``: those QEMU has now."""
    for overlay in overlays:
        for node in (overlay.node, overlay.helper):
            if node in nodes:
                await session.command("blockdev-del", node_name=node)
        await asyncio.to_thread(_remove_own, overlay)


def _remove_own(overlay: Overlay) -> None:
    """Whatever has this name may be another VM's, which was quicker: the record tells."""
    found = read_record(overlay.path)
    if found is not None and _owner(found) == _owner(overlay.record):
        remove_overlay(overlay.path)


def _owner(record: SnapshotRecord) -> tuple[str | None, str | None, str]:
    return record.vm, record.uuid, record.drive


def remove_overlay(path: str) -> None:
    """Delete an overlay of ours and then its record: a file without a record would be nobody's."""
    with named(path, "deleting the overlay"), contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    remove_record(path)
