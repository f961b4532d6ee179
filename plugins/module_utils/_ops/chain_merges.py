# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The plan of one drive's chain: what others need, which jobs, what each of them copies, and whether there is room."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from .._block.chain_plan import COMMIT, STREAM, ChainPlan, Image, Step, groups, plan_chain
from .._block.graph import Drive, Layer
from .._block.names import snapshot_object
from .._errors import NoSpace
from .._image.dependents import backing_paths
from .._image.snapshot_record import MERGED, SnapshotRecord, read_record
from .._image.users import holders_of
from .._repository import space
from .chain_options import ChainImageNeeded, ChainOptions, files_of
from .snapshot_options import Scene
from .snapshot_view import View

_METADATA_SHARE = 4096  # tables of a qcow2 image: 8 bytes in L2 and 2 in refcounts for 64 KiB
_METADATA_BASE = 1 << 20


@dataclass(frozen=True)
class Merge:
    """One job on one drive. Its layers are told by node, which stay what they are while other jobs change the chain.

    ``dropped``: the layers that leave the chain, topmost first; ``above``: the one on top of them (commit), ``below``:
    the one the target is put on (stream). ``doomed``: files to be deleted then. ``needed`` and ``free``: bytes on the
    file system of the target.
    """

    drive: Drive
    how: str
    target: Layer
    dropped: tuple[Layer, ...]
    above: Layer | None
    below: Layer | None
    images: str
    data: int
    needed: int
    free: int | None
    doomed: frozenset[str] = frozenset()

    @property
    def job(self) -> str:
        ends = (self.dropped[0], self.target) if self.how == COMMIT else (self.target, self.dropped[-1])
        return job_name(self.drive, self.how, *ends)

    @property
    def active_commit(self) -> bool:
        return self.how == COMMIT and self.above is None

    @property
    def becomes_active(self) -> bool:
        return self.active_commit or (self.how != COMMIT and self.target.node == self.drive.active.node)

    @property
    def deleted(self) -> list[str]:
        return [layer.file for layer in self.dropped if layer.file in self.doomed]

    @property
    def kept(self) -> list[str]:
        """Files that leave the chain and stay where they are."""
        return [layer.file for layer in self.dropped if layer.file not in self.doomed]

    def to_result(self) -> dict[str, t.Any]:
        return {
            "how": self.how,
            "target": self.target.file,
            "dropped": [layer.file for layer in self.dropped],
            "bytes": self.data,
            "space_needed": self.needed,
            "space_free": self.free,
        }


def job_name(drive: Drive, how: str, top: Layer, base: Layer) -> str:
    """A next run finds the job of a killed one by this, whatever it would choose itself."""
    return snapshot_object(f"{how}\0{top.file}\0{base.file}", drive.name, how)


def record_of(layer: Layer) -> SnapshotRecord | None:
    return read_record(layer.file) if layer.protocol == "file" else None


class Needs:
    """Who else needs the images of a VM: files based on them, and processes that have them open. Looked up once."""

    def __init__(self, scene: Scene, view: View, drives: t.Sequence[Drive]) -> None:
        # Those that nothing needs any more need nothing.
        gone = {*scene.gone, *(record.overlay for record in view.loose if record.state == MERGED)}
        self._gone = {os.path.realpath(file) for file in gone}
        # A base that two drives of the VM share is needed by the other one.
        self._own = {layer.node: _files(drive) for drive in drives for layer in drive.layers}
        layers = [layer for drive in drives for layer in drive.layers if layer.protocol == "file"]
        self._based = _overlays(view.directories)
        pid = scene.session.process.pid
        users = holders_of(layer.file for layer in layers)
        self._users = {file: [user for user in found if user.pid != pid] for file, found in users.items()}

    def reason(self, layer: Layer) -> str | None:
        """Who else needs the image, as a sentence; ``None`` when nobody does."""
        if layer.protocol != "file":
            return None
        own = self._own.get(layer.node, set()) | self._gone
        based = [file for file in self._based.get(os.path.realpath(layer.file), ()) if file not in own]
        users = [f"process {user.pid} ({user.command})" for user in self._users.get(layer.file, ())]
        named = [f"{file}, which is based on it" for file in sorted(based)] + users
        return f"{layer.file} is used by {'; '.join(named)}" if named else None


def _files(drive: Drive) -> set[str]:
    return {os.path.realpath(layer.file) for layer in drive.layers if layer.protocol == "file"}


def _overlays(directories: t.Iterable[str]) -> dict[str, set[str]]:
    """By image: the files in these directories that are based on it, as ``dependents`` finds them one by one."""
    found: dict[str, set[str]] = {}
    for directory in {os.path.realpath(directory) for directory in directories}:
        for name in _names(directory):
            candidate = os.path.realpath(os.path.join(directory, name))
            for lower in backing_paths(candidate):
                if "\0" not in lower:
                    found.setdefault(os.path.realpath(lower), set()).add(candidate)
    return found


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def image_of(layer: Layer, needs: Needs) -> Image:
    record = record_of(layer)
    return Image(
        data=layer.data_bound,
        size=layer.virtual_size,
        ours=record is not None,
        needed=needs.reason(layer) is not None,
        inner=bool(layer.snapshots),
    )


