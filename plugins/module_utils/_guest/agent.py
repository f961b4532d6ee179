# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The QEMU guest agent: one connection, resynchronised first, a deadline on every call (docs/interop/qemu-ga-ref)."""

from __future__ import annotations

import asyncio
import json
import os
import time
import typing as t

from .._errors import BlockOpsError
from .._unix import connect_unix

_SENTINEL = b"\xff"
_LIMIT = 1 << 20


class AgentUnusable(BlockOpsError):
    """The agent is absent, hangs, or answers what is not an answer. ``reason`` says which."""

    template = "The guest agent on {socket} {reason}."


class AgentRefused(BlockOpsError):
    """The agent answered with an error of its own."""

    template = "The guest agent refused {command}: {said}."


class Agent:
    """A synchronised connection to the agent of one guest."""

    def __init__(self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout: float) -> None:
        self._path = path
        self._reader = reader
        self._writer = writer
        self._timeout = timeout

    @classmethod
    async def open(cls, path: str, timeout: float) -> Agent:
        """Connect and resynchronise within ``timeout`` seconds. Raises AgentUnusable."""
        try:
            sock = await connect_unix(path, time.monotonic() + timeout)
            reader, writer = await asyncio.open_connection(sock=sock, limit=_LIMIT)
        except TimeoutError as exc:
            raise AgentUnusable(socket=path, reason="is busy with another client") from exc
        except OSError as exc:
            raise AgentUnusable(socket=path, reason=f"cannot be reached: {exc.strerror or exc}") from exc
        agent = cls(path, reader, writer, timeout)
        try:
            await agent._synchronise()
        except BaseException:
            agent.close()
            raise
        return agent

    def close(self) -> None:
        self._writer.close()

    async def call(self, command: str, timeout: float | None = None, **arguments: t.Any) -> t.Any:
        """The agent's return value. Raises AgentRefused, or AgentUnusable when there is no (valid) answer in time."""
        message = json.dumps({"execute": command, "arguments": arguments} if arguments else {"execute": command})
        answer = await self._within(self._exchange(message.encode() + b"\n"), command, timeout or self._timeout)
        if "error" in answer:
            raise AgentRefused(command=command, said=str(answer["error"].get("desc", answer["error"])))
        return answer["return"]

    async def _synchronise(self) -> None:
        """Throw away what an earlier client left unread: the answer after the sentinel is ours."""
        token = int.from_bytes(os.urandom(4), "big") >> 1
        message = json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": token}}).encode()
        await self._within(self._find(_SENTINEL + message + b"\n", token), "guest-sync-delimited", self._timeout)

    async def _find(self, message: bytes, token: int) -> dict[str, t.Any]:
        self._writer.write(message)
        await self._writer.drain()
        while True:
            await self._reader.readuntil(_SENTINEL)
            answer = self._parse(await self._reader.readline())
            if answer.get("return") == token:
                return answer

    async def _exchange(self, message: bytes) -> dict[str, t.Any]:
        self._writer.write(message)
        await self._writer.drain()
        answer = self._parse(await self._reader.readline())
        # The guest may say anything: an error that is none must not become a bug of ours.
        if not isinstance(answer.get("error", {}), dict) or not ("error" in answer or "return" in answer):
            raise AgentUnusable(socket=self._path, reason="answered neither a result nor an error")
        return answer

    async def _within(self, waiting: t.Awaitable[dict[str, t.Any]], command: str, timeout: float) -> dict[str, t.Any]:
        try:
            return await asyncio.wait_for(waiting, timeout)
        except asyncio.TimeoutError as exc:
            reason = f"did not answer {command} within {timeout:g} s"
            raise AgentUnusable(socket=self._path, reason=reason) from exc
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, OSError) as exc:
            raise AgentUnusable(socket=self._path, reason=f"answered {command} with garbage, or hung up") from exc

    def _parse(self, line: bytes) -> dict[str, t.Any]:
        try:
            answer = json.loads(line.lstrip(_SENTINEL))
        except RecursionError as exc:
            raise ValueError("nested too deeply") from exc
        if not isinstance(answer, dict):
            raise ValueError("not an object")
        return answer
