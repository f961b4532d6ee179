# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What is to be done to one dirty bitmap of each drive: options and planner of qmp_dirty_bitmap. Pure.

All drives of a VM change in one transaction, so what QEMU would refuse for one of them is looked for here first. Within
a transaction QEMU removes a bitmap only at its end: one cannot be replaced by another of its name in one step.
"""

from __future__ import annotations

import dataclasses
import typing as t
from dataclasses import dataclass

from .._block.graph import Bitmap, Drive, Layer
from .._block.names import is_ours
from .._errors import BlockOpsError, InputInvalid
from .limits import wrong_limits
from .snapshot_options import SnapshotOptions

PRESENT, ABSENT, ENABLED, DISABLED = "present", "absent", "enabled", "disabled"
CLEARED, MERGED = "cleared", "merged"
STATES = (PRESENT, ABSENT, ENABLED, DISABLED, CLEARED, MERGED)

_LONGEST_NAME = 1023
_FINEST, _COARSEST = 1 << 9, 1 << 31


class BitmapProtected(BlockOpsError):
    template = "Bitmap {bitmap} has a name by which this collection tracks what changed since a backup."
    advice = (
        "Nothing was touched. Made, merged, cleared or paused by hand it would let the next increment miss changes. "
        "It can only be removed (state=absent with ours=true); then the next backup is a full one."
    )


class BitmapInconsistent(BlockOpsError):
    template = "Bitmap {bitmap} of drive {drive} of VM {vm} is inconsistent: QEMU was killed while it recorded."
    advice = "Nothing was touched. What it knew is lost; remove it with state=absent, and make a new one."


class BitmapBusy(BlockOpsError):
    template = "Bitmap {bitmap} of drive {drive} of VM {vm} is in use by a job or an export."
    advice = "Nothing was touched. Run again when that has ended; qmp_vm_info shows the jobs."


class BitmapDiffers(BlockOpsError):
    template = (
        "Bitmap {bitmap} of drive {drive} of VM {vm} has {option}={found}, not {wanted}, and QEMU cannot change it."
    )
    advice = "Nothing was touched. Remove it (state=absent) and make it again, or omit {option}."


class BitmapMissing(BlockOpsError):
    template = "VM {vm} has no bitmap {bitmap}{where} to merge into that of drive {drive}; it has: {known}."
    advice = "Nothing was touched."


class BitmapSizes(BlockOpsError):
    template = (
        "Bitmap {source} of {image} cannot be merged into that of drive {drive} of VM {vm}: its disk has {found} "
        "bytes, the drive's {wanted}."
    )
    advice = "Nothing was touched."


@dataclass(frozen=True)
class Source:
    """A bitmap to merge. Without ``drive`` and ``node`` it is looked for in all images of the target's own chain."""

    name: str
    drive: str | None = None
    node: str | None = None


@dataclass(frozen=True)
class BitmapOptions:
    """One call of qmp_dirty_bitmap. ``granularity`` in bytes. It and ``persistent`` may be ``None``: as is, or best."""

    name: str
    state: str = PRESENT
    sources: tuple[Source, ...] = ()
    granularity: int | None = None
    persistent: bool | None = None
    ours: bool = False
    drives: tuple[str, ...] = ()
    exclude_drives: tuple[str, ...] = ()
    timeout: float = 30.0
    check_mode: bool = False

    def checked(self) -> BitmapOptions:
        """These options, or an error when they cannot be meant.

        :raise InputInvalid: :raise BitmapProtected:
        """
        reason = _wrong(self)
        if reason is not None:
            raise InputInvalid(message=reason)
        if is_ours(self.name) and not (self.ours and self.state == ABSENT):
            raise BitmapProtected(bitmap=self.name)
        return self

    def for_snapshots(self) -> SnapshotOptions:
        """What the choice of drives needs to know."""
        return SnapshotOptions(
            name="bitmap",
            drives=self.drives,
            exclude_drives=self.exclude_drives,
            timeout=self.timeout,
            check_mode=self.check_mode,
        )


