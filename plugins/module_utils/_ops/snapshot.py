# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""qmp_snapshot: find out which kind of snapshot is meant, then observe, plan and execute it; one VM at a time."""

from __future__ import annotations

import typing as t
from contextlib import nullcontext

from .._errors import InputInvalid
from .._guest.guard import ThawGuard
from .._qmp.session import Session
from . import snapshot_external, snapshot_internal, snapshot_memory, snapshot_recovered
from ._outcome import Outcome
from .claim import act_on
from .rendezvous import Rendezvous
from .snapshot_errors import SnapshotMissing
from .snapshot_options import Scene, SnapshotOptions
from .vm import VmEntry, read_vm

# In the order in which a name is looked for when no type is given.
_KINDS: dict[str, t.Any] = {
    "external": snapshot_external,
    "internal": snapshot_internal,
    "memory": snapshot_memory,
}


class SnapshotVms:
    """The operation on one entry of ``vms``; one instance serves all ``members`` entries of a call.

    Make it before the event loop starts: it forks the guard that thaws guests should this process be killed.
    """

    def __init__(self, options: SnapshotOptions, members: int) -> None:
        self._options = options.checked()
        freezing = options.state == "present" and options.quiesce != "off" and options.type != "memory"
        self._guard = ThawGuard.started() if freezing and not options.check_mode else None
        grouped = options.group and options.state == "present" and not options.check_mode
        self._group = Rendezvous(members) if grouped else None

    async def __call__(self, params: dict[str, t.Any]) -> Outcome:
        entry = VmEntry.from_params(params)
        member = self._group.member(entry.name or entry.socket) if self._group else nullcontext()
        with member:
            return await act_on(entry, self._options, self._on)

    async def _on(self, session: Session, entry: VmEntry) -> Outcome:
        options = self._options
        vm = await read_vm(session, entry.name)
        scene = Scene(session, vm, entry, options, self._guard, self._group)
        if options.state == "recovered":
            return await snapshot_recovered.recovered(scene)
        if options.state == "present":
            outcome: Outcome = await _KINDS[options.type or "external"].present(scene)
            return outcome
        kind = options.type or await _kind_of(scene)
        if kind is None and options.state == "absent":
            kind = "external"  # which cleans up after killed runs, and finds nothing else to do
        if kind is None:
            known = sorted({name for module in _KINDS.values() for name in await module.names(scene)})
            raise SnapshotMissing(
                of=f"VM {vm.name}",
                vm=vm.name,
                snapshot=options.name,
                type="external, internal or memory",
                where="",
                known=", ".join(known) or "none at all",
            )
        act = _KINDS[kind].absent if options.state == "absent" else _KINDS[kind].reverted
        done: Outcome = await act(scene)
        return done


async def _kind_of(scene: Scene) -> str | None:
    """The one kind that has a snapshot of this name.

    :raise InputInvalid: several have.
    """
    having = [kind for kind, module in _KINDS.items() if scene.options.name in await module.names(scene)]
    if len(having) > 1:
        kinds = " and ".join(having)
        raise InputInvalid(message=f"VM {scene.vm.name} has {kinds} snapshots named {scene.options.name}; say type.")
    return having[0] if having else None
