# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What is in a repository: every VM, every backup, and whether it could be restored. Reads, and never writes."""

from __future__ import annotations

import asyncio
import functools
import os
import typing as t
from dataclasses import dataclass

from .._errors import BlockOpsError, ChainBroken, InputInvalid
from .._repository import chain
from .._repository.manifest import DriveRecord, Manifest
from .._repository.names import timestamp
from .._repository.store import Catalogue, Repository, VmStore
from .._repository.verified import manifest_digest, read_record
from ._outcome import Outcome

Digest = t.Callable[[str], t.Optional[str]]


@dataclass(frozen=True)
class Query:
    """``vms`` empty: all. ``point`` needs exactly one VM. ``drives``: what ``point`` has to contain."""

    repository: str
    vms: tuple[str, ...] = ()
    point: str | None = None
    drives: tuple[str, ...] = ()


async def catalogue(query: Query) -> Outcome:
    """List the repository.

    :raise RepositoryMissing, RepositoryInvalid, FormatUnsupported, BackupMissing, InputInvalid: as they say.
    """
    return await asyncio.to_thread(_catalogue, query)


def _catalogue(query: Query) -> Outcome:
    if query.point is not None and len(query.vms) != 1:
        raise InputInvalid(message="point needs exactly one name in vm.")
    repository = Repository.open(query.repository)
    stores = [repository.vm(name) for name in query.vms] if query.vms else repository.vms()
    read = [(store, store.catalogue()) for store in stores if store.exists() or query.vms]
    result: dict[str, t.Any] = {
        "repository": repository.path,
        "repository_id": repository.id,
        "vms": [_vm(store, found) for store, found in read],
        "point": None,
    }
    if query.point is not None:
        store, found = read[0]
        broken = dict(found.broken)
        selected = chain.select(
            found.manifests,
            query.point,
            vm=store.name,
            repository=repository.path,
            drives=query.drives,
            broken=broken,
            damage=store.looks_intact,
        )
        result["point"] = describe(store, found, selected, store.looks_intact)
    return Outcome(changed=False, result=result)


def _vm(store: VmStore, found: Catalogue) -> dict[str, t.Any]:
    newest = found.manifests[-1] if found.manifests else None
    damage = functools.lru_cache(maxsize=None)(store.looks_intact)  # every image is in many chains: look once
    digest = functools.lru_cache(maxsize=None)(manifest_digest)
    return {
        "name": store.name,
        "uuid": newest.vm_uuid if newest is not None else None,
        "directory": store.directory,
        "backups": [describe(store, found, manifest, damage, digest) for manifest in reversed(found.manifests)],
        "broken": [{"id": backup_id, **_error(error)} for backup_id, error in found.broken],
        "partials": [{"id": partial.id, "path": partial.directory} for partial in store.partials()],
    }


def _error(error: BlockOpsError) -> dict[str, str]:
    return {"kind": error.kind, "reason": str(error)}


def describe(
    store: VmStore, found: Catalogue, manifest: Manifest, damage: chain.Damage, digest: Digest = manifest_digest
) -> dict[str, t.Any]:
    """One backup as ``backup_info`` returns it; sizes in bytes."""
    drives = [_drive(store, found, manifest, drive, damage) for drive in manifest.drives]
    reasons = [f"drive {drive['name']}: {drive['incomplete_reason']}" for drive in drives if not drive["complete"]]
    return {
        "id": manifest.id,
        "path": store.backup_path(manifest),
        "sequence": manifest.sequence,
        "level": manifest.level,
        "sync": manifest.sync,
        "consistency": manifest.consistency,
        "point": timestamp(manifest.point),
        "started": timestamp(manifest.started),
        "finished": timestamp(manifest.finished),
        "freeze_ms": manifest.freeze_ms,
        "size": sum(drive.size for drive in manifest.drives),
        "copied": sum(drive.copied for drive in manifest.drives),
        "virtual_size": sum(drive.virtual_size for drive in manifest.drives),
        "complete": not reasons,
        "incomplete_reason": "; ".join(reasons) or None,
        "checksums": all(drive.sha256 is not None for drive in manifest.drives),
        "verified": _verified(store, manifest, digest),
        "drives": drives,
        "skipped": [dict(vars(skip)) for skip in manifest.skipped],
        "definition": [dict(vars(record), mode=f"{record.mode:04o}") for record in manifest.definition],
        "tags": list(manifest.tags),
        "warnings": list(manifest.warnings),
        "qemu_version": manifest.qemu_version,
        "collection": manifest.collection,
    }


def _verified(store: VmStore, manifest: Manifest, digest: Digest) -> dict[str, t.Any] | None:
    """What verified.json says, and whether it is about what lies there now."""
    record = read_record(store.backup_path(manifest))
    if record is None:
        return None
    then = dict(record.manifests)
    return {
        "outcome": record.outcome,
        "current": then == {backup: digest(os.path.join(store.directory, backup)) for backup in then},
        "finished": timestamp(record.finished),
        "checks": [check.to_result() for check in record.checks],
    }


def _drive(
    store: VmStore, found: Catalogue, manifest: Manifest, drive: DriveRecord, damage: chain.Damage
) -> dict[str, t.Any]:
    links: list[chain.Link] = []
    reason: str | None = None
    try:
        links = chain.chain(found.manifests, manifest.id, drive.name, broken=dict(found.broken), damage=damage)
    except ChainBroken as exc:
        reason = str(exc.data["reason"])
    return {
        "name": drive.name,
        "path": store.image_path(manifest, drive),
        "level": drive.level,
        "reason": drive.reason,
        "parent": drive.parent,
        "standalone": drive.standalone,
        "virtual_size": drive.virtual_size,
        "size": drive.size,
        "copied": drive.copied,
        "sha256": drive.sha256,
        "chain": [link.id for link, _record in links],
        "complete": reason is None,
        "incomplete_reason": reason,
        "source": dict(vars(drive.source)),
    }
