# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What there is to trim in the live chains of a VM: which images are suited, and what each of them would lose."""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._block.graph import Drive, Layer
from .._errors import BlockOpsError, ImageInvalid
from .._image import qemu_img
from .._image.chain import Link, Rules, walk
from .._image.extents import total
from .._image.header import read_header
from .._image.snapshot_record import PRESENT, SnapshotRecord, read_record, record_path
from .._repository import space
from .block_rebase_node import Options, find_holder, unbroken
from .block_rebase_types import Place, Trim, TrimOptions, TrimUnsuited, Verdict, family, gain_of, name_for
from .chain_merges import Needs
from .chain_options import ImageNotInChain
from .cold_boot import origin
from .img_rebase_build import plan_build
from .snapshot_boot import BootFiles
from .snapshot_options import Scene
from .snapshot_view import View

_SNAPSHOT_FIRST = "Take a snapshot (qmp_snapshot), whose overlay can be told what is below, and run again."
_LATER = "When the VM is switched off, qemu_img_rebase with trim=true does it."


class Planner:
    """Judges images of one VM. ``nodes`` as of read_command_line, ``children`` as of read_children."""

    def __init__(
        self,
        scene: Scene,
        view: View,
        options: TrimOptions,
        boot: BootFiles,
        nodes: dict[str, Options | None] | None,
        children: t.Mapping[str, tuple[str | None, str | None]],
    ) -> None:
        self._scene, self._view, self._options, self._boot = scene, view, options, boot
        self._nodes, self._children = nodes, children
        self._needs = Needs(scene, view, scene.vm.drives)
        self._taken: set[str] = set()

    async def plan(self, drives: t.Sequence[Drive]) -> list[Verdict]:
        """For each drive the images asked for, topmost first: what one is compared with is then not yet replaced.

        :raise TrimUnsuited, ImageNotInChain: the image that was asked for cannot be trimmed, or is not there.
        """
        wanted = self._wanted(drives)
        verdicts = [await self._judge(drive, index) for drive, index in wanted]
        if self._options.image is not None:
            for verdict in verdicts:
                if verdict.reason is not None and verdict.build is None:
                    raise self._unsuited(verdict)
        for trim in (verdict.trim for verdict in verdicts if verdict.trim is not None):
            require_space(trim)
        return verdicts

    def _wanted(self, drives: t.Sequence[Drive]) -> list[tuple[Drive, int]]:
        image = self._options.image
        if image is None:
            return [(drive, index) for drive in drives for index in range(1, len(drive.layers) - 1)]
        for same in (_is, _was):
            found = [(drive, index) for drive in drives for index in _indices(drive, self._view, image, same)]
            if found:
                return found
        known = "; ".join(f"{drive.name}: {', '.join(layer.file for layer in drive.layers)}" for drive in drives)
        raise ImageNotInChain(vm=self._scene.vm.name, option="image", reference=image, known=known or "no drives")

    def _unsuited(self, verdict: Verdict) -> TrimUnsuited:
        return TrimUnsuited(
            image=verdict.layer.file,
            drive=verdict.drive,
            vm=self._scene.vm.name,
            reason=verdict.reason,
            way_out=verdict.way_out,
        )

    async def _judge(self, drive: Drive, index: int) -> Verdict:
        layer = drive.layers[index]
        record = read_record(layer.file) if layer.protocol == "file" else None
        fault = self._fault_of_place(drive, index) or self._fault(drive, layer, record)
        place = fault or find_place(drive, layer.file, self._nodes, self._children)
        if isinstance(place, tuple) or record is None:
            reason, way_out = place if isinstance(place, tuple) else ("it has no record", _LATER)
            return Verdict(drive.name, layer, reason=reason, way_out=way_out)
        links = self._links(drive, index)
        if isinstance(links, str):
            return Verdict(drive.name, layer, reason=links, way_out=_LATER)
        try:
            with contextlib.ExitStack() as kept:
                for link in links:
                    kept.enter_context(qemu_img.unwritten(link.real))
                info = await qemu_img.info(layer.file, "qcow2", shared=True)
                build = await plan_build(links, info, links[1:], trim=True)
        except BlockOpsError as exc:
            return Verdict(drive.name, layer, reason=f"it could not be compared: {exc}", way_out=_LATER)
        gain = gain_of(build)
        if gain < self._options.min_gain or total(build.content.data) >= layer.allocated:
            return Verdict(drive.name, layer, reason=f"{gain} bytes of it are redundant", build=build)
        new = name_for(layer.file, self._is_free)
        self._taken.add(new)
        trim = Trim(drive.name, layer, record, links, build, new)
        return Verdict(drive.name, layer, trim=trim, build=build)

    def _is_free(self, path: str) -> bool:
        if path in self._taken:
            return False
        return path in self._scene.gone or not (os.path.lexists(path) or os.path.lexists(record_path(path)))

    def _fault_of_place(self, drive: Drive, index: int) -> tuple[str, str] | None:
        if index == 0:
            return "the guest writes to it", _SNAPSHOT_FIRST
        if index == len(drive.layers) - 1:
            return "it is the lowest of its chain, so there is nothing that it could have twice", ""
        others = [other for other in self._scene.vm.drives if other is not drive]
        if any(layer.file == drive.layers[index].file for other in others for layer in other.layers):
            return "it is in the chain of another drive as well", _LATER
        started = origin(self._boot.startup, drive) if self._boot.startup is not None else None
        if started is not None and started.explicit_backing:
            return "QEMU's command line says what is below its images, so the next start would go wrong", _LATER
        return None

    def _fault(self, drive: Drive, layer: Layer, record: SnapshotRecord | None) -> tuple[str, str] | None:
        if record is None or record.state != PRESENT:
            return "it is no overlay that this collection made, or a merge of it was begun", _LATER
        if layer.driver != "qcow2" or layer.encrypted or layer.data_file:
            return "it is encrypted, or has its data in another file", ""
        if layer.snapshots:
            return "it has internal snapshots, which would be lost", ""
        if any(not bitmap.persistent or bitmap.busy for bitmap in layer.bitmaps):
            return "it has bitmaps that are busy or are not kept in it", ""
        if any(below.protocol != "file" for below in drive.layers):
            return "its chain has images that are no files", ""
        needed = self._needs.reason(layer)
        return (needed, "Delete or rebase what nobody needs.") if needed is not None else None

    def _links(self, drive: Drive, index: int) -> tuple[Link, ...] | str:
        """The image and those below as headers name them: the comparison relies on that being QEMU's chain."""
        layers = drive.layers[index:]
        directories = tuple({os.path.dirname(os.path.realpath(layer.file)) for layer in layers})
        chain = walk(layers[0].file, "qcow2", Rules(directories, max_depth=max(200, len(layers))))
        if len(chain.links) != len(layers) or not all(map(self._same, chain.links, layers)):
            said = chain.problems[0].reason if chain.problems else "the headers name other images"
            return f"the chain below it is not what QEMU has open: {said}"
        damaged = [link.path for link in chain.links if link.header is not None and _strange(link)]
        return f"{damaged[0]} is encrypted, damaged, or has its data in another file" if damaged else chain.links

    def _same(self, link: Link, layer: Layer) -> bool:
        """In check mode a header may name the copy of a killed run, which would have been taken back by now."""
        real = os.path.realpath(layer.file)
        return link.real == real or (link.path in self._scene.gone and family(link.real) == family(real))


