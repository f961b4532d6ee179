# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Prove that backups can be restored, and write the proof beside them. Nothing else in the repository is written."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
import typing as t
from dataclasses import dataclass
from datetime import datetime, timezone

from .._errors import BlockOpsError, DriveUnknown, ImageToolMissing, InputInvalid, SpaceExhausted, TargetUnwritable
from .._guest.drill_guard import DrillGuard
from .._guest.program import ProgramMissing
from .._guest.room import remove_leftovers
from .._repository.verified import (
    CHAIN,
    CHECKSUMS,
    DRILL,
    FAILED,
    IMAGES,
    PASSED,
    VERIFIED,
    CheckRecord,
    Verification,
    manifest_digest,
    write_record,
)
from ._outcome import Outcome
from .backup_proof import together
from .verify_checks import Proofs
from .verify_command import Overlay, command_line
from .verify_drill import boot, refuse_unbootable
from .verify_plan import needed_digests, plan_verify
from .verify_report import Result, after, before, error_of
from .verify_types import BackupChanged, DrillImpossible, RecordUnwritable, Refused, Target, VerifyRequest

# Errors that tell of this host and say nothing about the backup: they are not recorded against it.
_NO_EVIDENCE = (
    DrillImpossible, DriveUnknown, ImageToolMissing, InputInvalid, ProgramMissing, SpaceExhausted, TargetUnwritable,
)  # fmt: skip


async def verify(request: VerifyRequest, *, check_mode: bool) -> Outcome:
    """Observe, plan, execute. One backup that fails never stops the others."""
    if DRILL in request.checks:
        _preflight(request)
    drilling = DRILL in request.checks and not check_mode
    guard = DrillGuard.started() if drilling else None  # before anything makes a thread
    try:
        if drilling:
            await asyncio.to_thread(remove_leftovers, request.drill.work_directory)
        plan = await asyncio.to_thread(plan_verify, request, datetime.now(timezone.utc))
        results = [_predicted(request, item) for item in plan] if check_mode else await _all(request, plan, guard)
    finally:
        if guard is not None:
            guard.stop()
    targets = [(result, result.item) for result in results if isinstance(result.item, Target)]
    return Outcome(
        changed=any(result.changed for result in results),
        result={"repository": os.path.abspath(request.repository), "backups": [result.entry() for result in results]},
        before={result.name: before(target) for result, target in targets},
        after={result.name: after(result, request.checks) for result, _target in targets},
        warnings=tuple(text for result in results for text in result.warnings()),
        error=error_of(results),
    )


