# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""qmp_vm_info: find VMs by their sockets and describe them. Only queries are ever sent."""

from __future__ import annotations

import asyncio
import dataclasses
import glob
import typing as t

from .._block.fitness import fitness
from .._block.graph import Bitmap, Drive, Layer
from .._block.names import is_ours, parse_bitmap, parse_object
from .._errors import BlockOpsError, InputInvalid
from .._guest.agent import Agent
from ._outcome import Outcome
from .cold_boot import Drift, drifts, read_startup
from .doctor import examine
from .doctor_types import Finding
from .snapshot_options import Scene, SnapshotOptions
from .vm import Vm, VmEntry, find_agent, read_vm, session_for

# From here on reading gets slower and a restart takes longer; it is also a sign that nobody prunes.
_DEEP_CHAIN = 16


def entries_for(vms: list[dict[str, t.Any]], patterns: list[str]) -> list[dict[str, t.Any]]:
    """The listed VMs, and one more entry for each socket that matches a pattern and is not among theirs."""
    listed = {entry.get("socket") for entry in vms}
    found = sorted({path for pattern in patterns for path in glob.glob(pattern)} - listed)
    return [*vms, *({"name": None, "socket": path} for path in found)]


class VmInfo:
    """The operation on one entry. ``timeout`` seconds for every answer; ``agent``: whether to ask the guest agent.

    ``doctor``: whether to look for what is wrong, in the files of the VM too; ``repository``: with its backups there.
    """

    def __init__(self, timeout: float, agent: bool, doctor: bool = False, repository: str | None = None) -> None:
        if repository is not None and not doctor:
            raise InputInvalid(message="repository is for doctor=true, which compares the bitmaps with its backups.")
        self._timeout = timeout
        self._agent = agent
        self._doctor = doctor
        self._repository = repository

    async def __call__(self, params: dict[str, t.Any]) -> Outcome:
        entry = VmEntry.from_params(params)
        async with session_for(entry, timeout=self._timeout, read_only=True) as session:
            vm = await read_vm(session, entry.name)
            agent_socket = entry.agent_socket or await find_agent(session)
        agent = await self._ask_agent(vm, agent_socket)
        startup, _reason = read_startup(vm.process)
        drift = None if startup is None else drifts(startup, vm.drives)
        result = describe(vm, agent_socket, agent, drift)
        if self._doctor:
            scene = Scene(session, vm, entry, SnapshotOptions(name="doctor", check_mode=True))
            found: list[Finding] = await asyncio.to_thread(examine, scene, drift or (), self._repository)
            result["findings"] = [finding.to_result() for finding in found]
        return Outcome(False, result)

    async def _ask_agent(self, vm: Vm, socket: str | None) -> dict[str, t.Any]:
        """Whether the agent answers, its version, and whether the guest is frozen at this moment."""
        if socket is None:
            return {"reachable": False, "reason": "QEMU has no channel for a guest agent"}
        if not self._agent or not vm.running:
            return {"reachable": False, "reason": "not asked" if vm.running else "the VM is not running"}
        try:
            agent = await Agent.open(socket, self._timeout)
        except BlockOpsError as exc:
            return {"reachable": False, "reason": str(exc)}
        try:
            info = await agent.call("guest-info")
            frozen = await agent.call("guest-fsfreeze-status")
        except BlockOpsError as exc:
            return {"reachable": False, "reason": str(exc)}
        finally:
            agent.close()
        return {
            "reachable": True,
            "version": info.get("version") if isinstance(info, dict) else None,
            "frozen": frozen == "frozen",
        }


def describe(
    vm: Vm, agent_socket: str | None, agent: dict[str, t.Any], drift: t.Sequence[Drift] | None
) -> dict[str, t.Any]:
    """The description of one VM, as documented in RETURN of qmp_vm_info. ``drift`` is ``None`` when nobody can tell."""
    return {
        "name": vm.name,
        "agent_socket": agent_socket,
        "uuid": vm.uuid,
        "qemu_version": vm.version,
        "status": vm.status,
        "running": vm.running,
        "process": dataclasses.asdict(vm.process),
        "agent": agent,
        "drives": [_drive(drive) for drive in vm.drives],
        "jobs": [{**job.to_result(), "ours": is_ours(job.id)} for job in vm.jobs.values()],
        "leftovers": _leftovers(vm),
        "boot_drift": None if drift is None else [one.to_result() for one in drift],
        "warnings": [*_warnings(vm, agent), *(one.warning for one in drift or ())],
    }


