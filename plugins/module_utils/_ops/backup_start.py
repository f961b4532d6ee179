# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The first half of a backup: everything attached beforehand, then one point in time for all drives.

Order matters for the guest: images are made, attached and reserved before it is frozen, so the frozen window holds
nothing but one transaction.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
import typing as t
from datetime import datetime, timezone

from .._block.names import bitmap_name, object_name
from .._errors import NoSpace
from .._guest.guard import ThawGuard
from .._qmp.nodes import TargetImage, TargetNames, attach_target
from .._qmp.schema import Schema
from .._qmp.session import Command, Session
from .._repository import space
from .._repository.manifest import DriveRecord, Manifest, SkippedDrive, SourceRecord
from .._repository.names import image_file
from .._repository.partial import Partial
from .backup_options import BackupOptions
from .backup_plan import DrivePlan
from .quiesce import Frozen, quiesced

_LEAST_WINDOW = 0.1  # seconds for the transaction, however long the freeze took


@dataclasses.dataclass(frozen=True)
class BackupPlan:
    """What one run will do to one VM. ``drives`` in the order of their numbers."""

    vm_name: str
    vm_uuid: str | None
    level: str
    sync: str
    drives: tuple[DrivePlan, ...]
    skipped: tuple[SkippedDrive, ...]
    definition: tuple[str, ...]
    agent_socket: str | None
    running: bool
    warnings: tuple[str, ...] = ()


def target_names(repository: str, backup: str, number: int) -> TargetNames:
    return TargetNames(
        image=object_name(repository, backup, number, "target"),
        file=object_name(repository, backup, number, "file"),
        create=object_name(repository, backup, number, "create"),
    )


def job_id(repository: str, backup: str, number: int) -> str:
    return object_name(repository, backup, number, "job")


def temporary_bitmap(repository: str, backup: str, number: int) -> str:
    return object_name(repository, backup, number, "tmp")


async def attach(session: Session, plan: BackupPlan, partial: Partial, repository: str, options: BackupOptions) -> None:
    """Make, attach and reserve the image of every drive."""
    for number, drive in enumerate(plan.drives):
        file = image_file(drive.drive.name)
        fd = partial.create_image(file, 0o600)
        try:
            image = TargetImage(
                virtual_size=drive.drive.active.virtual_size,
                backing=None if drive.parent is None else f"../{drive.parent}/{drive.parent_file}",
                compression="zstd" if options.compress else None,
            )
            await attach_target(session, target_names(repository, partial.id, number), fd, image)
            what = f"The backup of drive {drive.drive.name} of VM {plan.vm_name}"
            await asyncio.to_thread(_reserve, fd, drive, partial.image_path(file), what)
        finally:
            os.close(fd)


def _reserve(fd: int, drive: DrivePlan, path: str, what: str) -> None:
    """Room for the copy, with some more for what the guest writes until the point in time. Sealing gives back the rest.

    Also for compressed images: what does not compress is stored plain, and a target that fills up in the middle can
    fail a guest's write.
    """
    try:
        space.reserve(fd, drive.reservation + drive.headroom, path, what)
    except NoSpace:
        space.reserve(fd, drive.reservation, path, what)


def transaction(
    plan: BackupPlan, repository: str, backup: str, options: BackupOptions, schema: Schema, speed: int
) -> Command:
    """The one command that is the point in time of all drives (QAPI: transaction)."""
    actions: list[dict[str, t.Any]] = []
    for number, drive in enumerate(plan.drives):
        actions += _bitmap_actions(drive, repository, backup, number)
        actions.append(_backup_action(drive, repository, backup, number, options, schema, speed))
    arguments: dict[str, t.Any] = {"actions": actions}
    if any(drive.bitmap for drive in plan.drives):
        # An expert's bitmap is cleared by QEMU when its copy succeeds, so all copies must succeed or none. (QEMU takes
        # no bitmap actions into such a transaction; our own bitmaps need none of this, they are only read.)
        arguments["properties"] = {"completion-mode": "grouped"}
    return Command("transaction", arguments)