def _preflight(request: VerifyRequest) -> None:
    """What would keep every drill from being made."""
    directory, machine = request.drill.work_directory, request.drill.machine
    if not os.path.isdir(directory):
        raise TargetUnwritable(path=directory, reason="there is no such directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise TargetUnwritable(path=directory, reason="it may not be written to")
    for program in [machine.command[0] if machine.command else machine.qemu, *request.drill.check[:1]]:
        if shutil.which(program) is None:
            raise ProgramMissing(program=program, reason="there is no such program")


def _obstacle(request: VerifyRequest, target: Target) -> BlockOpsError | None:
    """What is in the way of looking at a backup at all."""
    if request.record and not os.access(target.directory, os.W_OK | os.X_OK):
        return TargetUnwritable(
            path=target.directory, reason="its record could not be written; record=false does without"
        )
    try:
        if DRILL in request.checks and target.broken is None:
            refuse_unbootable(target)
            overlays = [Overlay(drive.name, "") for drive in target.manifest.drives]
            command_line(request.drill.machine, overlays, "", target.store.name, "")
    except (DrillImpossible, DriveUnknown) as exc:
        return exc
    return None


def _predicted(request: VerifyRequest, item: Target | Refused) -> Result:
    """Check mode's answer."""
    if isinstance(item, Refused):
        return Result(item, error=item.error)
    if item.due is None:
        return Result(item, outcome=PASSED, known=item.known)
    obstacle = _obstacle(request, item)
    if obstacle is not None:
        return Result(item, known=item.known, error=obstacle)
    return Result(item, changed=request.record, known=item.known, error=item.broken)


async def _all(request: VerifyRequest, plan: t.Sequence[Target | Refused], guard: DrillGuard | None) -> list[Result]:
    room = asyncio.Semaphore(request.max_parallel)
    proofs = Proofs()

    async def one(item: Target | Refused) -> Result:
        if isinstance(item, Refused) or item.due is None or _obstacle(request, item) is not None:
            return _predicted(request, item)
        async with room:
            return await _verified(request, item, proofs, guard)

    try:
        return await together(one(item) for item in plan)
    finally:
        await proofs.close()


@dataclass
class _Checks:
    """The checks of one backup, one after the other, up to the first that fails."""

    collection: str
    done: list[CheckRecord]
    without: tuple[str, ...] = ()
    error: BlockOpsError | None = None

    async def do(self, name: str, work: t.Coroutine[t.Any, t.Any, tuple[int, float | None, tuple[str, ...]]]) -> None:
        """``work`` gives bytes, its own seconds if it knows better, and the conditions that were met."""
        if self.error is not None:
            work.close()
            return
        started, began = datetime.now(timezone.utc), time.monotonic()
        size, seconds, conditions = 0, None, tuple[str, ...]()
        try:
            size, seconds, conditions = await work
        except BlockOpsError as exc:
            self.error = exc
            if isinstance(exc, _NO_EVIDENCE):
                return
        self.done.append(
            CheckRecord(
                name=name,
                outcome=PASSED if self.error is None else FAILED,
                started=started,
                finished=datetime.now(timezone.utc),
                seconds=round(time.monotonic() - began if seconds is None else seconds, 3),
                bytes=size,
                kind=None if self.error is None else self.error.kind,
                message=None if self.error is None else str(self.error),
                conditions=conditions,
                host=socket.gethostname(),
                collection=self.collection,
            )
        )


async def _verified(request: VerifyRequest, target: Target, proofs: Proofs, guard: DrillGuard | None) -> Result:
    began = time.monotonic()
    checks = _Checks(request.collection, [])

    async def chain() -> tuple[int, float | None, tuple[str, ...]]:
        if target.broken is not None:
            raise target.broken
        return 0, None, ()

    async def checksums() -> tuple[int, float | None, tuple[str, ...]]:
        size, without = await proofs.checksums(target)
        checks.without = tuple(without)
        return size, None, ()

    async def images() -> tuple[int, float | None, tuple[str, ...]]:
        await proofs.images(target)
        return 0, None, ()

    async def drill() -> tuple[int, float | None, tuple[str, ...]]:
        if guard is None:
            raise InputInvalid(message="A drill needs its guard.")
        proof = await boot(target, request.drill, guard)
        return 0, proof.seconds, proof.conditions

    await checks.do(CHAIN, chain())
    for name, work in ((CHECKSUMS, checksums), (IMAGES, images), (DRILL, drill)):
        if name in request.checks:
            await checks.do(name, work())
    return await asyncio.to_thread(_concluded, request, target, checks, time.monotonic() - began)


def _concluded(request: VerifyRequest, target: Target, checks: _Checks, seconds: float) -> Result:
    """Write down what was found, unless it was found about something that is no longer there."""
    if needed_digests(target.store, target.manifest, target.chains, manifest_digest) != target.digests:
        error = BackupChanged(backup=target.manifest.id, vm=target.store.name)
        return Result(target, seconds=seconds, error=error)
    previous = target.known or Verification(target.manifest.id, target.digests, ())
    known, error_found = previous.with_checks(checks.done), checks.error
    outcome = PASSED if error_found is None else FAILED if checks.done[-1].outcome == FAILED else None
    changed = False
    if request.record:
        try:
            write_record(target.directory, known)
            changed = True
        except OSError as exc:
            path, reason = os.path.join(target.directory, VERIFIED), exc.strerror or str(exc)
            about = {"backup": target.manifest.id, "vm": target.store.name, "outcome": outcome or "an open end"}
            error_found = error_found or RecordUnwritable(**about, path=path, reason=reason)
    return Result(target, changed, outcome, known, seconds, checks.without, error_found)
