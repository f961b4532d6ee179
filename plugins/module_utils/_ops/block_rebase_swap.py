# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""One image of a live chain is trimmed: a copy beside it, and the exchange; a kill anywhere costs at most the copy.

The copy's record is ``preparing`` while it is made: whoever comes next deletes it. Then it is ``present`` and says
which image it replaces (``discards``), and only then does a header name it. From there on both images are whole and
show the same, and nobody deletes either until the chain tells which of the two is in use::

    record, copy, bitmaps, fsync -> blockdev-add -> record -> change-backing-file -> blockdev-reopen
        -> records -> blockdev-del -> delete the old image -> record

If the copy is in the chain, ``snapshot_recovery`` finishes. If it is not, ``settle`` here takes it all back.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import typing as t

from .._block.graph import Layer
from .._block.names import overlay_node
from .._errors import BlockOpsError, CommandFailed
from .._image import qemu_img
from .._image.dependents import dependents
from .._image.header import read_header
from .._image.snapshot_record import (
    MERGED,
    PREPARING,
    PRESENT,
    SnapshotRecord,
    read_record,
    records_in,
    write_record,
)
from .._repository._files import named, sync_directory
from .block_rebase_node import read_children, read_command_line
from .block_rebase_plan import find_place, require_space, spelled
from .block_rebase_types import Done, Place, Trim, TrimFailed, TrimOptions, family
from .img_rebase_build import make
from .img_rebase_types import Backing
from .overlay import dress, remove_overlay
from .snapshot_options import Scene
from .snapshot_view import Placed, View, refuse_while_jobs_run
from .vm import read_drives, read_nodes, read_vm

_STATE = "The chain is what it was and the guest runs on."
_WHAT = "trimming an image"


async def run_trim(scene: Scene, options: TrimOptions, trim: Trim, done: Done) -> Scene:
    """Build, exchange, tidy up. The scene as it is then.

    :raise TrimFailed, NoSpace: the chain is what it was.
    """
    await asyncio.to_thread(require_space, trim)
    try:
        await _build(scene, trim)
    except BlockOpsError as exc:
        await asyncio.to_thread(remove_overlay, trim.new)
        raise _failed(scene, trim, "building the copy", exc, done) from exc
    scene = dataclasses.replace(scene, vm=await read_vm(scene.session, scene.entry.name))
    exchange = await _exchange_of(scene, trim, done)
    try:
        await exchange.forward()
    except BlockOpsError as exc:
        state = await exchange.back()
        raise _failed(scene, trim, "putting the copy in its place", exc, done, state) from exc
    await asyncio.to_thread(_book, trim, exchange.place.above, options)
    await _tidy(scene, options, trim, done)
    done.trims.append(trim)
    return dataclasses.replace(scene, vm=await read_vm(scene.session, scene.entry.name))


async def _build(scene: Scene, trim: Trim) -> None:
    await asyncio.to_thread(_claim, trim, scene.session.process.pid)
    header = read_header(trim.links[0].real)
    below, name = trim.links[1], header.backing_file or trim.links[1].path
    with contextlib.ExitStack() as kept:
        for link in trim.links:
            kept.enter_context(qemu_img.unwritten(link.real))
        await make(trim.build, trim.layer.file, Backing(name, below.path, below.real, below.format), trim.new)
    await asyncio.to_thread(_sync, trim.new)