def _wrong(options: BitmapOptions) -> str | None:
    if not 1 <= len(options.name.encode()) <= _LONGEST_NAME or "\0" in options.name:
        return f"name: a bitmap's name has 1 to {_LONGEST_NAME} bytes."
    granularity = options.granularity
    if granularity is not None and (not _FINEST <= granularity <= _COARSEST or granularity & (granularity - 1)):
        return f"granularity must be a power of 2 from {_FINEST} to {_COARSEST} bytes, not {granularity}."
    if options.sources and options.state != MERGED:
        return f"sources are for state=merged, not for state={options.state}."
    if not options.sources and options.state == MERGED:
        return "state=merged needs sources, the bitmaps to merge."
    if any(source.drive and source.node for source in options.sources):
        return "sources: drive and node both say where a bitmap is; give one of them."
    return wrong_limits({"timeout": options.timeout})


@dataclass(frozen=True)
class Change:
    """For one drive: its bitmap ``before`` and ``after``, and the actions of the transaction that lead there.

    ``counted`` is false when nobody can tell beforehand how much ``after`` holds.
    """

    drive: Drive
    before: Bitmap | None
    after: Bitmap | None
    actions: tuple[dict[str, t.Any], ...] = ()
    counted: bool = True

    @property
    def changed(self) -> bool:
        return bool(self.actions)


def plan(options: BitmapOptions, vm: str, chosen: t.Sequence[Drive], drives: t.Sequence[Drive]) -> list[Change]:
    """The change of each chosen drive; ``drives`` are all of the VM, whose bitmaps can be merged."""
    return [_Planner(options, vm, drives, drive).change() for drive in chosen]


def below(options: BitmapOptions, drive: Drive) -> list[str]:
    """Images below the active one that have a bitmap of this name too."""
    return [layer.file for layer in drive.layers[1:] if layer.bitmap(options.name) is not None]


