# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Which backups are to be verified, and which are verified well enough. Reads, and never writes."""

from __future__ import annotations

import functools
import typing as t
from datetime import datetime

from .._errors import BackupMissing, BlockOpsError, InputInvalid
from .._repository import chain
from .._repository.manifest import Manifest
from .._repository.names import is_backup_id
from .._repository.store import Catalogue, Repository, VmStore
from .._repository.verified import CHAIN, PASSED, Verification, manifest_digest, read_record
from .restore_images import check_headers
from .verify_types import ALL, UNVERIFIED, Refused, Target, VerifyRequest

Digest = t.Callable[[str], t.Optional[str]]
_FUTURE = 300  # seconds by which clocks may differ


def plan_verify(request: VerifyRequest, now: datetime) -> list[Target | Refused]:
    """The selected backups, VM by VM, oldest first. One that cannot be looked at never hides the others.

    :raise RepositoryMissing, RepositoryInvalid, FormatUnsupported, InputInvalid: as they say.
    """
    if is_backup_id(request.point) and len(request.vms) != 1:
        raise InputInvalid(message="The id of a backup as point needs exactly one name in vm.")
    repository = Repository.open(request.repository)
    stores = [repository.vm(name) for name in dict.fromkeys(request.vms)] if request.vms else repository.vms()
    digest: Digest = functools.lru_cache(maxsize=None)(manifest_digest)
    targets: list[Target | Refused] = []
    for store in stores:
        targets += _of_vm(request, repository, store, digest, now)
    return targets


def _of_vm(
    request: VerifyRequest, repository: Repository, store: VmStore, digest: Digest, now: datetime
) -> list[Target | Refused]:
    found = store.catalogue()
    if not found.manifests and not found.broken:
        if not request.vms:
            return []
        return [_missing(request, repository, store)]
    refused: list[Target | Refused] = []
    if request.point in (ALL, UNVERIFIED) or not found.manifests:
        refused = [Refused(store.name, backup, error) for backup, error in found.broken]
    try:
        manifests = _selected(request, repository, store, found)
    except BlockOpsError as exc:
        return [*refused, Refused(store.name, request.point if is_backup_id(request.point) else None, exc)]
    damage = functools.lru_cache(maxsize=None)(store.looks_intact)  # every image is in many chains: look once
    targets = [_target(request, store, found, manifest, damage, digest, now) for manifest in manifests]
    return [*refused, *(target for target in targets if target.due or request.point != UNVERIFIED)]


def _missing(request: VerifyRequest, repository: Repository, store: VmStore) -> Refused:
    error = BackupMissing(vm=store.name, repository=repository.path, point=request.point, known="none")
    return Refused(store.name, None, error)


def _selected(request: VerifyRequest, repository: Repository, store: VmStore, found: Catalogue) -> list[Manifest]:
    """``latest`` means the newest there is: one that cannot be restored is just what has to be found."""
    if request.point in (ALL, UNVERIFIED):
        return list(found.manifests)
    if request.point == chain.LATEST:
        return list(found.manifests[-1:])
    broken = dict(found.broken)
    return [chain.select(found.manifests, request.point, vm=store.name, repository=repository.path, broken=broken)]


def _target(
    request: VerifyRequest,
    store: VmStore,
    found: Catalogue,
    manifest: Manifest,
    damage: chain.Damage,
    digest: Digest,
    now: datetime,
) -> Target:
    chains: list[tuple[chain.Link, ...]] = []
    broken: BlockOpsError | None = None
    broken_ones = dict(found.broken)
    try:
        for drive in manifest.drives:
            links = chain.chain(found.manifests, manifest.id, drive.name, broken=broken_ones, damage=damage)
            chains.append(tuple(links))
            check_headers(store, links)
    except BlockOpsError as exc:
        broken = exc
    digests = needed_digests(store, manifest, chains, digest)
    known = read_record(store.backup_path(manifest))
    known = known if known is not None and known.manifests == digests else None
    due = _due(request, known, now) if broken is None else str(broken)
    return Target(store, found, manifest, tuple(chains), digests, known, due, broken)


def needed_digests(
    store: VmStore, manifest: Manifest, chains: t.Iterable[t.Sequence[chain.Link]], digest: Digest
) -> tuple[tuple[str, str], ...]:
    """The manifests a point stands on, as they are now; sorted, so that two of them can be compared."""
    needed = {manifest.id: manifest, **{link.id: link for links in chains for link, _drive in links}}
    return tuple(sorted((name, digest(store.backup_path(one)) or "0" * 64) for name, one in needed.items()))


def _due(request: VerifyRequest, known: Verification | None, now: datetime) -> str | None:
    """Why the backup has to be verified (again); ``None`` when it need not."""
    if known is None:
        return "it was never verified as it is now"
    for name in (CHAIN, *request.checks):
        check = known.check(name)
        if check is None:
            return f"{name} was never checked"
        if check.outcome != PASSED:
            return f"{name} failed the last time"
        age = (now - check.finished).total_seconds()
        if request.max_age is not None and not -_FUTURE < age < request.max_age:
            return f"{name} was checked {int(age)} s ago"
    if request.max_age is None and request.point != UNVERIFIED:
        return "max_age is not given"
    return None
