# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Live chains made shorter: observe, plan, execute; one VM at a time. Of qmp_block_commit and qmp_block_stream."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import typing as t

from .._block.graph import Drive
from .._errors import BlockOpsError
from .._image.snapshot_record import remove_record
from .._qmp.session import Session
from . import snapshot_boot
from ._outcome import Outcome
from .chain_job import Done, command, run_merge
from .chain_merges import Merge, Needs, actives, adopted, open_jobs, plan_merges, require_space
from .chain_options import ChainOptions
from .chain_report import Picture, drive_results, vm_result
from .chain_select import find_drops
from .claim import act_on
from .overlay import remove_overlay
from .snapshot_boot import BootFiles
from .snapshot_options import Scene
from .snapshot_recovery import recover
from .snapshot_view import View, look, refuse_while_jobs_run, select
from .vm import VmEntry, read_vm

_WHAT = "merging images"


class ChainVms:
    """The operation on one entry of ``vms``."""

    def __init__(self, options: ChainOptions) -> None:
        self._options = options.checked()

    async def __call__(self, params: dict[str, t.Any]) -> Outcome:
        return await act_on(VmEntry.from_params(params), self._options, self._on)

    async def _on(self, session: Session, entry: VmEntry) -> Outcome:
        vm = await read_vm(session, entry.name)
        scene = Scene(session, vm, entry, self._options.for_snapshots())
        scene, view, recovered = await recover(scene)
        work = _Work(self._options, scene, view, recovered)
        plan = await asyncio.to_thread(work.plan)
        refuse_while_jobs_run(scene, _WHAT, {merge.job for merge in plan})
        boot = await snapshot_boot.look(scene)
        if self._options.check_mode:
            return work.predicted(plan, boot)
        try:
            await work.execute(plan)
        except BlockOpsError as exc:
            return await work.outcome(error=exc)
        return await work.outcome()


class _Work:
    """One VM's work: what there was, what was done, and where it stands."""

    def __init__(self, options: ChainOptions, scene: Scene, view: View, recovered: list[str]) -> None:
        self.options = options
        self.scene = scene
        self.recovered = recovered
        way_out = "Correct the option drives."
        selection = select(scene, lambda drive: "it holds no image" if drive.empty else None, _WHAT, way_out)
        self.names = [drive.name for drive in selection.drives]
        self.skipped = list(selection.skipped)
        self.before = Picture.of(selection.drives, view)
        self.view = view
        self.done = Done()

    def plan(self) -> list[Merge]:
        """All merges of all drives, those first that a killed run has begun. Files are read, nothing is touched."""
        needs = Needs(self.scene, self.view, self.before.drives)
        begun = [
            found
            for drive in self.before.drives
            for found in [adopted(self.options, drive, open_jobs(self.scene), needs)]
            if found is not None
        ]
        picture = self.before
        for merge in begun:
            picture = picture.after(merge)
        view = picture.view(self.view.directories)
        return begun + self._new(picture.drives, view, needs)

    def _new(self, drives: t.Sequence[Drive], view: View, needs: Needs) -> list[Merge]:
        drops = find_drops(self.options, self.scene.vm.name, drives, view)
        merges = [
            merge
            for drive in drives
            for merge in plan_merges(self.options, self.scene.vm.name, drive, drops[drive.name], needs)
        ]
        require_space(merges, self.scene.vm.name)
        return merges

    async def execute(self, plan: list[Merge]) -> None:
        begun = [merge for merge in plan if merge.job in self.scene.vm.jobs]
        for merge in begun:
            self.scene = await run_merge(self.scene, self.options, merge, self.done)
        if begun:
            # What is left is planned anew: the images are not what they were.
            view = await asyncio.to_thread(look, self.scene)
            drives = [drive for drive in self.scene.vm.drives if drive.name in self.names]
            needs = await asyncio.to_thread(Needs, self.scene, view, drives)
            plan = self._new(drives, view, needs)
        for merge in plan:
            self.scene = await run_merge(self.scene, self.options, merge, self.done)

    async def outcome(self, error: BlockOpsError | None = None) -> Outcome:
        """Whatever came of it. Without an error the definition is put right also where nothing was merged."""
        boot = await snapshot_boot.look(self.scene) if error is None else None
        rewriting = boot.plan(boot.moves({})) if boot is not None else None
        if rewriting is not None:
            rewriting.write()
            self.done.definition += rewriting.result(False)
            self.done.deleted += await asyncio.to_thread(self._tidied)
        view = await asyncio.to_thread(look, self.scene) if error is None else None
        drives = tuple(drive for drive in self.scene.vm.drives if drive.name in self.names)
        after = Picture.of(drives, view) if view is not None else dataclasses.replace(self.before, drives=drives)
        result = vm_result(self.scene, drive_results(self.before, after, self.done.merges), **self._known())
        changed = bool(self.done.merges or self.recovered or self.done.definition or self.done.deleted)
        if boot is None or rewriting is None:
            return Outcome(changed, result, warnings=tuple(self.done.warnings), error=error)
        result["boot_drift"] = boot.drift({})
        warnings = (*self.done.warnings, *rewriting.warnings, *boot.warnings({}, rewriting))
        return Outcome(changed, result, *rewriting.diff(self.before.text(), after.text()), warnings=warnings)

    def _known(self) -> dict[str, t.Any]:
        done = self.done
        return {
            "skipped": self.skipped,
            "recovered": self.recovered,
            "deleted": done.deleted,
            "kept": done.kept,
            "definition": done.definition,
        }

    def _emptied(self) -> list[str]:
        return look(self.scene).emptied if self.options.delete else []

    def _tidied(self) -> list[str]:
        found = self._emptied()
        for file in found:
            remove_overlay(file) if os.path.exists(file) else remove_record(file)
        return found

    def predicted(self, plan: list[Merge], boot: BootFiles) -> Outcome:
        """What the same call without check mode would answer."""
        after = self.before
        for merge in plan:
            after = after.after(merge)
        new_actives = actives(plan)
        rewriting = boot.plan(boot.moves(new_actives))
        result = vm_result(self.scene, drive_results(self.before, after, plan), **self._known())
        new = (merge for merge in plan if merge.job not in self.scene.vm.jobs)
        jobs = [command(merge, self.options, merge.drive.root) for merge in new]
        result["commands"] = [job.to_result() for job in jobs]
        result["deleted"] = [*(file for merge in plan for file in merge.deleted), *self._emptied()]
        result["kept"] = [file for merge in plan for file in merge.kept]
        result["definition"] = rewriting.result(True)
        result["boot_drift"] = boot.drift(new_actives)
        changed = bool(plan or self.recovered or rewriting.needed or result["deleted"])
        warnings = (*rewriting.warnings, *boot.warnings(new_actives, rewriting))
        return Outcome(changed, result, *rewriting.diff(self.before.text(), after.text()), warnings=warnings)
