# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Programs of a drill: the QEMU that boots a restored point, and the user's own check of it.

The only starter of programs other than qemu-img. Programs run in the drill's directory, with its variable in their
environment, in a session of their own. Nothing here waits longer than the caller lets it: cancel to give up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import typing as t
from dataclasses import dataclass

from .._errors import BlockOpsError
from .room import Room

_LONGEST = 4000  # characters of what a program said that are worth showing
_ASK = b'{"execute":"qmp_capabilities"}\n{"execute":"query-status"}\n'
_POLL, _ANSWER = 0.05, 5.0


class ProgramMissing(BlockOpsError):
    template = "{program} cannot be started on this host: {reason}."
    advice = "Install it, or name another one in the option drill."


@dataclass(frozen=True)
class Program:
    """A started program, whose output goes to the file ``log`` in the drill's directory."""

    process: asyncio.subprocess.Process
    log: str

    async def ended(self) -> int:
        """Its exit status, when it has one; negative: the signal that ended it."""
        return await self.process.wait()

    async def kill(self) -> None:
        """End it, and whatever it started in its session, now. What outlives that is ended with the room."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()

    def said(self) -> str:
        """The end of its output."""
        return tail(self.log)


async def start(room: Room, argv: t.Sequence[str], log: str, environment: t.Mapping[str, str] | None = None) -> Program:
    """Start ``argv`` in the drill's directory. :raise ProgramMissing: there is no such program."""
    path = room.path(log)
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=room.directory,
            env={**os.environ, "LC_ALL": "C", **(environment or {}), **room.environment()},
            start_new_session=True,
        )
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise ProgramMissing(program=argv[0], reason=reason) from exc
    finally:
        os.close(out)
    return Program(process, path)


async def running(qmp_socket: str) -> None:
    """Come back when QEMU says that its guest runs: by then it has opened its images and made its devices.

    Not a session: it needs no package of Python on this host, and leaves the socket to the user's check.
    """
    while not await _says_running(qmp_socket):
        await asyncio.sleep(_POLL)


async def _says_running(path: str) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False  # not there yet
    try:
        writer.write(_ASK)
        while True:
            answer = json.loads(await asyncio.wait_for(reader.readline(), _ANSWER))
            status = answer.get("return", {}).get("status")
            if status is not None:
                return bool(status == "running")
    except (OSError, ValueError, asyncio.TimeoutError):
        return False  # it ended while it was asked, which others notice
    finally:
        writer.close()


def tail(path: str) -> str:
    """The last characters of a text file; what does not print becomes a space, but for the ends of lines."""
    try:
        with open(path, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _LONGEST))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text.replace("\r", "")).strip()
