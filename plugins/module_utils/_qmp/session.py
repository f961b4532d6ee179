# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The only importer of qemu.qmp: a connection to one QEMU, with a deadline on everything and a gate for check mode."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
import time
import typing as t
from contextlib import contextmanager
from dataclasses import dataclass

from .._errors import (
    CheckModeViolation,
    CommandFailed,
    CommandTimedOut,
    NotQmp,
    SocketBusy,
    SocketDead,
    SocketForbidden,
    SocketMissing,
    VmGone,
)
from .._unix import NotASocket, connect_unix

try:
    from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError
except ImportError as exc:
    QEMU_QMP_ERROR: ImportError | None = exc
else:
    QEMU_QMP_ERROR = None
    # The library logs what it also raises; on a module's stderr that is noise before our own message.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    logging.getLogger("qemu.qmp").propagate = False

    class _Client(QMPClient):
        """Without the log of every message, for which the library spells it out as text even when nobody listens.

        With many VMs that was a third of the processor time of a run.
        """

        def _cb_outbound(self, msg: Message) -> Message:
            return msg

        def _cb_inbound(self, msg: Message) -> Message:
            return msg


# Commands that change nothing although their name does not begin with "query-".
_READING = frozenset({"qom-get", "qom-list", "qom-list-types", "qom-list-properties"})


@dataclass(frozen=True)
class Process:
    """The process behind a QMP socket, as the kernel tells (SO_PEERCRED). -1 where it cannot tell."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True)
class Command:
    """One QMP command as data: what a plan holds and a result shows."""

    name: str
    arguments: t.Mapping[str, t.Any]

    def to_result(self) -> dict[str, t.Any]:
        return {"execute": self.name, "arguments": dict(self.arguments)} if self.arguments else {"execute": self.name}


class Session:
    """One QMP connection. Open it with ``await Session.open(...)``, close it with ``await session.close()``.

    ``timeout`` (seconds) bounds the greeting and every command. ``read_only`` is check mode: anything but queries is
    refused here, so that no plan can leak into execution. ``sent`` holds the commands that may have changed something.
    """

    def __init__(self, client: QMPClient, path: str, process: Process, *, timeout: float, read_only: bool) -> None:
        self.path = path
        self.process = process
        self.timeout = timeout
        self.read_only = read_only
        self.sent: list[Command] = []
        self._client = client

    @classmethod
    async def open(cls, path: str, *, timeout: float, read_only: bool) -> Session:
        """Connect and negotiate. Raises one of the Socket* errors or NotQmp, always within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        sock = await _connect(path, timeout, deadline)
        process = Process(*struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))
        client = _Client(f"blockops {path}")
        try:
            await asyncio.wait_for(client.connect(sock), max(0.01, deadline - time.monotonic()))
        except asyncio.TimeoutError as exc:
            sock.close()
            raise SocketBusy(socket=path, timeout=timeout, pid=process.pid) from exc
        except ConnectError as exc:
            sock.close()
            raise NotQmp(socket=path, reason=_first_line(exc.exc)) from exc
        return cls(client, path, process, timeout=timeout, read_only=read_only)

    async def close(self) -> None:
        """Disconnect. A QEMU that has gone in the meantime is no error here: whoever needed it has been told."""
        try:
            await asyncio.wait_for(self._client.disconnect(), self.timeout)
        except (QMPError, EOFError, OSError, asyncio.TimeoutError):
            return

    async def command(self, command: str, /, **arguments: t.Any) -> t.Any:
        """Send one command and return QEMU's answer. Underscores in argument names stand for dashes.

        Raises CommandFailed with QEMU's words, CommandTimedOut, or VmGone.
        """
        return await self.execute(Command(command, {key.replace("_", "-"): value for key, value in arguments.items()}))

    async def execute(self, command: Command, timeout: float | None = None) -> t.Any:
        """Send a command given as data, with its own time-out (seconds) if need be."""
        limit = min(timeout or self.timeout, self.timeout)
        if not (command.name.startswith("query-") or command.name in _READING):
            if self.read_only:
                raise CheckModeViolation(command=command.name)
            self.sent.append(command)
        try:
            return await asyncio.wait_for(self._client.execute(command.name, dict(command.arguments)), limit)
        except ExecuteError as exc:
            about = _about(command.arguments)
            raise CommandFailed(command=command.name, about=about, said=str(exc).rstrip(".")) from exc
        except asyncio.TimeoutError as exc:
            raise CommandTimedOut(command=command.name, timeout=limit) from exc
        except (ExecInterruptedError, QMPError, EOFError, OSError) as exc:
            raise VmGone(socket=self.path, doing=f"asked for {command.name}") from exc

    async def ask(self, *queries: str | Command) -> list[t.Any]:
        """Send queries at once and return their answers in order: one round trip, hardly a moment between them."""
        commands = (query if isinstance(query, Command) else Command(query, {}) for query in queries)
        return list(await asyncio.gather(*(self.execute(command) for command in commands)))

    @property
    def version(self) -> t.Mapping[str, t.Any]:
        """What QEMU said of itself in its greeting (QAPI: VersionInfo)."""
        greeting = self._client.greeting
        return greeting.QMP.version if greeting is not None else {}

    async def pass_file(self, fd: int, label: str) -> int:
        """Hand an open file to QEMU and return its set: QEMU may open it there as ``/dev/fdset/SET``.

        So QEMU needs no permission on the path. Send remove-fd once it has opened it: QEMU drops a set by itself only
        when no monitor is connected at all ('add-fd' in the QAPI reference), and would keep the file open, even a
        removed one, as long as another tool stays connected. ``label`` is how a later run recognises the set.
        """
        if self.read_only:
            raise CheckModeViolation(command="add-fd")
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as exc:
            raise VmGone(socket=self.path, doing="being passed a file") from exc
        answer = await self.command("add-fd", opaque=label)
        return int(answer["fdset-id"])

    @contextmanager
    def events(self, *names: str) -> t.Iterator[EventListener]:
        """Listen to events of these names. Enter it *before* the command that causes them."""
        listener = EventListener(names)
        with self._client.listen(listener):
            yield listener

    @property
    def connected(self) -> bool:
        return self._client.runstate.name == "RUNNING"


async def _connect(path: str, timeout: float, deadline: float) -> socket.socket:
    try:
        return await connect_unix(path, deadline)
    except TimeoutError as exc:
        raise SocketBusy(socket=path, timeout=timeout, pid=-1) from exc
    except NotASocket as exc:
        raise NotQmp(socket=path, reason="it is not a socket") from exc
    except OSError as exc:
        raise _connect_error(path, exc) from exc


def _connect_error(path: str, exc: OSError) -> Exception:
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    if exc.errno in (errno.ENOENT, errno.ENOTDIR):
        return SocketMissing(socket=path)
    if exc.errno in (errno.EACCES, errno.EPERM):
        return SocketForbidden(socket=path, uid=os.geteuid(), reason=reason)
    return SocketDead(socket=path, reason=reason)


def _about(arguments: t.Mapping[str, t.Any]) -> str:
    """Which object a command was about, for the error message."""
    for key in ("device", "node-name", "job-id", "id", "name", "node"):
        if isinstance(arguments.get(key), str):
            return f" for {arguments[key]}"
    return ""


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip() or type(exc).__name__
    return text.splitlines()[0]
