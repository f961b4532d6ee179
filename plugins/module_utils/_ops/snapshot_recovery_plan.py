# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What runs that were killed have left, and what is to be done with it. Files are read, nothing is touched.

What each state of a record means when its overlay is found in a chain, or in none, is decided here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import os
import typing as t
from dataclasses import dataclass

from .._block.names import of_snapshot
from .._errors import BlockOpsError
from .._image.snapshot_record import (
    DISCARDED,
    MERGED,
    MERGING,
    PREPARING,
    PRESENT,
    REVERTING,
    STREAMING,
    SnapshotRecord,
    read_record,
)
from .cold_boot import Move
from .snapshot_options import Scene
from .snapshot_view import Placed, View


class RevertInterrupted(BlockOpsError):
    template = (
        "Going back to snapshot {snapshot} of VM {vm} was interrupted: drives {swapped} are back, the others are not, "
        "and the VM is {status}."
    )
    advice = "Nothing was touched. Run state=reverted for that snapshot again, which finishes it."


@dataclass(frozen=True)
class Recovery:
    """What there is to do.

    ``nodes`` to detach, ``doomed`` overlays to delete, records to write (``settled``) or to ``forget``, finished jobs
    to dismiss, records to write at ``last``, and whether to ``resume`` a guest stopped by a run that never came to its
    point. ``unmark``: overlays that stay without a record. ``mends``: what definition files of the task may name, and
    are to name instead, as they were rewritten for what then did not come, or not yet for what did.
    """

    nodes: tuple[str, ...] = ()
    doomed: tuple[SnapshotRecord, ...] = ()
    settled: tuple[SnapshotRecord, ...] = ()
    forget: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    resume: bool = False
    last: tuple[SnapshotRecord, ...] = ()
    unmark: tuple[str, ...] = ()
    mends: tuple[Move, ...] = ()

    @property
    def needed(self) -> bool:
        done = self.nodes or self.doomed or self.settled or self.forget or self.jobs or self.unmark
        return bool(done) or self.resume

    def sentences(self) -> list[str]:
        return [
            *(f"node {node} was left attached" for node in self.nodes),
            *(f"{record.overlay} was left by a run that did not come to its end" for record in self.doomed),
            *(f"{record.overlay} is in use, which its record did not know yet" for record in self.settled),
            *(f"the record of {overlay} was left without its overlay" for overlay in self.forget),
            *(f"{overlay} holds all of the image below, which it was merged with" for overlay in self.unmark),
            *(f"job {job} had ended and was not dismissed" for job in self.jobs),
            *(["the VM was stopped by a run that did not come to its end"] if self.resume else []),
        ]


def plan(scene: Scene, view: View) -> Recovery:
    vm = scene.vm
    _refuse_half_reverted(scene, view)
    jobs = _finished_jobs(scene)
    bypassed = {record.job for placed in view.placed for record in _bypassed(placed) if record.job}
    merged = {
        record.overlay
        for record in view.loose
        if _job_merged(scene, record) or (record.state == MERGING and record.job in bypassed)
    }
    merged |= {placed.record.image for placed in view.placed if _streamed(placed)}
    left = [
        record
        for record in view.loose
        if os.path.exists(record.overlay)
        and (record.state in (PREPARING, REVERTING, MERGED) or record.overlay in merged)
        and not record.stays
    ]
    settled = (
        *_settled(scene, view),
        *(record.in_state(MERGED, job=None) for record in view.loose if record.stays and record.overlay in merged),
    )
    # Copied into an overlay of the chain, and known by its record alone: what they lie on is in no chain any more.
    copied = [record for record in settled if record.state == MERGED and not record.stays]
    doomed = tuple({record.overlay: record for record in (*copied, *left)}.values())
    in_use = {layer.node for drive in vm.drives for layer in drive.layers}
    swapped = any(placed.record.state == REVERTING for placed in view.placed)
    # While some drives are back at a snapshot and others are not, definitions say that all are: better than a mixture.
    unused = {record.overlay: record for record in (*(() if swapped else view.loose), *doomed)}
    stopped = [record for record in doomed if record.state == REVERTING and record.running]
    return Recovery(
        nodes=tuple(node for node in vm.nodes if of_snapshot(node) and node not in in_use),
        doomed=doomed,
        settled=settled,
        last=tuple(settled_down(record) for record in settled if record.state == PRESENT and record.discards),
        forget=tuple(_without_overlay(view)),
        jobs=jobs,
        resume=bool(stopped) and vm.status == "paused" and not swapped,
        unmark=tuple(_unmarked(scene, view)),
        mends=tuple(moves_off(scene, unused.values())),
    )


def _without_overlay(view: View) -> t.Iterator[str]:
    """Overlays that were deleted right before a kill, and their records not; also those of a branch that was left."""
    branches = (path for placed in view.placed if placed.record.state == REVERTING for path in placed.record.discards)
    for overlay in dict.fromkeys((*(record.overlay for record in view.loose), *branches)):
        if not os.path.exists(overlay) and read_record(overlay) is not None:
            yield overlay


def _unmarked(scene: Scene, view: View) -> t.Iterator[str]:
    """Overlays that a foreign image was streamed into. The last one of a chain is on no image, so it is not placed."""
    for placed in view.placed:
        if _streamed(placed) and read_record(placed.record.image) is None:
            yield placed.record.overlay
    for drive in scene.vm.drives:
        record = read_record(drive.layers[-1].file) if drive.layers and drive.layers[-1].protocol == "file" else None
        if record is not None and record.state == STREAMING:
            yield record.overlay


