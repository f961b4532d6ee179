# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""How an external snapshot is dropped from a chain: commit or stream, what it copies, and what forbids it."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from .._block.graph import Bitmap, Layer
from .._block.names import bitmap_name, parse_bitmap, snapshot_object
from .._errors import BlockOpsError, NoSpace
from .._image.dependents import dependents
from .._image.snapshot_record import SnapshotRecord, read_record
from .._image.users import holders
from .._qmp.session import Command
from .._repository import space
from .overlay import backing_name
from .snapshot_options import Scene
from .snapshot_view import Placed, View

_METADATA_SHARE = 4096  # tables of a qcow2 image: 8 bytes in L2 and 2 in refcounts for 64 KiB
_METADATA_BASE = 1 << 20


class ImageNeeded(BlockOpsError):
    """Merging would change or delete an image under somebody else's feet."""

    template = "Snapshot {snapshot} of VM {vm} cannot be dropped by {merge}: {image} is used by {users}."
    advice = "Nothing was touched. {way_out}"


@dataclass(frozen=True)
class Merge:
    """Dropping one snapshot of one drive. ``bytes_bound``: bytes to copy at most; ``doomed``: the file that goes then.

    ``left``: a file that nothing uses then, and that is not ours to delete. ``inherits``: the record the overlay gets
    from the image that is streamed into it.
    """

    placed: Placed
    how: str
    bytes_bound: int
    doomed: str | None
    left: str | None
    inherits: SnapshotRecord | None
    command: Command

    @property
    def job(self) -> str:
        return str(self.command.arguments["job-id"])

    @property
    def active_commit(self) -> bool:
        return self.how == "commit" and self.placed.active


def plan_merge(scene: Scene, view: View, placed: Placed) -> Merge:
    """:raise ImageNeeded: something else is based on what would change or go. :raise NoSpace: before it is tried."""
    how = _choose(scene, placed)
    merge = _commit(scene, placed) if how == "commit" else _stream(scene, placed)
    _refuse_users(scene, view, merge)
    _require_space(merge)
    return merge


def _choose(scene: Scene, placed: Placed) -> str:
    """Commit copies the overlay down, stream the image below up: whichever is less, unless a choice was made.

    Streaming leaves the image below behind; when that is not one of ours, nobody would ever delete it.
    """
    begun = {"merging": "commit", "streaming": "stream"}.get(placed.record.state)
    if scene.options.merge != "auto":
        return scene.options.merge if begun != "commit" else "commit"
    if begun is not None:
        return begun
    ours = placed.image.protocol == "file" and read_record(placed.image.file) is not None
    return "stream" if ours and placed.image.data_bound < placed.overlay.data_bound else "commit"


def _commit(scene: Scene, placed: Placed) -> Merge:
    drive, above = placed.drive, placed.drive.layers[placed.index - 1] if placed.index else None
    arguments: dict[str, t.Any] = {
        "job-id": snapshot_object(placed.record.name, drive.name, "commit"),
        "device": drive.root,
        "top-node": placed.overlay.node,
        "base-node": placed.image.node,
        "on-error": "report",
        "auto-dismiss": False,
        **_speed(scene),
    }
    if above is not None:
        arguments["backing-file"] = backing_name(above.file, placed.image.file)
    return Merge(
        placed=placed,
        how="commit",
        bytes_bound=placed.overlay.data_bound,
        doomed=placed.overlay.file,
        left=None,
        inherits=None,
        command=Command("block-commit", arguments),
    )


def _stream(scene: Scene, placed: Placed) -> Merge:
    layers, below = placed.drive.layers, placed.index + 2
    arguments: dict[str, t.Any] = {
        "job-id": snapshot_object(placed.record.name, placed.drive.name, "stream"),
        "device": placed.overlay.node,
        "on-error": "report",
        # Not kept for us to look at: until it is dismissed the stream's filter is left in the graph without a child,
        # and query-named-block-nodes, by whomever, then ends QEMU (7.2: bdrv_refresh_filename).
        "auto-dismiss": True,
        **_speed(scene),
    }
    if below < len(layers):
        arguments["base-node"] = layers[below].node
        arguments["backing-file"] = backing_name(placed.overlay.file, layers[below].file)
    record = read_record(placed.image.file) if placed.image.protocol == "file" else None
    return Merge(
        placed=placed,
        how="stream",
        bytes_bound=placed.image.data_bound,
        doomed=placed.image.file if record is not None else None,
        left=placed.image.file if record is None else None,
        inherits=record,
        command=Command("block-stream", arguments),
    )