def plan_merges(options: ChainOptions, vm: str, drive: Drive, drops: t.Collection[int], needs: Needs) -> list[Merge]:
    """:raise ChainImageNeeded: something else is based on what would change or go."""
    members = {number for group in groups(len(drive.layers), drops) for number in range(group[0], group[1] + 1)}
    idle = Image(0, 0)
    images = [image_of(layer, needs) if number in members else idle for number, layer in enumerate(drive.layers)]
    plan = plan_chain(images, drops, options.how)
    if plan.blocked:
        raise _blocked(options, vm, drive, plan, needs)
    gone = {number for number in plan.dropped if images[number].ours} if options.delete else set()
    doomed = {drive.layers[n].file for n in gone if not images[n].needed and not images[n].inner}
    return [_merge(drive, plan, step, doomed) for step in plan.steps]


def _blocked(options: ChainOptions, vm: str, drive: Drive, plan: ChainPlan, needs: Needs) -> ChainImageNeeded:
    first, last = plan.blocked[0]
    layers = drive.layers[first : last + 1]
    reasons = [reason for reason in map(needs.reason, layers) if reason is not None]
    reasons += [
        f"{layer.file} holds internal snapshots ({', '.join(snapshot.name for snapshot in layer.snapshots)})"
        for layer in layers
        if layer.snapshots
    ]
    images = files_of(drive, first, last)
    how = "commit or stream" if options.how == "auto" else options.how
    return ChainImageNeeded(vm=vm, drive=drive.name, images=images, how=how, reasons="; ".join(reasons))


def _merge(drive: Drive, plan: ChainPlan, step: Step, doomed: t.Collection[str]) -> Merge:
    """The steps are taken from the top down, so above there is what they leave, and below what there was."""
    layers = drive.layers
    over = [number for number in range(step.target) if number not in plan.dropped]
    target, commits = layers[step.target], step.how == COMMIT
    dropped = tuple(layers[number] for number in step.dropped)
    room, free = _room(target, dropped, step.data)
    return Merge(
        drive=drive,
        how=step.how,
        target=target,
        dropped=dropped,
        above=layers[over[-1]] if commits and over else None,
        below=layers[step.base + 1] if not commits and step.base + 1 < len(layers) else None,
        images=files_of(drive, step.top, step.base),
        data=step.data,
        needed=room,
        free=free,
        doomed=frozenset(layer.file for layer in dropped if layer.file in doomed),
    )


def adopted(
    options: ChainOptions, drive: Drive, jobs: t.Container[str], needs: Needs, boundary: int | None = None
) -> Merge | None:
    """The merge of this drive that a killed run has started, and that is not finished: its job tells the range.

    ``boundary``: only one that drops this boundary and no other.
    """
    every = ((top, base) for top in range(len(drive.layers) - 1) for base in range(top + 1, len(drive.layers)))
    for top, base in every if boundary is None else ((boundary - 1, boundary),):
        for how in (COMMIT, STREAM):
            if job_name(drive, how, drive.layers[top], drive.layers[base]) in jobs:
                return _adopted(options, drive, Step(how, top, base, 0), needs)
    return None


def open_jobs(scene: Scene) -> set[str]:
    """Those that have not ended."""
    return {job.id for job in scene.vm.jobs.values() if job.status not in ("concluded", "null")}


def actives(merges: t.Iterable[Merge]) -> dict[str, tuple[str, str]]:
    """Drives whose active image changes, and the file and format it will be."""
    return {merge.drive.name: (merge.target.file, merge.target.driver) for merge in merges if merge.active_commit}


def _adopted(options: ChainOptions, drive: Drive, step: Step, needs: Needs) -> Merge:
    size = max(layer.virtual_size for layer in drive.layers)
    data = min(size, sum(drive.layers[number].data_bound for number in step.dropped))
    gone = [drive.layers[number] for number in step.dropped] if options.delete else []
    doomed = {layer.file for layer in gone if record_of(layer) and not needs.reason(layer) and not layer.snapshots}
    step = Step(step.how, step.top, step.base, data)
    return _merge(drive, ChainPlan((step,)), step, doomed)


def _room(target: Layer, dropped: t.Iterable[Layer], data: int) -> tuple[int, int | None]:
    """The image that grows may need room for all that is copied, though not for more than it can ever hold."""
    if target.protocol != "file":
        return 0, None
    size = max(layer.virtual_size for layer in (target, *dropped))
    grows = min(data, max(0, size - target.allocated))
    needed = grows + grows // _METADATA_SHARE + (_METADATA_BASE if grows else 0)
    return needed, space.available(os.path.dirname(target.file))


def require_space(merges: t.Iterable[Merge], vm: str) -> None:
    """All the steps together, in their order; what one deletes is room for the next.

    :raise NoSpace: before anything is started.
    """
    free: dict[int, int] = {}
    for merge in merges:
        if merge.free is None:
            continue
        path = os.path.dirname(merge.target.file)
        device = os.stat(path).st_dev
        available = free.get(device, merge.free)
        if merge.needed > available:
            what = f"Merging {merge.images} of drive {merge.drive.name} of VM {vm} by {merge.how}"
            raise NoSpace(what=what, needed=merge.needed, path=path, available=available)
        gone = [layer for layer in merge.dropped if layer.file in merge.doomed]
        given = sum(layer.allocated for layer in gone if os.stat(layer.file).st_dev == device)
        free[device] = available - merge.needed + given