def moves_off(scene: Scene, records: t.Iterable[SnapshotRecord]) -> t.Iterator[Move]:
    """From overlays that are not in use to the images that their drives run on."""
    for record in records:
        drive = scene.vm.drive(record.drive)
        if drive is not None and not drive.empty:
            active = drive.active
            yield Move(drive.name, (record.overlay,), active.file, "qcow2", active.driver)


def _refuse_half_reverted(scene: Scene, view: View) -> None:
    """Some drives are back at the snapshot and others are not: only going on makes sense of that."""
    swapped = [placed for placed in view.placed if placed.record.state == REVERTING and placed.active]
    if not swapped or scene.vm.running:
        return
    name = swapped[0].record.name
    if _goes_back(scene, name):
        return
    drives = ", ".join(placed.drive.name for placed in swapped)
    raise RevertInterrupted(snapshot=name, vm=scene.vm.name, swapped=drives, status=scene.vm.status)


def _goes_back(scene: Scene, name: str) -> bool:
    """Whether this run goes back to that snapshot, and so finishes what a killed one began."""
    return scene.options.state == "reverted" and scene.options.name == name


def _finished_jobs(scene: Scene) -> tuple[str, ...]:
    """Jobs of ours whose result nobody has looked at; that of a merge is looked at by ``_job_merged``."""
    return tuple(job.id for job in scene.vm.jobs.values() if of_snapshot(job.id) and job.status == "concluded")


def _job_merged(scene: Scene, record: SnapshotRecord) -> bool:
    job = scene.vm.jobs.get(record.job) if record.job is not None else None
    return job is not None and job.succeeded


def _bypassed(placed: Placed) -> t.Iterator[SnapshotRecord]:
    """The overlay that the one here was on, if it now is on what that one was to be committed into.

    QEMU changes the name in the header only when all is committed, so this tells it also when QEMU has died since.
    """
    if placed.record.image == placed.image.file:
        return
    below = read_record(placed.record.image)
    if below is not None and below.state in (MERGING, MERGED) and below.image == placed.image.file:
        yield below


def _settled(scene: Scene, view: View) -> t.Iterator[SnapshotRecord]:
    """Records whose overlay is in use, brought up to date."""
    for placed in view.placed:
        record = placed.record
        if record.state in (PREPARING, DISCARDED):
            yield record.in_state(PRESENT)
        elif record.state == MERGED:
            yield record.in_state(MERGING)  # started from an old definition, before that could be rewritten
        elif record.state == REVERTING and scene.vm.running and not _goes_back(scene, record.name):
            yield from _after_revert(record)
        elif _streamed(placed):
            yield from _after_stream(placed)
        elif record.state == PRESENT and record.discards:
            yield from _marked(record)
        elif record.state == PRESENT and any(_bypassed(placed)):
            yield dataclasses.replace(record, image=placed.image.file, image_format=placed.image.driver)


def _after_revert(record: SnapshotRecord) -> t.Iterator[SnapshotRecord]:
    """The VM is back and runs; what it left behind was not yet marked."""
    for path in record.discards:
        old = read_record(path)
        if old is not None and os.path.exists(path):
            yield old.in_state(DISCARDED)
    yield record.in_state(PRESENT, discards=())


def _streamed(placed: Placed) -> bool:
    """Whether the image below, which was to be copied into the overlay, has left the chain."""
    return placed.record.state == STREAMING and placed.image.file != placed.record.image


def _after_stream(placed: Placed) -> t.Iterator[SnapshotRecord]:
    """The overlay takes the place of the images that were copied into it: the record of the lowest becomes its own."""
    gone = records_down(placed.record.image, placed.image.file)
    if gone:
        yield from inheritance(placed.record, gone)


def records_down(file: str, until: str) -> list[SnapshotRecord]:
    """The records from the overlay ``file`` down to the one on ``until``; none when they do not lead there."""
    found: list[SnapshotRecord] = []
    while file != until:
        record = read_record(file)
        if record is None or record in found:
            return []
        found.append(record)
        file = record.image
    return found


def inheritance(record: SnapshotRecord, gone: t.Sequence[SnapshotRecord]) -> t.Iterator[SnapshotRecord]:
    """What to write, in this order, when the overlays ``gone`` were copied into the one of ``record``.

    Its own record comes first, and names them until they are deleted (``settled_down``): a kill in between leaves
    nothing without an owner.
    """
    lowest, files = gone[-1], tuple(each.overlay for each in gone)
    yield dataclasses.replace(lowest, overlay=record.overlay, state=PRESENT, discards=files, job=None, stays=False)
    yield from (each.in_state(MERGED) for each in gone)


def settled_down(record: SnapshotRecord) -> SnapshotRecord:
    """The record of an overlay that others were copied into, once those have gone."""
    return record.in_state(PRESENT, discards=())


def _marked(record: SnapshotRecord) -> t.Iterator[SnapshotRecord]:
    """What a kill in the middle of ``inheritance`` left to be written."""
    yield record
    gone = (read_record(path) for path in record.discards)
    yield from (each.in_state(MERGED) for each in gone if each is not None)