def _speed(scene: Scene) -> dict[str, t.Any]:
    return {} if scene.options.bandwidth is None else {"speed": scene.options.bandwidth}


def _refuse_users(scene: Scene, view: View, merge: Merge) -> None:
    """Nobody else may be based on an image that changes (commit: the one below) or goes."""
    layers = merge.placed.drive.layers
    own = {os.path.realpath(layer.file) for layer in layers if layer.protocol == "file"}
    own |= {os.path.realpath(file) for file in scene.gone}
    touched = [merge.doomed] if merge.doomed is not None else []
    if merge.how == "commit" and merge.placed.image.protocol == "file":
        touched.append(merge.placed.image.file)
    _refuse_loss_inside(scene, merge)
    for image in touched:
        based = [file for file in dependents(image, view.directories) if os.path.realpath(file) not in own]
        others = [f"process {user.pid} ({user.command})" for user in holders(image) if user.pid != _pid(scene)]
        users = [f"{file}, which is based on it" for file in based] + others
        if users:
            raise ImageNeeded(
                snapshot=merge.placed.record.name,
                vm=scene.vm.name,
                merge=merge.how,
                image=image,
                users="; ".join(users),
                way_out="Delete those that nobody needs (a branch kept aside by a revert, for one), or rebase them.",
            )


def _refuse_loss_inside(scene: Scene, merge: Merge) -> None:
    """An image takes its internal and memory snapshots with it."""
    gone = merge.placed.overlay if merge.how == "commit" else merge.placed.image
    if merge.doomed is None or not gone.snapshots:
        return
    names = ", ".join(snapshot.name for snapshot in gone.snapshots)
    raise ImageNeeded(
        snapshot=merge.placed.record.name,
        vm=scene.vm.name,
        merge=merge.how,
        image=gone.file,
        users=f"the internal snapshots it holds ({names})",
        way_out="Remove those first (type=internal or memory, state=absent).",
    )


def _pid(scene: Scene) -> int:
    return scene.session.process.pid


def _require_space(merge: Merge) -> None:
    """The image that grows may need room for all that is copied, though not for more than it can ever hold."""
    target: Layer = merge.placed.image if merge.how == "commit" else merge.placed.overlay
    if target.protocol != "file":
        return
    room = max(0, max(merge.placed.overlay.virtual_size, target.virtual_size) - target.allocated)
    grows = min(merge.bytes_bound, room)
    needed = grows + grows // _METADATA_SHARE + (_METADATA_BASE if grows else 0)
    path = os.path.dirname(target.file)
    free = space.available(path)
    if needed > free:
        what = f"Dropping snapshot {merge.placed.record.name} of drive {merge.placed.drive.name} by {merge.how}"
        raise NoSpace(what=what, needed=needed, path=path, available=free)


def renumbering(merge: Merge) -> Command | None:
    """Tracking bitmaps above the dropped overlay count one image less from now on: ``NAME.2`` becomes ``NAME.1``.

    Only in an active image, which alone can be written. Above one that is not, the next backup finds the gap and is a
    full one.
    """
    placed = merge.placed
    if merge.how != "commit" or placed.index != 1:
        return None
    above, actions = placed.drive.active, []
    for bitmap in above.bitmaps:
        ours = parse_bitmap(bitmap.name)
        if ours is None or ours.layer < 2 or not bitmap.usable:
            continue
        name = bitmap_name(ours.repository, ours.backup, ours.layer - 1)
        if placed.overlay.bitmap(name) is not None:
            actions += _renamed(above.node, bitmap, name)
    return Command("transaction", {"actions": actions}) if actions else None


def _renamed(node: str, bitmap: Bitmap, name: str) -> list[dict[str, t.Any]]:
    new = {"node": node, "name": name, "granularity": bitmap.granularity, "persistent": bitmap.persistent}
    return [
        {"type": "block-dirty-bitmap-add", "data": new},
        {"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": name, "bitmaps": [bitmap.name]}},
        {"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": bitmap.name}},
    ]
