# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Images in the middle of live chains trimmed: observe, plan, execute; one VM at a time. Of qmp_block_rebase."""

from __future__ import annotations

import asyncio
import dataclasses
import typing as t

from .._errors import BlockOpsError
from .._qmp.schema import read_schema
from .._qmp.session import Session
from . import snapshot_boot
from ._outcome import Outcome
from .block_rebase_node import read_children, read_command_line
from .block_rebase_plan import Planner
from .block_rebase_swap import abandoned, run_trim, settle
from .block_rebase_types import Done, Trim, TrimOptions, Verdict
from .chain_report import Picture
from .claim import act_on
from .overlay import remove_overlay
from .snapshot_options import Scene
from .snapshot_recovery import recover
from .snapshot_view import View, look, refuse_while_jobs_run, select
from .vm import VmEntry, read_vm

_WHAT = "trimming images"


class QemuTooOld(BlockOpsError):
    template = "The QEMU of VM {vm} ({version}) has no blockdev-reopen, so its images cannot be exchanged."
    advice = "Nothing was touched. Use QEMU 6.1 or later, or qemu_img_rebase when the VM is switched off."


class RebaseVms:
    """The operation on one entry of ``vms``."""

    def __init__(self, options: TrimOptions) -> None:
        self._options = options.checked()

    async def __call__(self, params: dict[str, t.Any]) -> Outcome:
        return await act_on(VmEntry.from_params(params), self._options, self._on)

    async def _on(self, session: Session, entry: VmEntry) -> Outcome:
        vm = await read_vm(session, entry.name)
        if not (await read_schema(session)).has_command("blockdev-reopen"):
            raise QemuTooOld(vm=vm.name, version=vm.version)
        scene = Scene(session, vm, entry, self._options.for_snapshots())
        refuse_while_jobs_run(scene, _WHAT, {job for job in vm.jobs if vm.jobs[job].status == "concluded"})
        scene, view, recovered = await recover(scene)
        gone = frozenset(abandoned(view, scene))
        recovered += await settle(scene, view)
        if recovered and not self._options.check_mode:
            scene = dataclasses.replace(scene, vm=await read_vm(session, entry.name))
            view = await asyncio.to_thread(look, scene)
        elif gone:
            scene = dataclasses.replace(scene, gone=scene.gone | gone)
        work = _Work(self._options, scene, view, recovered)
        await work.plan()
        if self._options.check_mode:
            return work.predicted()
        try:
            await work.execute()
        except BlockOpsError as exc:
            return await work.outcome(exc)
        return await work.outcome()


class _Work:
    """One VM's work: what there was, what was done, and where it stands."""

    def __init__(self, options: TrimOptions, scene: Scene, view: View, recovered: list[str]) -> None:
        self.options, self.scene, self.view, self.recovered = options, scene, view, recovered
        selection = select(scene, lambda drive: "it holds no image" if drive.empty else None, _WHAT, "")
        self.names = [drive.name for drive in selection.drives]
        self.skipped = list(selection.skipped)
        self.before = Picture.of(selection.drives, view)
        self.verdicts: list[Verdict] = []
        self.done = Done()
        self.boot: snapshot_boot.BootFiles | None = None

    @property
    def trims(self) -> list[Trim]:
        return [verdict.trim for verdict in self.verdicts if verdict.trim is not None]

    async def plan(self) -> None:
        """Files are read, nothing is touched."""
        session = self.scene.session
        self.boot = await snapshot_boot.look(self.scene)
        nodes = await asyncio.to_thread(read_command_line, session.process.pid)
        children = await read_children(session)
        planner = await asyncio.to_thread(Planner, self.scene, self.view, self.options, self.boot, nodes, children)
        self.verdicts = await planner.plan(self.before.drives)

    async def execute(self) -> None:
        for trim in self.trims:
            self.scene = await run_trim(self.scene, self.options, trim, self.done)
        for file in self.view.emptied if self.options.delete else ():
            await asyncio.to_thread(remove_overlay, file)
            self.done.deleted.append(file)

    def predicted(self) -> Outcome:
        """What the same call without check mode would answer."""
        olds = [trim.layer.file for trim in self.trims]
        after = _after(self.before, self.trims)
        deleted = [*olds, *self.view.emptied] if self.options.delete else []
        kept = [] if self.options.delete else olds
        changed = bool(self.trims or self.recovered or deleted)
        return self._outcome(changed, after, self.verdicts, deleted=deleted, kept=kept)

    async def outcome(self, error: BlockOpsError | None = None) -> Outcome:
        done = self.done
        verdicts = [verdict for verdict in self.verdicts if verdict.trim is None or verdict.trim in done.trims]
        after = _after(self.before, done.trims)
        if error is None:
            view = await asyncio.to_thread(look, self.scene)
            after = Picture.of([drive for drive in self.scene.vm.drives if drive.name in self.names], view)
        changed = bool(done.trims or done.deleted or self.recovered)
        return self._outcome(changed, after, verdicts, error, deleted=done.deleted, kept=done.kept)

    def _outcome(
        self,
        changed: bool,
        after: Picture,
        verdicts: t.Sequence[Verdict],
        error: BlockOpsError | None = None,
        **known: list[str],
    ) -> Outcome:
        old, new = self.before.files(), after.files()
        result = {
            "name": self.scene.vm.name,
            "status": "trimmed" if any(verdict.trim for verdict in verdicts) else "unchanged",
            "drives": [
                {
                    "name": name,
                    "before": old[name],
                    "after": new.get(name, []),
                    "images": [verdict.to_result() for verdict in verdicts if verdict.drive == name],
                }
                for name in old
            ],
            "freed_bytes": None if self.options.check_mode else self.done.freed,
            "skipped": self.skipped,
            "recovered": self.recovered,
            "boot_drift": self.boot.drift({}) if self.boot is not None else None,
            "commands": [command.to_result() for command in self.scene.session.sent],
            **known,
        }
        warnings = tuple(self.boot.warnings({}, self.boot.plan(()))) if self.boot is not None else ()
        before, then = {"chains": self.before.text()}, {"chains": after.text()}
        return Outcome(changed, result, before, then, warnings=warnings, error=error)


def _after(before: Picture, trims: t.Iterable[Trim]) -> Picture:
    """The same chains with the copies in their places."""
    news = {trim.layer.file: trim.new for trim in trims}
    drives = tuple(
        dataclasses.replace(
            drive,
            layers=tuple(dataclasses.replace(layer, file=news.get(layer.file, layer.file)) for layer in drive.layers),
        )
        for drive in before.drives
    )
    return Picture(drives, {news.get(file, file): record for file, record in before.records.items()})
