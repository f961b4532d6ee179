# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What the doctor finds on the disk: images that are gone or were replaced, and backing names that mean another file.

Headers and records are read and nothing is opened as an image. A header is read while QEMU has the image open; QEMU
writes the name of a backing file at once, so it is what a cold start would find.
"""

from __future__ import annotations

import os
import typing as t

from .._block.graph import Drive, Layer
from .._errors import ImageInvalid
from .._image.dependents import backing_paths
from .._image.header import Header, read_header
from .._image.users import Holder
from .doctor_types import Finding
from .overlay import backing_name
from .vm import Vm

_FDSET = "/dev/fdset/"
_GIB = 1 << 30


def is_file(layer: Layer) -> bool:
    """Whether the image is a file with a name that can be looked up."""
    return layer.protocol == "file" and layer.file.startswith("/") and not layer.file.startswith(_FDSET)


def same_host_files(pid: int) -> bool:
    """Whether QEMU sees the file names we see: not so in another mount namespace. In doubt it does."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        return True


def on_disk(vm: Vm, holders: t.Mapping[str, t.Sequence[Holder]]) -> t.Iterator[Finding]:
    """``holders``: who has the images of the chains open."""
    seen = any(holder.pid == vm.process.pid for found in holders.values() for holder in found)
    for drive in vm.drives:
        for layer in drive.layers:
            if is_file(layer):
                yield from _place(drive, layer, vm.process.pid if seen else None, holders.get(layer.file, ()))
        for number, layer in enumerate(drive.layers):
            if is_file(layer) and layer.driver == "qcow2":
                yield from _backing(drive, layer, drive.layers[number + 1] if number + 1 < len(drive.layers) else None)


def _place(drive: Drive, layer: Layer, pid: int | None, holders: t.Sequence[Holder]) -> t.Iterator[Finding]:
    """Is the file with that name the one that QEMU has open? ``pid`` is ``None`` when nobody may look."""
    rescue = (
        "Do not stop the VM: its data is only in the file that QEMU has open. Make a full backup now (qmp_drive_backup "
        "with level=full), or mirror the drive."
    )
    if not os.path.lexists(layer.file):
        what = f"The image {layer.file} was deleted or renamed while the VM has it open."
        yield Finding("MissingImage", layer.file, what, f"{rescue} If it was renamed, name it back.", drive.name)
    elif pid is not None and pid not in {holder.pid for holder in holders}:
        what = f"The file {layer.file} is not the one that the VM has open under this name: it was replaced."
        yield Finding("ReplacedImage", layer.file, what, f"{rescue} Then find out who replaced it.", drive.name)
    others = [f"{holder.command} (process {holder.pid})" for holder in holders if pid is not None and holder.pid != pid]
    if others:
        what = f"The image {layer.file} is open in other processes as well: {', '.join(others)}."
        fix = (
            "If it is a base that VMs share, it must not change: commit nothing into it; qmp_block_stream copies it up."
        )
        yield Finding("OpenElsewhere", layer.file, what, fix, drive.name)


def _backing(drive: Drive, layer: Layer, below: Layer | None) -> t.Iterator[Finding]:
    """Does the header say what QEMU has below?"""
    header = _header(layer.file)
    if header is None or (below is not None and not is_file(below)):
        return
    said = header.backing_file
    if below is None:
        if said is not None:
            yield _wrong(drive, layer, said, None)
        return
    if said is None or not any(_same(path, below.file) for path in backing_paths(layer.file)):
        yield _wrong(drive, layer, said, below)
    elif header.backing_format is None:
        what = f"The header of {layer.file} does not say the format of its backing file: a cold start guesses it."
        yield Finding("BackingFormatMissing", layer.file, what, _rebase(drive, layer, below), drive.name)
    elif header.backing_format != below.driver:
        what = f"The header of {layer.file} says its backing file is {header.backing_format}; QEMU has {below.driver}."
        yield Finding("WrongBacking", layer.file, what, _rebase(drive, layer, below), drive.name)


def _wrong(drive: Drive, layer: Layer, said: str | None, below: Layer | None) -> Finding:
    names = "no backing file" if said is None else f"the backing file {said}"
    has = "none" if below is None else below.file
    what = f"The header of {layer.file} names {names}, and QEMU has {has} below it. A cold start goes wrong."
    return Finding("WrongBacking", layer.file, what, _rebase(drive, layer, below), drive.name)


def _rebase(drive: Drive, layer: Layer, below: Layer | None) -> str:
    """The same change for a VM that runs, and for one that is off."""
    name = backing_name(layer.file, below.file) if below is not None else ""
    fmt = f" -F {below.driver}" if below is not None else ""
    off = f'before the next start: qemu-img rebase -u -f qcow2 -b "{name}"{fmt} {layer.file}'
    if below is None or not name:
        return f"With the VM off, {off}"
    live = f"QMP change-backing-file with device={drive.root}, image-node-name={layer.node}, backing-file={name}"
    return f"Now: {live}. Or with the VM off, {off}"


def _header(path: str) -> Header | None:
    try:
        return read_header(os.path.realpath(path))
    except ImageInvalid:
        return None


def _same(path: str, other: str) -> bool:
    try:
        return os.path.realpath(path) == os.path.realpath(other) or os.path.samefile(path, other)
    except (OSError, ValueError):
        return False


def space(vm: Vm) -> t.Iterator[Finding]:
    """File systems on which the images that are written to may not find room much longer."""
    growth: dict[int, int] = {}
    places: dict[int, tuple[str, int, int]] = {}
    for drive in vm.drives:
        if drive.empty or not is_file(drive.active) or drive.active.read_only:
            continue
        directory = os.path.dirname(drive.active.file)
        try:
            device, found = os.stat(directory).st_dev, os.statvfs(directory)
        except OSError:
            continue
        places.setdefault(device, (directory, found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize))
        growth[device] = growth.get(device, 0) + max(0, drive.active.virtual_size - drive.active.allocated)
    for device, (directory, free, size) in places.items():
        if tight(free, size, growth[device]):
            what = (
                f"The images that the VM writes to in {directory} can grow by {growth[device]} bytes; {free} are free."
            )
            fix = "Delete or merge what is reported as waste, shorten chains (qmp_block_commit), or enlarge it."
            yield Finding("LowSpace", directory, what, fix, None, free)


def tight(free: int, size: int, growth: int) -> bool:
    """Less than the images may need, and little in itself: a twentieth of the file system, 10 GiB at most."""
    return free < growth and free < min(size // 20, 10 * _GIB)