class _Planner:
    """For one drive."""

    def __init__(self, options: BitmapOptions, vm: str, drives: t.Sequence[Drive], drive: Drive) -> None:
        self._options = options
        self._drives = drives
        self._drive = drive
        self._image = drive.active
        self._found = drive.active.bitmap(options.name)
        self._about = {"drive": drive.name, "vm": vm}

    def change(self) -> Change:
        if self._options.state == ABSENT:
            return self._absent()
        if self._found is not None:
            self._refuse_differences(self._found)
        there = self._found or self._new()
        change = self._merged(there) if self._options.state == MERGED else self._switched(there)
        if self._found is not None and self._found.busy and change.actions:
            raise BitmapBusy(bitmap=self._found.name, **self._about)
        if self._found is None:
            change = dataclasses.replace(change, actions=(self._add(change.after or there), *change.actions))
        return change

    def _absent(self) -> Change:
        if self._found is None:
            return Change(self._drive, None, None)
        if self._found.busy:
            raise BitmapBusy(bitmap=self._found.name, **self._about)
        return Change(self._drive, self._found, None, (self._action("remove"),))

    def _refuse_differences(self, found: Bitmap) -> None:
        if found.inconsistent:
            raise BitmapInconsistent(bitmap=found.name, **self._about)
        for option in ("granularity", "persistent"):
            wanted, is_so = getattr(self._options, option), getattr(found, option)
            if wanted is not None and wanted != is_so:
                raise BitmapDiffers(bitmap=found.name, option=option, found=is_so, wanted=wanted, **self._about)

    def _new(self) -> Bitmap:
        """As it is when it has just been made. One to merge into does not record: it is the sum of others."""
        options = self._options
        return Bitmap(
            name=options.name,
            count=0,
            granularity=options.granularity or _best_granularity(self._image),
            recording=options.state not in (DISABLED, MERGED),
            busy=False,
            persistent=self._image.keeps_bitmaps if options.persistent is None else options.persistent,
            inconsistent=False,
        )

    def _switched(self, there: Bitmap) -> Change:
        """To be recording or not, or to be empty."""
        state = self._options.state
        if state in (ENABLED, DISABLED) and there.recording != (state == ENABLED):
            after = dataclasses.replace(there, recording=state == ENABLED)
            return Change(self._drive, self._found, after, (self._action("enable" if after.recording else "disable"),))
        if state == CLEARED and there.count:
            after = dataclasses.replace(there, count=0)
            return Change(self._drive, self._found, after, (self._action("clear"),))
        return Change(self._drive, self._found, there)

    def _merged(self, there: Bitmap) -> Change:
        sources = [each for source in self._options.sources for each in self._resolved(source)]
        unlike = [each for each in sources if each[1].count]
        if not unlike:
            return Change(self._drive, self._found, there)
        bitmaps = [{"node": layer.node, "name": bitmap.name} for layer, bitmap in dict.fromkeys(unlike)]
        merge = {"node": self._image.node, "target": there.name, "bitmaps": bitmaps}
        after = dataclasses.replace(there, count=max(there.count, *(bitmap.count for _layer, bitmap in unlike)))
        actions = ({"type": "block-dirty-bitmap-merge", "data": merge},)
        return Change(self._drive, self._found, after, actions, counted=False)

    def _resolved(self, source: Source) -> list[tuple[Layer, Bitmap]]:
        """The bitmaps that a source names; the target itself is none of them."""
        found = [
            (layer, bitmap)
            for layer in self._searched(source)
            for bitmap in [layer.bitmap(source.name)]
            if bitmap is not None and not (layer is self._image and source.name == self._options.name)
        ]
        if not found:
            raise BitmapMissing(bitmap=source.name, where=_where(source), known=self._known(), **self._about)
        for layer, bitmap in found:
            self._refuse_source(layer, bitmap)
        return found

    def _searched(self, source: Source) -> list[Layer]:
        if source.node is not None:
            return [layer for drive in self._drives for layer in drive.layers if layer.node == source.node][:1]
        wanted = source.drive or self._drive.name
        return [layer for drive in self._drives if drive.name == wanted for layer in drive.layers]

    def _refuse_source(self, layer: Layer, bitmap: Bitmap) -> None:
        owner = next(drive.name for drive in self._drives if layer in drive.layers)
        about = {**self._about, "drive": owner}
        if bitmap.inconsistent:
            raise BitmapInconsistent(bitmap=bitmap.name, **about)
        if bitmap.busy:
            raise BitmapBusy(bitmap=bitmap.name, **about)
        if layer.virtual_size != self._image.virtual_size:
            sizes = {"found": layer.virtual_size, "wanted": self._image.virtual_size}
            raise BitmapSizes(source=bitmap.name, image=layer.file, **sizes, **self._about)

    def _known(self) -> str:
        names = {
            f"{bitmap.name} ({drive.name})"
            for drive in self._drives
            for layer in drive.layers
            for bitmap in layer.bitmaps
            if not (layer is self._image and bitmap.name == self._options.name)
        }
        return ", ".join(sorted(names)) or "none at all"

    def _action(self, verb: str) -> dict[str, t.Any]:
        data = {"node": self._image.node, "name": self._options.name}
        return {"type": f"block-dirty-bitmap-{verb}", "data": data}

    def _add(self, bitmap: Bitmap) -> dict[str, t.Any]:
        action = self._action("add")
        action["data"].update(granularity=bitmap.granularity, persistent=bitmap.persistent)
        if not bitmap.recording:
            action["data"]["disabled"] = True
        return action


def _where(source: Source) -> str:
    if source.node is not None:
        return f" on node {source.node}"
    return f" on drive {source.drive}" if source.drive is not None else ""


def _best_granularity(image: Layer) -> int:
    """QEMU's own choice (bdrv_get_default_bitmap_granularity), said aloud so that check mode knows it."""
    return min(max(image.cluster_size, 4096), 65536)
