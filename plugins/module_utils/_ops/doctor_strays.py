# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What the doctor finds beside the chains: overlays that are based on an image of the VM and in none of its chains.

They are found by their headers, which tell those of other tools too, and by the records of ours, which tell the upper
images of a branch. Only the directories of the VM's images are looked through.
"""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from .._block.graph import Drive, Layer
from .._image.dependents import backing_paths
from .._image.snapshot_record import DISCARDED, MERGED, SnapshotRecord, read_record, record_path, records_in
from .._image.users import Holder, holders_of
from .doctor_images import is_file
from .doctor_types import Finding
from .vm import Vm


@dataclass(frozen=True)
class Stray:
    """An overlay in no chain of the VM. ``drive`` and ``base``: what it is based on, if that is an image in a chain."""

    file: str
    drive: Drive | None
    base: Layer | None
    record: SnapshotRecord | None
    allocated: int
    holders: tuple[Holder, ...] = ()


def find_strays(vm: Vm, directories: t.Iterable[str]) -> list[Stray]:
    images = {
        os.path.realpath(layer.file): (drive, layer) for drive in vm.drives for layer in drive.layers if is_file(layer)
    }
    found: dict[str, tuple[Drive | None, Layer | None]] = {}
    for directory in sorted(set(directories)):
        for file in _files(directory):
            if os.path.realpath(file) not in images:
                bases = (images.get(os.path.realpath(path)) for path in _plain(backing_paths(file)))
                base = next((base for base in bases if base is not None), None)
                if base is not None:
                    found.setdefault(os.path.realpath(file), base)
        for record in records_in(directory):
            if _is_of(record, vm) and os.path.realpath(record.overlay) not in images and os.path.exists(record.overlay):
                found.setdefault(os.path.realpath(record.overlay), (vm.drive(record.drive), None))
    holders = holders_of(found) if found else {}
    return [
        Stray(file, drive, base, read_record(file), _allocated(file), tuple(holders.get(file, ())))
        for file, (drive, base) in sorted(found.items())
    ]


def beside(vm: Vm, directories: t.Iterable[str], handled: t.Container[str]) -> t.Iterator[Finding]:
    """``handled``: files that a clean-up after a killed run takes care of."""
    for stray in find_strays(vm, directories):
        if stray.file not in handled:
            yield _judged(vm, stray)


def _judged(vm: Vm, stray: Stray) -> Finding:
    record, base, drive = stray.record, stray.base, stray.drive
    on_active = base is not None and drive is not None and base is drive.active and not base.read_only
    if stray.holders:
        users = ", ".join(f"{holder.command} (process {holder.pid})" for holder in stray.holders)
        return _of_others(stray, f"{stray.file}, open in {users},", on_active)
    if record is not None and _is_of(record, vm):
        return _of_ours(stray, record)
    return _of_others(stray, stray.file, on_active)


def _of_ours(stray: Stray, record: SnapshotRecord) -> Finding:
    def finding(kind: str, what: str, fix: str) -> Finding:
        return Finding(kind, stray.file, what, fix, record.drive, stray.allocated)

    remove = f"Delete {stray.file} and {record_path(stray.file)}"
    if record.state == DISCARDED:
        what = f"{stray.file} is what was discarded when the VM went back to snapshot {record.name}; it was kept aside."
        return finding("DiscardedBranch", what, f"{remove} when nobody wants it back.")
    if record.state == MERGED:
        what = f"{stray.file} was merged into another image; nothing needs it."
        fix = "A task of qmp_block_commit or qmp_block_stream with delete=true deletes it."
        return finding("EmptiedOverlay", what, fix)
    what = (
        f"The overlay {stray.file} of snapshot {record.name} ({record.state}) is in no chain. Either the VM was "
        f"started from an image below it, and what was written into it is missing; or another tool took it out."
    )
    fix = (
        "Look whether the guest misses what it wrote since. If so, stop it, copy all images aside, and start it from "
        f"this overlay; what was written into {record.image} meanwhile may have spoilt it. If not: {remove}."
    )
    return finding("OrphanedOverlay", what, fix)


def _of_others(stray: Stray, name: str, on_active: bool) -> Finding:
    base = stray.base.file if stray.base is not None else "an image of the VM"
    drive = stray.drive.name if stray.drive is not None else None
    if on_active:
        what = f"{name} is based on {base}, which the VM writes to: every write changes what {stray.file} shows."
        fix = (
            "If the VM was to run on it, stop it and correct its start-up definition. Else it is worthless: delete it."
        )
        return Finding("OverlayOfActive", stray.file, what, fix, drive, stray.allocated)
    what = f"{name} is based on {base}, so that must neither change nor go."
    fix = f"To be free of it: qemu_img_rebase with path={stray.file}, backing='' (with nobody using it), or delete it."
    return Finding("ForeignOverlay", stray.file, what, fix, drive, stray.allocated)


def _is_of(record: SnapshotRecord, vm: Vm) -> bool:
    if record.uuid is not None and vm.uuid is not None:
        return record.uuid == vm.uuid
    return record.vm == vm.name


def _files(directory: str) -> list[str]:
    try:
        return sorted(os.path.join(directory, name) for name in os.listdir(directory))
    except OSError:
        return []


def _plain(paths: t.Iterable[str]) -> list[str]:
    return sorted(path for path in paths if "\0" not in path)


def _allocated(file: str) -> int:
    try:
        return os.stat(file).st_blocks * 512
    except OSError:
        return 0
