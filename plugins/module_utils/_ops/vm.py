# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Observing one VM: everything the planners need to know of a running QEMU, read once into frozen data."""

from __future__ import annotations

import asyncio
import os
import typing as t
from contextlib import asynccontextmanager
from dataclasses import dataclass

from .._block.graph import Drive, fit_together, parse_drives
from .._errors import CommandFailed, InputInvalid
from .._qmp.jobs import Job, read_jobs
from .._qmp.nodes import NODES
from .._qmp.session import Process, Session

_LOOKS = 10
_NO_UUID = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True)
class VmEntry:
    """One element of the option ``vms``. ``drives`` empty means all that can be backed up.

    ``described`` are drives that came as descriptions of qmp_vm_info: a choice, but one that names given elsewhere
    go before.
    """

    socket: str
    name: str | None = None
    agent_socket: str | None = None
    drives: tuple[str, ...] = ()
    described: tuple[str, ...] = ()
    exclude_drives: tuple[str, ...] = ()
    definition: tuple[str, ...] = ()

    @classmethod
    def from_params(cls, entry: dict[str, t.Any]) -> VmEntry:
        """From a validated element of ``vms``; drive descriptions of qmp_vm_info count by what they say of a backup."""
        if not entry.get("socket"):
            raise InputInvalid(message=f"The entry {entry.get('name')!r} of vms has no socket.")
        drives = entry.get("drives") or []
        return cls(
            socket=entry["socket"],
            name=entry.get("name"),
            agent_socket=entry.get("agent_socket"),
            drives=tuple(drive for drive in drives if isinstance(drive, str)),
            described=tuple(_described([drive for drive in drives if not isinstance(drive, str)])),
            exclude_drives=tuple(entry.get("exclude_drives") or ()),
            definition=tuple(entry.get("definition") or ()),
        )


@dataclass(frozen=True)
class Vm:
    """A running QEMU as observed. ``nodes`` are all node names; ``machine`` is false for a qemu-storage-daemon."""

    name: str
    uuid: str | None
    status: str
    version: str
    process: Process
    drives: tuple[Drive, ...]
    jobs: dict[str, Job]
    nodes: tuple[str, ...]

    @property
    def running(self) -> bool:
        return self.status == "running"

    def drive(self, name: str) -> Drive | None:
        return next((drive for drive in self.drives if drive.name == name), None)


@asynccontextmanager
async def session_for(entry: VmEntry, *, timeout: float, read_only: bool) -> t.AsyncIterator[Session]:
    """An open session that is closed again, whatever happens."""
    session = await Session.open(entry.socket, timeout=timeout, read_only=read_only)
    try:
        yield session
    finally:
        await session.close()


async def read_vm(session: Session, name: str | None = None) -> Vm:
    """Observe the VM behind the session. Raises what Session.command raises."""
    (status, uuid, named), (drives, nodes), jobs = await asyncio.gather(
        session.ask("query-status", "query-uuid", "query-name"), read_drives(session), read_jobs(session)
    )
    return Vm(
        name=name or named.get("name") or _stem(session.path),
        uuid=None if uuid["UUID"] == _NO_UUID else uuid["UUID"],
        status=status["status"],
        version="{major}.{minor}.{micro}".format(**session.version["qemu"]),
        process=session.process,
        drives=drives,
        jobs=jobs,
        nodes=nodes,
    )


async def read_drives(session: Session) -> tuple[tuple[Drive, ...], tuple[str, ...]]:
    """The drives with their chains, and the names of all nodes."""
    for _try in range(_LOOKS):
        blocks, stats, nodes = await session.ask("query-block", "query-blockstats", NODES)
        # Three looks at what may change in between: a drive whose filter has just gone would seem to be empty.
        if fit_together(stats, nodes):
            break
    drives = parse_drives(blocks, stats, nodes, _working_directory(session.process.pid))
    return drives, tuple(node["node-name"] for node in nodes if node.get("node-name"))


async def read_nodes(session: Session) -> tuple[str, ...]:
    """The names of all nodes, when nothing else of them matters."""
    (nodes,) = await session.ask(NODES)
    return tuple(node["node-name"] for node in nodes if node.get("node-name"))


async def find_agent(session: Session) -> str | None:
    """The socket of the guest agent's channel, asked from QEMU: its virtserialport names a chardev."""
    label = await _agent_chardev(session)
    if label is None:
        return None
    for chardev in await session.command("query-chardev"):
        if chardev["label"] == label:
            return _unix_path(chardev["filename"])
    return None


async def _agent_chardev(session: Session) -> str | None:
    for container in ("/machine/peripheral", "/machine/peripheral-anon"):
        for child in await _qom(session, "qom-list", path=container) or ():
            if child["type"] != "child<virtserialport>":
                continue
            path = f"{container}/{child['name']}"
            if await _qom(session, "qom-get", path=path, property="name") == "org.qemu.guest_agent.0":
                label = await _qom(session, "qom-get", path=path, property="chardev")
                return label if isinstance(label, str) else None
    return None


async def _qom(session: Session, command: str, **arguments: str) -> t.Any:
    """QOM is looked at for comfort: a container or property that this QEMU does not have is no error."""
    try:
        return await session.command(command, **arguments)
    except CommandFailed:
        return None


def _unix_path(filename: str) -> str | None:
    """The path in a chardev's description: ``unix:/run/vm.qga,server=on``, ``disconnected:unix:...``."""
    _before, found, rest = filename.partition("unix:")
    return rest.split(",")[0].split(" ")[0] if found else None


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _working_directory(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return None


def _described(drives: list[t.Any]) -> t.Iterator[str]:
    """Names of the described drives that qmp_vm_info would back up."""
    for drive in drives:
        if not isinstance(drive, dict) or not isinstance(drive.get("name"), str):
            raise InputInvalid(message=f"{drive!r} in drives is neither a name nor a drive of qmp_vm_info.")
        backup = drive.get("backup")
        if not isinstance(backup, dict) or backup.get("default", True):
            yield drive["name"]