def _claim(trim: Trim, pid: int) -> None:
    write_record(_record(trim, PREPARING))
    with named(trim.new, "making the copy"):
        fd = os.open(trim.new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            dress(fd, trim.layer.file, pid)
        finally:
            os.close(fd)


def _record(trim: Trim, state: str, *discards: str) -> SnapshotRecord:
    return dataclasses.replace(trim.record, overlay=trim.new, state=state, discards=discards, job=None, stays=False)


def _sync(path: str) -> None:
    with named(path, "flushing the copy"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_directory(os.path.dirname(path))


async def _exchange_of(scene: Scene, trim: Trim, done: Done) -> Exchange:
    """Looked up anew: building takes long, and an image above may have been exchanged before this one."""
    try:
        refuse_while_jobs_run(scene, _WHAT)
        drive = scene.vm.drive(trim.drive)
        nodes = await asyncio.to_thread(read_command_line, scene.session.process.pid)
        children = await read_children(scene.session)
        fault = ("the drive has gone", "")
        place = find_place(drive, trim.layer.file, nodes, children) if drive is not None else fault
        if isinstance(place, Place):
            return Exchange(scene, trim, place)
        raise BlockOpsError(message=f"{place[0]}. {place[1]}")
    except BlockOpsError as exc:
        await asyncio.to_thread(remove_overlay, trim.new)
        raise _failed(scene, trim, "looking for its place in the chain", exc, done) from exc


class Exchange:
    """From the image to its copy, and back as long as the chain is not on the copy."""

    def __init__(self, scene: Scene, trim: Trim, place: Place) -> None:
        self.place = place
        self._session, self._trim = scene.session, trim
        taken = set(scene.vm.nodes)
        self.node = overlay_node(trim.record.name, place.drive.name, taken)
        self._rungs = [
            (layer, overlay_node(f"{trim.record.name}\0{layer.file}", place.drive.name, taken))
            for layer in reversed(place.rungs)
        ]
        self._renamed = False

    async def forward(self) -> None:
        """:raise BlockOpsError: it did not come to its end."""
        trim, place = self._trim, self.place
        await self._attach(trim.new, self.node, place.layer, place.below.node)
        await asyncio.to_thread(write_record, _record(trim, PRESENT, trim.layer.file))
        self._renamed = True
        await rename_below(self._session, place.drive.root, place.above, trim.layer.file, trim.new)
        # Those QEMU opened by itself are opened once more, by name: they cannot be told what is below. Only now, as
        # it could not have written to the header of one that is open twice.
        below = self.node
        for layer, node in self._rungs:
            await self._attach(layer.file, node, layer, below)
            below = node
        await self._session.command("blockdev-reopen", options=[{**place.options, "backing": below}])

    async def _attach(self, file: str, node: str, like: Layer, below: str) -> None:
        """Read-only, as all below the active image, and otherwise as an overlay of ours is attached."""
        cache = {"direct": like.direct, "no-flush": like.no_flush}
        await self._session.command(
            "blockdev-add",
            driver="qcow2",
            node_name=node,
            read_only=True,
            file={"driver": "file", "filename": file, "cache": cache, "discard": "unmap"},
            discard="unmap",
            detect_zeroes=like.detect_zeroes,
            cache=cache,
            backing=below,
        )

    async def back(self) -> str:
        """What could be taken back is; where that leaves the chain, as a sentence."""
        trim, place = self._trim, self.place
        try:
            drives, _nodes = await read_drives(self._session)
            if any(layer.file == trim.new for drive in drives for layer in drive.layers):
                return f"{trim.new} is in its place all the same, and the guest runs on. The next run finishes."
            if self._renamed:
                await rename_below(self._session, place.drive.root, place.above, trim.new, trim.layer.file)
                await asyncio.to_thread(write_record, _record(trim, PREPARING))
            nodes = await read_nodes(self._session)
            for node in [*(node for _layer, node in reversed(self._rungs)), self.node]:
                if node in nodes:
                    await self._session.command("blockdev-del", node_name=node)
            await asyncio.to_thread(remove_overlay, trim.new)
        except BlockOpsError as exc:
            return f"The guest runs on. {trim.new} was left ({exc}) and must stay: the next run sorts that out."
        return _STATE


async def rename_below(session: t.Any, root: str, above: Layer, old: str, new: str) -> None:
    """Have the header of the image above name ``new`` in the place of ``old``; sent twice it changes nothing."""
    name = await asyncio.to_thread(spelled, above, old, new)
    await session.command("change-backing-file", device=root, image_node_name=above.node, backing_file=name)


def _book(trim: Trim, above: Layer, options: TrimOptions) -> None:
    """The chain is on the copy: the image above is about it now, and nothing needs the old one any more."""
    _repoint(above.file, trim.new)
    for record in records_in(os.path.dirname(trim.new)):
        # Those replaced before, and kept: they are known by an image of the chain.
        if record.state == MERGED and record.image == trim.layer.file:
            write_record(dataclasses.replace(record, image=trim.new))
    old = read_record(trim.layer.file)
    if old is not None:
        write_record(old.in_state(MERGED, stays=not options.delete))


def _repoint(overlay: str, image: str) -> None:
    record = read_record(overlay)
    if record is not None and record.image != image:
        write_record(dataclasses.replace(record, image=image))


async def _tidy(scene: Scene, options: TrimOptions, trim: Trim, done: Done) -> None:
    nodes = await read_nodes(scene.session)
    gone = [trim.layer.node] if trim.layer.node in nodes else []
    for node in gone:
        with contextlib.suppress(CommandFailed):
            await scene.session.command("blockdev-del", node_name=node)
    done.freed += trim.layer.allocated - os.stat(trim.new).st_blocks * 512
    if options.delete:
        await asyncio.to_thread(remove_overlay, trim.layer.file)
        done.deleted.append(trim.layer.file)
    else:
        done.kept.append(trim.layer.file)
    await asyncio.to_thread(write_record, _record(trim, PRESENT))


def _failed(scene: Scene, trim: Trim, doing: str, exc: BlockOpsError, done: Done, state: str = _STATE) -> BlockOpsError:
    about = {"image": trim.layer.file, "drive": trim.drive, "vm": scene.vm.name, "doing": doing, "reason": str(exc)}
    return TrimFailed(done=done.sentence(), state=state, **about)


async def settle(scene: Scene, view: View) -> list[str]:
    """What a killed run left that ``recover`` leaves alone; in check mode only said.

    An exchange that was begun is taken back: the copy's name goes from the header, and then the copy. Records above a
    copy that is in use follow the chain.
    """
    said = []
    for record in view.loose:
        place = _begun(view, scene, record)
        if place is None:
            continue
        said.append(f"{record.overlay} was to take the place of {record.discards[0]}, which did not come to its end")
        if not scene.check_mode:
            drive, above = place
            await rename_below(scene.session, drive, above, record.overlay, record.discards[0])
            await asyncio.to_thread(write_record, record.in_state(PREPARING, discards=()))
            await asyncio.to_thread(remove_overlay, record.overlay)
    for placed in _outdated(view):
        said.append(f"the record of {placed.record.overlay} named an image that is no longer below it")
        if not scene.check_mode:
            await asyncio.to_thread(_repoint, placed.record.overlay, placed.image.file)
    return said


def abandoned(view: View, scene: Scene) -> list[str]:
    """Copies that ``settle`` deletes."""
    return [record.overlay for record in view.loose if _begun(view, scene, record) is not None]


def _begun(view: View, scene: Scene, record: SnapshotRecord) -> tuple[str, Layer] | None:
    """For a copy in no chain, whose original is in one: the drive's root, and the image above the original."""
    if record.state != PRESENT or len(record.discards) != 1:
        return None
    for drive in scene.vm.drives:
        for above, layer in zip(drive.layers, drive.layers[1:]):
            if layer.file == record.discards[0]:
                # A branch that was kept aside since then may be based on the copy, which then stays.
                based = {os.path.realpath(file) for file in dependents(record.overlay, view.directories)}
                return (drive.root, above) if based <= {os.path.realpath(above.file)} else None
    return None


def _outdated(view: View) -> t.Iterator[Placed]:
    for placed in view.placed:
        named_below, below = placed.record.image, placed.image.file
        if placed.record.state == PRESENT and named_below != below and family(named_below) == family(below):
            yield placed