def _strange(link: Link) -> bool:
    header = link.header
    return header is not None and (header.encrypted or header.data_file or header.corrupt)


def find_place(
    drive: Drive,
    file: str,
    nodes: dict[str, Options | None] | None,
    children: t.Mapping[str, tuple[str | None, str | None]],
) -> Place | tuple[str, str]:
    """Where the image is, and how it is exchanged; or why it cannot be, and what to do."""
    index = next((number for number, layer in enumerate(drive.layers) if layer.file == file), None)
    if index is None or not 0 < index < len(drive.layers) - 1:
        return "it is not in the middle of the chain any more", ""
    found = find_holder(drive, index, nodes)
    if isinstance(found, str):
        return found, _SNAPSHOT_FIRST
    holder, options = found
    storage = children.get(holder.node, (None, None))[0]
    if storage is None or not unbroken(drive, drive.layers.index(holder), index + 1, children):
        return "there are filters between the images of its chain", _LATER
    return Place(drive, index, holder, {**options, "file": storage})


def spelled(above: Layer, old: str, new: str) -> str:
    """How the header of the image above names the copy, which is in the directory of the old one: as it named that."""
    try:
        name = read_header(os.path.realpath(above.file)).backing_file or ""
    except ImageInvalid:
        name = ""
    directory, base = os.path.split(name)
    if base in (os.path.basename(old), os.path.basename(new)) and ":" not in name:
        return os.path.join(directory, os.path.basename(new))
    return new


def require_space(trim: Trim) -> None:
    """:raise NoSpace: the copy does not fit beside the image."""
    what = f"A trimmed copy of {trim.layer.file}"
    space.require(os.path.dirname(trim.layer.file), trim.build.needed, what)


def _indices(drive: Drive, view: View, image: str, same: t.Callable[[str, str], bool]) -> list[int]:
    """An image by file, by node name, or by the name of the snapshot that it is."""
    found = [n for n, layer in enumerate(drive.layers) if same(image, layer.file) or image == layer.node]
    if found:
        return found
    placed = (placed for placed in view.placed if placed.drive.name == drive.name)
    return [placed.index + 1 for placed in placed if placed.record.name == image]


def _is(image: str, file: str) -> bool:
    return image == file


def _was(image: str, file: str) -> bool:
    """An image that an earlier run has trimmed is known by its old name, too."""
    return image.startswith("/") and family(image) == family(file)
