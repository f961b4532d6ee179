# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The block graph as data: drives, their chains of images, their bitmaps. Pure; fed with QEMU's answers.

The shape of the graph comes from query-blockstats: its ``parent`` and ``backing`` carry node names in every QEMU
since 2.8 and are stable, unlike x-debug-query-block-graph; file names are no identity and are never used to find a
node.
"""

from __future__ import annotations

import posixpath
import typing as t
from dataclasses import dataclass

Raw = dict[str, t.Any]

# Drivers that pass data through: the image they stand above is what a drive's chain begins with.
FILTERS = frozenset({"throttle", "copy-on-read", "copy-before-write", "blkdebug", "blklogwrites", "preallocate"})


@dataclass(frozen=True)
class Bitmap:
    """A dirty bitmap of a node (QAPI: BlockDirtyInfo). ``count`` and ``granularity`` are bytes."""

    name: str
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool

    @property
    def usable(self) -> bool:
        return self.recording and not self.busy and not self.inconsistent

    @property
    def state(self) -> str:
        if self.inconsistent:
            return "inconsistent"
        if self.busy:
            return "busy"
        return "recording" if self.recording else "disabled"


@dataclass(frozen=True)
class InternalSnapshot:
    """A snapshot inside an image (QAPI: SnapshotInfo). ``vm_state_size`` is bytes, of the memory that is kept with it.

    QEMU gives an ``id`` that is unique in the image; several may have one name. ``date`` is seconds since 1970.
    """

    id: str
    name: str
    vm_state_size: int
    date: int


@dataclass(frozen=True)
class Layer:
    """One image of a chain, as a node of the block graph. Sizes in bytes; ``allocated`` is what it occupies.

    ``driver`` is its format (qcow2, raw), ``protocol`` what it lies on (file, host_device, nbd). ``direct``,
    ``no_flush`` and ``detect_zeroes`` are how QEMU was told to open it (QAPI: BlockDeviceInfo).
    """

    node: str
    driver: str
    protocol: str
    file: str
    virtual_size: int
    allocated: int
    read_only: bool
    backing_file: str | None
    compat: str | None
    data_file: str | None
    encrypted: bool
    cluster_size: int
    bitmaps: tuple[Bitmap, ...]
    direct: bool = False
    no_flush: bool = False
    detect_zeroes: str = "off"
    snapshots: tuple[InternalSnapshot, ...] = ()

    def bitmap(self, name: str) -> Bitmap | None:
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)

    @property
    def keeps_bitmaps(self) -> bool:
        """Whether this image can store a bitmap beyond the life of the QEMU process (qcow2 version 3)."""
        return self.driver == "qcow2" and self.compat != "0.10"

    @property
    def data_bound(self) -> int:
        """At most this many bytes of data are in the image. Only files can tell; anything else counts in full."""
        return min(self.allocated, self.virtual_size) if self.protocol == "file" else self.virtual_size


@dataclass(frozen=True)
class Drive:
    """What the guest sees, and the chain of images behind it, active image first."""

    name: str
    qdev: str | None
    device: str
    removable: bool
    filters: tuple[str, ...]
    layers: tuple[Layer, ...]

    @property
    def active(self) -> Layer:
        return self.layers[0]

    @property
    def empty(self) -> bool:
        return not self.layers

    @property
    def root(self) -> str:
        """The node its device is attached to: the topmost filter, or the active image itself."""
        return self.filters[0] if self.filters else self.active.node


def parse_drives(
    query_block: list[Raw], blockstats: list[Raw], named_nodes: list[Raw], directory: str | None = None
) -> tuple[Drive, ...]:
    """Drives in QEMU's order, from query-block, query-blockstats and query-named-block-nodes (flat).

    ``directory`` is QEMU's working directory: file names may be relative to it.
    """
    nodes = {node["node-name"]: node for node in named_nodes if node.get("node-name")}
    trees = {(stats.get("device", ""), stats.get("qdev")): stats for stats in blockstats}
    drives = []
    for block in query_block:
        device, qdev = block.get("device", ""), block.get("qdev")
        filters, layers = _walk(trees.get((device, qdev), {}), nodes, directory)
        root = filters[0] if filters else layers[0].node if layers else None
        drives.append(
            Drive(
                name=drive_name(qdev, device, root),
                qdev=qdev,
                device=device,
                removable=bool(block.get("removable")),
                filters=tuple(filters),
                layers=tuple(layers),
            )
        )
    return _without_twins(drives)


def fit_together(blockstats: list[Raw], named_nodes: list[Raw]) -> bool:
    """Whether every node of the trees is among the nodes. Not so when a job ended, with its filter, in between."""
    known = {node.get("node-name") for node in named_nodes}
    todo = list(blockstats)
    while todo:
        tree = todo.pop()
        if tree.get("node-name") and tree["node-name"] not in known:
            return False
        todo += [tree[child] for child in ("parent", "backing") if child in tree]
    return True


def drive_name(qdev: str | None, device: str, node: str | None) -> str:
    """The name a drive keeps over restarts: the device's id, else that of -drive, else the node's, else the path.

    QEMU reports ``/machine/peripheral/ID/virtio-backend`` for a virtio-blk device with the id ID.
    """
    parts = (qdev or "").split("/")
    if qdev and not qdev.startswith("/"):
        return qdev
    if len(parts) > 3 and parts[1:3] == ["machine", "peripheral"]:
        return parts[3]
    if device:
        return device
    if node and not node.startswith("#"):
        return node
    return parts[3] if len(parts) > 3 else (qdev or node or "unnamed")


def _without_twins(drives: list[Drive]) -> tuple[Drive, ...]:
    """Give drives that would share a name the path of their device instead, which is unique."""
    names = [drive.name for drive in drives]
    return tuple(
        Drive(
            name=drive.qdev or drive.name,
            qdev=drive.qdev,
            device=drive.device,
            removable=drive.removable,
            filters=drive.filters,
            layers=drive.layers,
        )
        if names.count(drive.name) > 1
        else drive
        for drive in drives
    )


def _walk(tree: Raw, nodes: dict[str, Raw], directory: str | None) -> tuple[list[str], list[Layer]]:
    """Filters above the active image, and the images from the active one down."""
    filters: list[str] = []
    layers: list[Layer] = []
    current: Raw | None = tree
    while current is not None:
        node = nodes.get(current.get("node-name", ""))
        if node is None:
            break
        if node["drv"] in FILTERS:
            if not layers:
                filters.append(node["node-name"])
            current = current.get("backing", current.get("parent"))
            continue
        layers.append(_layer(node, nodes.get(current.get("parent", {}).get("node-name", ""), node), directory))
        current = current.get("backing")
    return filters, layers


def _layer(node: Raw, storage: Raw, directory: str | None) -> Layer:
    image = node["image"]
    specific = image.get("format-specific", {}).get("data", {})
    return Layer(
        node=node["node-name"],
        driver=node["drv"],
        protocol=storage["drv"],
        # The file below says its plain name; the image itself says json:{...} as soon as anything was overridden in it.
        file=_absolute(storage["image"]["filename"], directory) if storage["drv"] == "file" else image["filename"],
        virtual_size=image["virtual-size"],
        # A block device (LVM, iSCSI) has no allocation of its own to tell.
        allocated=image.get("actual-size", 0) or 0,
        read_only=node["ro"],
        backing_file=image.get("full-backing-filename"),
        compat=specific.get("compat"),
        data_file=specific.get("data-file"),
        encrypted=bool(node.get("encrypted") or image.get("encrypted")),
        cluster_size=image.get("cluster-size", 65536),
        bitmaps=tuple(_bitmap(raw) for raw in node.get("dirty-bitmaps", ()) if raw.get("name")),
        direct=node.get("cache", {}).get("direct", False),
        no_flush=node.get("cache", {}).get("no-flush", False),
        detect_zeroes=node.get("detect_zeroes", "off"),
        snapshots=tuple(_snapshot(raw) for raw in image.get("snapshots", ())),
    )


def _absolute(file: str, directory: str | None) -> str:
    """File names as QEMU tells them may be relative to its working directory; ``json:`` ones stay as they are."""
    if directory is None or file.startswith("json:"):
        return file
    return posixpath.normpath(posixpath.join(directory, file))


def _bitmap(raw: Raw) -> Bitmap:
    return Bitmap(
        name=raw["name"],
        count=raw["count"],
        granularity=raw["granularity"],
        recording=raw["recording"],
        busy=raw["busy"],
        persistent=raw["persistent"],
        inconsistent=raw.get("inconsistent", False),
    )


def _snapshot(raw: Raw) -> InternalSnapshot:
    return InternalSnapshot(raw["id"], raw["name"], raw["vm-state-size"], raw["date-sec"])