def _bitmap_actions(drive: DrivePlan, repository: str, backup: str, number: int) -> list[dict[str, t.Any]]:
    """A new bitmap that records from this point on; and the union of what changed up to it, for the copy.

    The old bitmaps are only read: whatever becomes of this backup, they still know every change since theirs.
    """
    node = drive.drive.active.node
    actions: list[dict[str, t.Any]] = []
    if drive.track:
        new = {"node": node, "name": bitmap_name(repository, backup), "persistent": drive.persistent}
        actions.append({"type": "block-dirty-bitmap-add", "data": new})
    if drive.merge:
        name = temporary_bitmap(repository, backup, number)
        # It records as well: with an iothread, the guest may write between the merge and the start of the copy, which
        # are two actions of one transaction but not one instant, and such a write belongs to the copy.
        temporary = {"node": node, "name": name, "granularity": drive.granularity}
        sources = [bitmap if source == node else {"node": source, "name": bitmap} for source, bitmap in drive.merge]
        actions.append({"type": "block-dirty-bitmap-add", "data": temporary})
        merge = {"node": node, "target": name, "bitmaps": sources}
        actions.append({"type": "block-dirty-bitmap-merge", "data": merge})
    return actions


def _backup_action(
    drive: DrivePlan, repository: str, backup: str, number: int, options: BackupOptions, schema: Schema, speed: int
) -> dict[str, t.Any]:
    data: dict[str, t.Any] = {
        "job-id": job_id(repository, backup, number),
        "device": drive.drive.active.node,
        "target": target_names(repository, backup, number).image,
        # Of an image without backing, top is full without asking after every cluster that was never written: a sparse
        # drive of 2 TiB takes no time, and its backup no tables.
        "sync": "top" if drive.sync == "full" and drive.flat else drive.sync,
        "auto-dismiss": False,
        "on-target-error": "report",
        "on-source-error": "report",
    }
    if drive.merge:
        data.update({"bitmap": temporary_bitmap(repository, backup, number), "bitmap-mode": "never"})
    elif drive.bitmap is not None:
        data["bitmap"] = drive.bitmap
        if drive.bitmap_mode is not None:
            data["bitmap-mode"] = drive.bitmap_mode
    if options.compress:
        data["compress"] = True
    if speed:
        data["speed"] = speed
    if schema.argument("blockdev-backup", "on-cbw-error"):
        # A guest write must not fail because the target cannot take the old data first (QEMU 11.1 and later).
        data["on-cbw-error"] = "break-snapshot"
    return {"type": "blockdev-backup", "data": data}


def draft(plan: BackupPlan, partial: Partial, repository: str, options: BackupOptions, started: datetime) -> Manifest:
    """The manifest as far as it is known before the copy; the intent holds it, so that another run can finish."""
    definition = partial.save_definition(
        plan.definition, uid=options.ownership.uid, gid=options.ownership.gid, mode=options.ownership.file_mode
    )
    return Manifest(
        id=partial.id,
        repository=repository,
        sequence=1,
        vm_name=plan.vm_name,
        vm_uuid=plan.vm_uuid,
        level=plan.level,
        sync=plan.sync,
        consistency="crash",
        point=started,
        started=started,
        finished=started,
        drives=tuple(_record(drive) for drive in plan.drives),
        skipped=plan.skipped,
        definition=definition,
        tags=options.tags,
        collection=options.collection,
        warnings=plan.warnings,
    )


def _record(plan: DrivePlan) -> DriveRecord:
    image = plan.drive.active
    return DriveRecord(
        name=plan.drive.name,
        file=image_file(plan.drive.name),
        level=plan.level,
        virtual_size=image.virtual_size,
        size=0,
        copied=0,
        parent=plan.parent,
        reason=plan.reason,
        standalone=plan.standalone,
        node=image.node,
        source=SourceRecord(file=image.file, format=image.driver),
    )


async def take_point(
    session: Session,
    plan: BackupPlan,
    command: Command,
    options: BackupOptions,
    guard: ThawGuard | None,
    frozen: Frozen,
) -> None:
    """Freeze (when asked and possible), start all jobs in one transaction, thaw. Raises what any of them raises.

    The guest is thawed whatever happens, and ``frozen`` tells what became of it; see quiesce.
    """
    async with quiesced(
        plan.vm_name,
        plan.agent_socket,
        mode=options.quiesce,
        running=plan.running,
        budget=options.freeze_timeout,
        timeout=options.timeout,
        guard=guard,
        frozen=frozen,
    ):
        frozen.point = datetime.now(timezone.utc)
        before = time.monotonic()
        left = max(_LEAST_WINDOW, frozen.until - before)  # the freeze itself has used up some of its time
        await session.execute(command, timeout=left if frozen.held else None)
        frozen.transaction_ms = (time.monotonic() - before) * 1000
