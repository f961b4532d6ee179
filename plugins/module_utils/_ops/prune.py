# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Prune a repository: observe, plan, execute for each VM, under its lock.

The order keeps every published backup restorable at every moment: first what nothing builds on goes, newest first, then
each merge replaces a backup, and only then what was merged into it goes, newest first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
from datetime import datetime, timezone

from .._errors import BackupMissing, BlockOpsError, NoSpace
from .._repository import merge, space
from .._repository.manifest import Manifest
from .._repository.store import Repository, VmStore
from ._outcome import Outcome
from .prune_merge import merge_backup, needed
from .prune_observe import allocated, busy, busy_in, is_open, observe
from .prune_plan import plan
from .prune_report import Done, Report, report
from .prune_types import BecameBusy, Found, MergeStep, Plan, PruneFailed, Request, VmUnknown

_KNOWN_SHOWN = 10


async def prune(request: Request, *, check_mode: bool) -> Outcome:
    """Prune the VMs of a repository. One that fails does not stop the others; they fail together at the end.

    :raise RepositoryMissing, RepositoryInvalid, FormatUnsupported, VmUnknown, BackupMissing: before anything is done.
    """
    repository = Repository.open(request.repository)
    stores = await asyncio.to_thread(_stores, repository, request)
    room = asyncio.Semaphore(request.max_parallel)

    async def one(store: VmStore) -> Report:
        async with room:
            return await _VmRun(store, request, check_mode).run()

    reports = await asyncio.gather(*(one(store) for store in stores))
    failed = [f"{found.name}: {found.error}" for found in reports if found.error is not None]
    errors = [found.error for found in reports if found.error is not None]
    error: BlockOpsError | None = errors[0] if len(reports) == 1 and errors else None
    if failed and error is None:
        error = PruneFailed(failed=len(failed), total=len(reports), what=" | ".join(failed))
    return Outcome(
        changed=any(found.changed for found in reports),
        result={"repository": repository.path, "vms": [found.result for found in reports]},
        before={found.name: found.before for found in reports},
        after={found.name: found.after for found in reports},
        warnings=tuple(f"{found.name}: {text}" for found in reports for text in found.warnings),
        error=error,
    )


def _stores(repository: Repository, request: Request) -> list[VmStore]:
    """The VMs to work on. Whatever is named has to be there."""
    stores = [repository.vm(name) for name in request.vms] if request.vms else repository.vms()
    for store in stores:
        if not store.exists():
            known = ", ".join(repository.vm_names()) or "none"
            raise VmUnknown(repository=repository.path, vm=store.name, known=known)
    for backup in request.protect:
        if not any(os.path.isdir(os.path.join(store.directory, backup)) for store in stores):
            names = ", ".join(store.name for store in stores) or "none"
            ids = sorted(manifest.id for store in stores for manifest in store.catalogue().manifests)
            shown = ", ".join(ids[-_KNOWN_SHOWN:]) or "none"
            raise BackupMissing(vm=names, repository=repository.path, point=backup, known=shown)
    return stores


