# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""qmp_drive_backup: recover, plan, start, finish; one VM at a time, many VMs beside each other."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
import typing as t
from datetime import datetime, timezone

from .._errors import BlockOpsError, CopyRunning, GuestFrozen, InputInvalid, RepositoryMissing
from .._guest.guard import ThawGuard
from .._qmp.jobs import watch
from .._qmp.schema import read_schema
from .._qmp.session import Command, Session
from .._repository import space
from .._repository.chain import is_younger
from .._repository.names import new_backup_id
from .._repository.partial import check_definition
from .._repository.store import Repository, VmStore
from . import backup_recovery, backup_report
from ._outcome import Outcome
from .backup_finish import Run, end_copy, finish, unwind
from .backup_options import BackupOptions, merged
from .backup_recovery import Recovery
from .backup_select import newest_covering, plan_backup, select_drives, with_version
from .backup_start import BackupPlan, attach, draft, job_id, take_point, transaction
from .bandwidth import Bandwidth
from .quiesce import Frozen
from .vm import Vm, VmEntry, find_agent, read_vm, session_for

# What stands for the ids in check mode, where there are none yet.
_NO_REPOSITORY, _NO_BACKUP = "00000000", "YYYYMMDDTHHMMSSZ-00000000"


class DriveBackup:
    """The operation on one entry of ``vms``; one instance serves all entries of a call.

    Make it before the event loop starts: it forks the guard that thaws guests should this process be killed.
    """

    def __init__(self, options: BackupOptions) -> None:
        self._options = options.checked()
        self._bandwidth = Bandwidth(options.bandwidth)
        self._sockets: dict[str, str] = {}
        freezing = options.state == "present" and options.quiesce != "off" and not options.check_mode
        self._guard = ThawGuard.started() if freezing else None

    async def __call__(self, params: dict[str, t.Any]) -> Outcome:
        entry = VmEntry.from_params(params)
        options = self._options
        check_definition(merged(entry.definition, options.definition))
        name = entry.name or await _name_of(entry, options)
        self._claim(name, entry.socket)
        repository = _repository(options)
        if repository is None:
            return await self._without_repository(entry, name)
        store = repository.vm(name)
        if options.check_mode:
            async with session_for(entry, timeout=options.timeout, read_only=True) as session:
                return await self._predict(session, await read_vm(session, name), entry, store, repository.id)
        store.ensure(*options.ownership.directory)
        session_ = session_for(entry, timeout=options.timeout, read_only=False)
        async with store.lock(options.timeout), session_ as session:
            act = {"present": self._present, "cancelled": self._cancelled, "recovered": self._recovered}
            try:
                return await act[options.state](session, entry, store, repository.id)
            finally:
                await self._bandwidth.leave(session)

    def _claim(self, name: str, socket: str) -> None:
        """Names that QEMU told may be the same, too; the second VM must not go into the directory of the first."""
        first = self._sockets.setdefault(name, socket)
        if first != socket:
            raise InputInvalid(message=f"The VMs at {first} and {socket} are both called {name!r}; name them in vms.")

    async def _without_repository(self, entry: VmEntry, name: str) -> Outcome:
        """Nothing was ever backed up there: a first backup in check mode, or nothing to cancel or recover."""
        async with session_for(entry, timeout=self._options.timeout, read_only=True) as session:
            vm = await read_vm(session, name)
            if self._options.state != "present":
                return backup_report.nothing(vm, "there is no repository yet")
            agent = await _agent(session, entry, self._options)
            plan = plan_backup(vm, entry, self._options, None, None, agent)
            self._preflight(plan, self._options.repository)
            commands = await self._commands(session, plan, _NO_REPOSITORY)
            return backup_report.planned(vm, plan, None, [], commands, waits=self._options.wait)

    async def _predict(self, session: Session, vm: Vm, entry: VmEntry, store: VmStore, repository: str) -> Outcome:
        """Check mode: what _present, _cancelled or _recovered would do."""
        recovery = backup_recovery.plan_recovery(vm, store, repository)
        if self._options.state != "cancelled" and not all(self._ends(run) for run in recovery.adopted):
            return backup_report.running(vm, store, recovery.adopted[0], recovery.sentences())
        if self._options.state != "present":
            return backup_report.recovery_planned(vm, recovery, self._options.state)
        store = store.expecting(manifest for _partial, manifest in recovery.complete)
        if self._satisfied(vm, entry, recovery):
            return backup_report.adoption_planned(vm, store, recovery)
        fresh = self._fresh(vm, entry, store)
        if fresh is not None:
            return backup_report.unchanged(vm, store, fresh, recovery.sentences(), bool(recovery.needed))
        agent = await _agent(session, entry, self._options)
        plan = plan_backup(vm, entry, self._options, store, repository, agent)
        self._preflight(plan, store.directory if store.exists() else self._options.repository)
        commands = await self._commands(session, plan, repository)
        return backup_report.planned(vm, plan, store, recovery.sentences(), commands, waits=self._options.wait)

    async def _commands(self, session: Session, plan: BackupPlan, repository: str) -> list[Command]:
        """Check mode's view of the point in time; the run itself chooses the id."""
        schema = await read_schema(session)
        return [transaction(plan, repository, _NO_BACKUP, self._options, schema, 0)]

    async def _present(self, session: Session, entry: VmEntry, store: VmStore, repository: str) -> Outcome:
        started = time.monotonic()
        vm = await read_vm(session, entry.name)
        recovery = await self._recover(session, vm, store, repository)
        for run in recovery.adopted:
            if self._options.wait and run.draft.sync == "none":
                raise CopyRunning(vm=vm.name, backup=run.draft.id)
            if not self._options.wait:
                return backup_report.running(vm, store, run, recovery.sentences())
            await self._bandwidth.adopt(session, list(run.jobs))
            manifest = await finish(session, run, self._options)
            if self._satisfied(vm, entry, recovery):
                return backup_report.published(vm, store, manifest, recovery, started, adopted=True)
        if recovery.needed:
            vm = await read_vm(session, entry.name)
        fresh = self._fresh(vm, entry, store)
        if fresh is not None:
            return backup_report.unchanged(vm, store, fresh, recovery.sentences(), recovery.needed)
        agent = await _agent(session, entry, self._options)
        plan = plan_backup(vm, entry, self._options, store, repository, agent)
        self._preflight(plan, store.directory)
        return await self._run(session, vm, plan, store, recovery, started)

    async def _run(
        self, session: Session, vm: Vm, plan: BackupPlan, store: VmStore, recovery: Recovery, started: float
    ) -> Outcome:
        options, frozen = self._options, Frozen()
        run = await asyncio.to_thread(self._begin, vm, plan, store, recovery.scope.repository)
        try:
            with watch(session) as watcher:
                run = await self._start(session, plan, run, frozen)
                if options.wait:
                    manifest = await finish(session, run, options, watcher)
        except BlockOpsError as exc:
            if frozen.still_frozen:
                raise GuestFrozen(vm=vm.name, socket=plan.agent_socket, besides=f" Besides: {exc}") from exc
            raise
        done, sent = recovery.sentences(), session.sent
        if options.wait:
            outcome = backup_report.published(vm, store, manifest, recovery, started, frozen=frozen, sent=sent)
        else:
            outcome = backup_report.running(vm, store, run, done, frozen=frozen, sent=sent)
        if frozen.still_frozen:
            error = GuestFrozen(vm=vm.name, socket=plan.agent_socket, besides="")
            return dataclasses.replace(outcome, error=error)
        return outcome

    def _begin(self, vm: Vm, plan: BackupPlan, store: VmStore, repository: str) -> Run:
        """The partial directory with the saved definition, and the manifest as far as it is known.

        It is read back as the run that adopts it would: what no reader accepts must fail before anything is copied.
        """
        now, own = datetime.now(timezone.utc), self._options.ownership
        partial = store.begin(new_backup_id(now, os.urandom(4).hex()), *own.directory)
        try:
            manifest = with_version(draft(plan, partial, repository, self._options, now), vm)
            partial.write_intent({"manifest": backup_report.plain(manifest)})
            backup_recovery.read_draft(store, partial)
        except BlockOpsError:
            partial.remove()
            raise
        return Run(store, partial, manifest)

    async def _start(self, session: Session, plan: BackupPlan, run: Run, frozen: Frozen) -> Run:
        """Attach everything, take the point in time, and record it. A failure is unwound before it is raised."""
        options, draft_ = self._options, run.draft
        try:
            schema = await read_schema(session)
            await attach(session, plan, run.partial, draft_.repository, options)
            jobs = [job_id(draft_.repository, draft_.id, number) for number in run.numbers]
            speed = await self._bandwidth.join(session, jobs)
            command = transaction(plan, draft_.repository, draft_.id, options, schema, speed)
            await take_point(session, plan, command, options, self._guard, frozen)
            run = run.at_point(frozen)
            run.partial.write_intent({"manifest": backup_report.plain(run.draft)})
            await self._bandwidth.begun(session, speed)
        except BlockOpsError:
            await unwind(session, run)
            raise
        return run

    async def _recover(self, session: Session, vm: Vm, store: VmStore, repository: str) -> Recovery:
        recovery = backup_recovery.plan_recovery(vm, store, repository)
        await backup_recovery.execute(session, recovery, self._options.ownership)
        return recovery

    async def _recovered(self, session: Session, entry: VmEntry, store: VmStore, repository: str) -> Outcome:
        """state=recovered: adopt or unwind what earlier runs left, and start nothing."""
        started = time.monotonic()
        vm = await read_vm(session, entry.name)
        recovery = await self._recover(session, vm, store, repository)
        for run in recovery.adopted:
            if not self._ends(run):
                return backup_report.running(vm, store, run, recovery.sentences())
            await self._bandwidth.adopt(session, list(run.jobs))
            manifest = await finish(session, run, self._options)
            return backup_report.published(vm, store, manifest, recovery, started, adopted=True)
        return backup_report.recovered(vm, recovery)

    async def _cancelled(self, session: Session, entry: VmEntry, store: VmStore, repository: str) -> Outcome:
        """state=cancelled: unwind what runs; only a sync=none copy, which ends no other way, is published."""
        started = time.monotonic()
        vm = await read_vm(session, entry.name)
        recovery = await self._recover(session, vm, store, repository)
        for run in recovery.adopted:
            if run.draft.sync == "none":
                manifest = await end_copy(session, run, self._options)
                return backup_report.published(vm, store, manifest, recovery, started, adopted=True)
            await unwind(session, run)
        return backup_report.cancelled(vm, recovery)

    def _fresh(self, vm: Vm, entry: VmEntry, store: VmStore) -> t.Any:
        """The backup that is younger than max_age and has all the drives, or ``None``."""
        if self._options.max_age is None:
            return None
        names = [drive.name for drive in select_drives(vm, entry, self._options)[0]]
        newest = newest_covering(store.catalogue(), store, names)
        young = newest is not None and is_younger(newest, datetime.now(timezone.utc), self._options.max_age)
        return newest if young else None

    def _ends(self, run: Run) -> bool:
        """Whether an adopted run is waited for. A sync=none copy ends by state=cancelled only."""
        return self._options.wait and run.draft.sync != "none"

    def _satisfied(self, vm: Vm, entry: VmEntry, recovery: Recovery) -> bool:
        """Whether the last adopted run is what was asked for: the level, all the drives, and not of yesterday."""
        if not recovery.adopted or self._options.expert:
            return False
        point, age = recovery.adopted[-1].draft, self._options.max_age
        if age is not None and not is_younger(point, datetime.now(timezone.utc), age):
            return False
        wanted = {drive.name for drive in select_drives(vm, entry, self._options)[0]}
        whole = {drive.name for drive in point.drives if drive.standalone}
        level = "auto" if point.level != "copy" else None
        return wanted <= whole and self._options.level in (level, point.level)

    def _preflight(self, plan: BackupPlan, path: str) -> None:
        """Refuse before anything is touched when the target cannot hold what may be copied."""
        existing = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        needed = sum(drive.reservation for drive in plan.drives)
        space.require(existing, needed, f"The {plan.level} backup of VM {plan.vm_name}")
        backup_report.check_source_space(plan)


def _repository(options: BackupOptions) -> Repository | None:
    """The repository; made now if this run may make it, ``None`` when there is none and this run must not."""
    if options.state == "present" and not options.check_mode:
        return Repository.create(options.repository, *options.ownership.directory)
    try:
        return Repository.open(options.repository)
    except RepositoryMissing:
        return None


async def _name_of(entry: VmEntry, options: BackupOptions) -> str:
    async with session_for(entry, timeout=options.timeout, read_only=True) as session:
        return (await read_vm(session)).name


async def _agent(session: Session, entry: VmEntry, options: BackupOptions) -> str | None:
    if entry.agent_socket is not None or options.quiesce == "off":
        return entry.agent_socket
    return await find_agent(session)
