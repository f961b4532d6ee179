# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Observe and plan a restore. Everything that can be found wrong is found here, before anything is written."""

from __future__ import annotations

import asyncio
import os
import typing as t
from dataclasses import replace

from .._errors import DestinationExists, DriveUnknown, ImageInUse, ImageInvalid, InputInvalid, NoSpace, TargetUnwritable
from .._image import qemu_img
from .._image.header import read_header
from .._repository import chain, space
from .._repository.manifest import Manifest
from .._repository.names import encode_name
from .._repository.store import Catalogue, Repository, VmStore
from .restore_definition import plan_definition
from .restore_images import check_headers, verify
from .restore_types import DriveRequest, DriveStep, Plan, Request

_OVERLAY_BYTES = 1 << 20  # an empty overlay's metadata
_EXTENSIONS = {"qcow2": ".qcow2", "raw": ".raw"}


async def plan_restore(request: Request) -> Plan:
    """What is to be done for ``request``: a pure view of what was found, with every obstacle raised as its error."""
    repository = Repository.open(request.repository)
    store = repository.vm(request.vm)
    found = await asyncio.to_thread(store.catalogue)
    manifest = _selected(request, repository, store, found)
    wanted = _drive_requests(request, manifest)
    _check_destinations(wanted, repository)
    steps = [_step(request, drive, manifest, store, found) for drive in wanted]
    steps = [replace(step, present=await _present(step)) for step in steps]
    definition = await asyncio.to_thread(plan_definition, request, manifest, store)
    missing = [step for step in steps if not step.present]
    verified, without = False, list[str]()
    if request.verify and missing:
        verified, without = await verify(store, [step.links for step in missing])
    steps = [step if step.present else replace(step, needed=await _needed(request, step)) for step in steps]
    _check_space(steps)
    warnings = [f"{path} was not verified: its backup has no checksum." for path in without]
    warnings += [f"Drive {skip.name} is not in backup {manifest.id}: {skip.reason}" for skip in manifest.skipped]
    return Plan(manifest, tuple(steps), definition, verified, tuple(warnings))


def _selected(request: Request, repository: Repository, store: VmStore, found: Catalogue) -> Manifest:
    return chain.select(
        found.manifests,
        request.point,
        vm=request.vm,
        repository=repository.path,
        drives=[drive.name for drive in request.drives if drive.base is None],
        broken=dict(found.broken),
        damage=store.looks_intact,
    )


def _drive_requests(request: Request, manifest: Manifest) -> tuple[DriveRequest, ...]:
    """The drives to restore; all of the backup when none is named."""
    known = ", ".join(drive.name for drive in manifest.drives)
    for drive in request.drives:
        if manifest.drive(drive.name) is None:
            raise DriveUnknown(vm=request.vm, drive=drive.name, known=f"{known} (in backup {manifest.id})")
    if request.drives:
        return request.drives
    if request.dest is None:
        if request.definition == "none":
            raise InputInvalid(message="Nothing to restore: give dest, drives, or definition.")
        return ()
    extension = _EXTENSIONS[request.format]
    return tuple(
        DriveRequest(drive.name, os.path.join(request.dest, encode_name(drive.name) + extension), request.format)
        for drive in manifest.drives
    )


def _check_destinations(wanted: t.Sequence[DriveRequest], repository: Repository) -> None:
    """Each its own file, in a directory that exists, outside the repository."""
    inside = os.path.realpath(repository.path)
    seen: set[str] = set()
    for drive in wanted:
        parent = os.path.dirname(drive.dest)
        real = os.path.join(os.path.realpath(parent), os.path.basename(drive.dest))
        if not os.path.isabs(drive.dest) or not os.path.basename(drive.dest):
            raise InputInvalid(
                message=f"dest of drive {drive.name} must be the absolute path of a file: {drive.dest!r}."
            )
        if not os.path.isdir(parent):
            raise TargetUnwritable(path=parent, reason="there is no such directory; is the file system mounted?")
        if real in seen:
            raise InputInvalid(message=f"Two drives cannot both become {drive.dest}.")
        if os.path.commonpath([inside, real]) == inside:
            raise InputInvalid(message=f"{drive.dest} lies inside the repository; backups are never written to.")
        seen.add(real)


def _step(request: Request, drive: DriveRequest, manifest: Manifest, store: VmStore, found: Catalogue) -> DriveStep:
    links = tuple(
        chain.chain(found.manifests, manifest.id, drive.name, broken=dict(found.broken), damage=store.looks_intact)
    )
    record = links[0][1]
    if not record.standalone and (drive.base is None or request.instant):
        raise InputInvalid(
            message=f"The image of drive {drive.name} in backup {manifest.id} (sync={manifest.sync}) lacks the data "
            "below it: name the image it belongs on as base (mode=full)."
        )
    if record.standalone and drive.base is not None:
        raise InputInvalid(message=f"Drive {drive.name} stands alone in backup {manifest.id}; it takes no base.")
    check_headers(store, links)
    files = tuple(store.image_path(*link) for link in links)
    return DriveStep(drive, record, links, files, request.instant, present=False)


async def _present(step: DriveStep) -> bool:
    """Whether ``dest`` is there with the right content.

    :raise DestinationExists: it is there and is something else. :raise ImageInUse: a VM has it open.
    """
    dest = step.request.dest
    if not os.path.lexists(dest):
        return False
    if not os.path.isfile(dest):
        raise DestinationExists(path=dest)
    if qemu_img.open_for_writing(dest):
        raise ImageInUse(image=dest, said="it exists, and another process writes to it")
    if not _has_right_shape(step):
        raise DestinationExists(path=dest)
    if not await qemu_img.compare(step.source, qemu_img.Image(dest, step.request.format)):
        raise DestinationExists(path=dest)
    return True


def _has_right_shape(step: DriveStep) -> bool:
    """Format, size and backing file of an existing destination, without opening it as an image."""
    dest = step.request.dest
    if step.request.format == "raw":
        return os.stat(dest).st_size == step.record.virtual_size
    try:
        header = read_header(os.path.realpath(dest))
    except ImageInvalid:
        return False
    backing = (step.files[0], "qcow2") if step.instant else (None, None)
    return (
        header.virtual_size == step.record.virtual_size
        and not (header.data_file or header.encrypted or header.corrupt)
        and (header.backing_file, header.backing_format if header.backing_file else None) == backing
    )


async def _needed(request: Request, step: DriveStep) -> int:
    """Bytes the new file takes at most. For a sparse raw file, too, only the measure of qcow2 knows the data."""
    if step.instant:
        return _OVERLAY_BYTES
    if step.request.format == "raw" and request.preallocation != "off":
        return step.record.virtual_size
    options = {} if step.request.format == "raw" else {"preallocation": request.preallocation}
    return await qemu_img.measure(step.source, "qcow2", options)


def _check_space(steps: t.Iterable[DriveStep]) -> None:
    """Add up what goes to each file system."""
    needed: dict[int, int] = {}
    for step in steps:
        parent = os.path.dirname(step.request.dest)
        device = os.stat(parent).st_dev
        needed[device] = needed.get(device, 0) + step.needed
        free = space.available(parent)
        if needed[device] > free:
            raise NoSpace(what="The restore", needed=needed[device], path=parent, available=free)