class _VmRun:
    """The pruning of one VM; ``done`` is what has been done so far, for the report of a run that fails."""

    def __init__(self, store: VmStore, request: Request, check_mode: bool) -> None:
        self.store = store
        self.request = request
        self.check_mode = check_mode
        self.done = Done()
        self.found = Found(())
        self.plan: Plan | None = None
        self.by_id: dict[str, Manifest] = {}
        self.sizes: dict[str, int] = {}
        self.needed: list[int] = []
        self.marks: list[tuple[str, bool]] = []

    async def run(self) -> Report:
        error: BlockOpsError | None = None
        try:
            if self.check_mode:
                await self._prepare()
                self._check_space()
            else:
                async with self.store.lock(self.request.lock_timeout):
                    await self._recover()
                    await self._prepare()
                    await self._execute()
        except BlockOpsError as exc:
            error = exc
        return report(self, error)

    async def _recover(self) -> None:
        found = await asyncio.to_thread(merge.leftovers, self.store.directory)
        for leftover in found:
            if leftover.hidden and await asyncio.to_thread(is_open, leftover.path):
                await asyncio.to_thread(merge.unhide, self.store.directory, leftover.backup)
        await asyncio.to_thread(merge.recover, [leftover for leftover in found if os.path.isdir(leftover.path)])
        self.done.recovered += [leftover.path for leftover in found]

    async def _prepare(self) -> None:
        """Observe and plan; nothing is written."""
        found = await asyncio.to_thread(observe, self.store)
        wanted = (found.protected | set(self.request.protect)) - set(self.request.unprotect)
        known = frozenset(manifest.id for manifest in found.manifests)
        self.marks = [(name, name in wanted) for name in sorted((wanted ^ found.protected) & known)]
        self.found = dataclasses.replace(found, protected=wanted & known)
        self.by_id = {manifest.id: manifest for manifest in found.manifests}
        self.plan = await asyncio.to_thread(self._plan)
        for _backup, steps in self.plan.merges:
            self.needed.append(await needed(self.store, self.by_id, steps))

    def _plan(self) -> Plan:
        ask = functools.partial(busy, self.store)
        now = datetime.now(timezone.utc)
        options = {"merge": self.request.merge, "keep_newest": self.request.keep_newest}
        made = plan(self.found, self.request.policy, now, ask, **options)
        for name in (*made.removals, *made.owners):
            self.sizes[name] = allocated(os.path.join(self.store.directory, name))
        for backup, steps in made.merges:
            self.sizes[backup] = sum(_image_size(self.store, self.by_id[backup], step) for step in steps)
        return made

    def _check_space(self) -> None:
        """Whether the merges fit, one after the other, each giving back what it replaces.

        :raise NoSpace: one does not.
        """
        if self.plan is None or not self.plan.merges:
            return
        free = space.available(self.store.directory)
        if self.check_mode:
            free += sum(self.sizes[name] for name in self.plan.removals)
            free += sum(orphan.size for orphan in self.found.orphans if orphan.removed)
        for (backup, steps), bytes_needed in zip(self.plan.merges, self.needed):
            if bytes_needed > free:
                what = f"Merging into backup {backup}"
                raise NoSpace(what=what, needed=bytes_needed, path=self.store.directory, available=free)
            free += self.sizes[backup] - bytes_needed
            free += sum(self.sizes[name] for name in {name for step in steps for name in step.absorbed})

    async def _execute(self) -> None:
        if self.plan is None:
            return
        for backup, wanted in self.marks:
            await asyncio.to_thread(merge.protect, self.store.directory, backup, wanted)
            self.done.marks.append((backup, wanted))
        for orphan in self.found.orphans:
            if orphan.removed:
                await asyncio.to_thread(merge.discard, orphan.path)
                self.done.orphans.append(orphan.path)
        for backup in self.plan.removals:
            await self._remove(backup)
        self._check_space()
        for backup, steps in self.plan.merges:
            await self._merge(backup, steps)

    async def _merge(self, backup: str, steps: tuple[MergeStep, ...]) -> None:
        manifest, written = await merge_backup(self.store, self.by_id, backup, steps, check=self.request.verify)
        self.by_id[backup] = manifest
        self.done.merged.append(backup)
        self.done.written += written
        self.done.freed += self.sizes[backup]
        merged, owners = set(self.done.merged), self.plan.owners if self.plan is not None else {}
        for manifest in reversed(self.found.manifests):
            if manifest.id in owners and manifest.id in self.by_id and owners[manifest.id] <= merged:
                await self._remove(manifest.id)

    async def _remove(self, backup: str) -> None:
        """Out of the catalogue first, then a second look at who has it open, then away with it."""
        directory, manifest = self.store.directory, self.by_id[backup]
        hidden = await asyncio.to_thread(merge.hide, directory, backup)
        reason = await asyncio.to_thread(busy_in, hidden, manifest)
        if reason is not None:
            await asyncio.to_thread(merge.unhide, directory, backup)
            raise BecameBusy(backup=backup, vm=self.store.name, reason=reason)
        del self.by_id[backup]
        await asyncio.to_thread(merge.discard, hidden)
        self.done.removed.append(backup)
        self.done.freed += self.sizes[backup]


def _image_size(store: VmStore, manifest: Manifest, step: MergeStep) -> int:
    record = manifest.drive(step.drive)
    return 0 if record is None else os.lstat(store.image_path(manifest, record)).st_blocks * 512