def _drive(drive: Drive) -> dict[str, t.Any]:
    fit = fitness(drive)
    description: dict[str, t.Any] = {
        "name": drive.name,
        "qdev": drive.qdev,
        "removable": drive.removable,
        "backup": {
            "possible": fit.possible,
            "default": fit.default,
            "tracking": fit.tracking.value,
            "reason": fit.reason,
        },
        "filters": list(drive.filters),
        "chain": [_layer(layer) for layer in drive.layers],
        "bitmaps": [_bitmap(layer, bitmap) for layer in drive.layers for bitmap in layer.bitmaps],
    }
    if not drive.empty:
        image = drive.active
        description.update(
            node=image.node,
            format=image.driver,
            virtual_size=image.virtual_size,
            read_only=image.read_only,
            encrypted=image.encrypted,
            data_file=image.data_file,
        )
    return description


def _layer(layer: Layer) -> dict[str, t.Any]:
    return {
        "node": layer.node,
        "file": layer.file,
        "format": layer.driver,
        "protocol": layer.protocol,
        "virtual_size": layer.virtual_size,
        "allocated": layer.allocated,
        "read_only": layer.read_only,
    }


def _bitmap(layer: Layer, bitmap: Bitmap) -> dict[str, t.Any]:
    ours = parse_bitmap(bitmap.name)
    return {
        "name": bitmap.name,
        "node": layer.node,
        "state": bitmap.state,
        "count": bitmap.count,
        "granularity": bitmap.granularity,
        "persistent": bitmap.persistent,
        "ours": is_ours(bitmap.name),
        "repository": ours.repository if ours else None,
        "backup": ours.backup if ours else None,
    }


def _leftovers(vm: Vm) -> list[str]:
    """Objects of a run of ours: of one that is under way, or of one that was killed."""
    bitmaps = (bitmap.name for drive in vm.drives for layer in drive.layers for bitmap in layer.bitmaps)
    return sorted({name for name in (*vm.nodes, *vm.jobs, *bitmaps) if parse_object(name) is not None})


def _warnings(vm: Vm, agent: dict[str, t.Any]) -> t.Iterator[str]:
    if agent.get("frozen"):
        yield "The guest's file systems are frozen."
    if vm.uuid is None:
        yield "QEMU was started without -uuid: two VMs of this name could not be told apart in a repository."
    for drive in vm.drives:
        if len(drive.layers) > _DEEP_CHAIN:
            yield f"Drive {drive.name} has a chain of {len(drive.layers)} images."
        for layer in drive.layers:
            for bitmap in layer.bitmaps:
                if bitmap.inconsistent:
                    yield f"Bitmap {bitmap.name} of drive {drive.name} is inconsistent: QEMU was killed with it."
    for job in vm.jobs.values():
        if job.stalled:
            yield f"Job {job.id} is paused by an I/O error ({job.io_status})."


def without_twins(pairs: list[tuple[dict[str, t.Any], Outcome]]) -> list[tuple[dict[str, t.Any], Outcome]]:
    """One entry for each QEMU process: a VM with two monitors matches a pattern twice, and is one VM all the same."""
    first: dict[int, Outcome] = {}
    shared: set[int] = set()
    for _entry, outcome in pairs:
        if "process" not in outcome.result:
            continue
        pid = outcome.result["process"]["pid"]
        if first.setdefault(pid, outcome).result["uuid"] != outcome.result["uuid"]:
            shared.add(pid)
    # In a container every QEMU may have pid 0, and sockets may have been made by somebody else than QEMU (systemd, a
    # manager): a process that seems to be several VMs tells nothing.
    first = {pid: outcome for pid, outcome in first.items() if pid > 1 and pid not in shared and outcome.result["uuid"]}
    answer: list[tuple[dict[str, t.Any], Outcome]] = []
    for entry, outcome in pairs:
        kept = first.get(_pid(outcome), outcome)
        if kept is outcome:
            answer.append((entry, outcome))
        else:
            kept.result["warnings"].append(f"The VM has another monitor on {entry['socket']}.")
    return answer


def _pid(outcome: Outcome) -> int:
    """The process behind the socket, which the kernel tells even of a monitor that is busy."""
    if outcome.error is not None:
        return int(outcome.error.data.get("pid", -1))
    return int(outcome.result["process"]["pid"])
