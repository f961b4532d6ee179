# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest agent that misbehaves to order, on a socket of its own.

``answers`` maps a command to what becomes of it: a value (its ``return``), an ``Error`` (refused), ``HANG`` (never
answered), ``CLOSE`` (hangs up), or ``bytes`` (sent as they are). Like QEMU's channel it serves one client at a time.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

FREEZE, THAW, SYNC = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-sync-delimited"
HANG, CLOSE = object(), object()


@dataclass(frozen=True)
class Error:
    """The agent refuses."""

    text: str


class FakeAgent:
    """Context manager. ``calls``: (command, time.monotonic()) of all that was asked, sync apart."""

    def __init__(self, path: Path, answers: t.Mapping[str, t.Any] | None = None) -> None:
        self.path = path
        self.calls: list[tuple[str, float]] = []
        self.frozen = False
        self._answers = {FREEZE: 2, THAW: 2, **(answers or {})}
        self._news = threading.Condition()
        self._listener = socket.socket(socket.AF_UNIX)
        self._client: socket.socket | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FakeAgent:
        self._listener.bind(str(self.path))
        self.path.chmod(0o666)
        self._listener.listen(1)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._ended = True
        for sock in (self._listener, self._client):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def asked(self, command: str) -> list[float]:
        return [when for name, when in self.calls if name == command]

    def wait_for(self, command: str, timeout: float = 20) -> None:
        """Until ``command`` was asked for."""
        deadline = time.monotonic() + timeout
        with self._news:
            while not self.asked(command):
                if not self._news.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"{command} was never sent; only {self.calls}")

    def _serve(self) -> None:
        while not self._ended:
            try:
                self._client, _address = self._listener.accept()
            except OSError:
                return
            with self._client as client, client.makefile("rb") as lines:
                try:
                    for line in lines:
                        if not self._answer(client, json.loads(line.strip(b"\xff \n"))):
                            break
                except OSError:
                    continue

    def _answer(self, client: socket.socket, message: dict[str, t.Any]) -> bool:
        command = message["execute"]
        default = message.get("arguments", {}).get("id")
        answer = self._answers.get(command, default)
        if command != SYNC:
            with self._news:
                self.calls.append((command, time.monotonic()))
                self.frozen = command == FREEZE or (self.frozen and command != THAW)
                self._news.notify_all()
        if answer is CLOSE:
            return False
        if isinstance(answer, bytes):
            client.sendall(answer)
        elif answer is not HANG:
            reply = {"error": {"class": "GenericError", "desc": answer.text}} if isinstance(answer, Error) else None
            prefix = b"\xff" if command == SYNC else b""
            client.sendall(prefix + json.dumps(reply or {"return": answer}).encode() + b"\n")
        return True
