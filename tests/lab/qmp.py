# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""A tiny blocking QMP client, standard library only: the oracle must not share code with the product it judges."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any


class QmpError(Exception):
    """QEMU refused a command."""

    def __init__(self, command: str, error: dict[str, Any]) -> None:
        self.command = command
        self.error_class = str(error.get("class"))
        self.description = str(error.get("desc"))
        super().__init__(f"{command}: {self.error_class}: {self.description}")


def connect(path: str | Path, deadline: float) -> socket.socket:
    """Connect to a UNIX socket that may not exist yet; ``deadline`` is on the monotonic clock."""
    pause = 0.002
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)


class JsonLines:
    """JSON objects over a stream socket, one per line, with a deadline for every read."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._buffer = b""

    def send(self, message: dict[str, Any], prefix: bytes = b"") -> None:
        """Write one object; ``prefix`` is for the agent's 0xFF delimiter."""
        self.connection.sendall(prefix + json.dumps(message).encode() + b"\n")

    def receive_line(self, deadline: float) -> bytes:
        """The next line, or TimeoutError, or EOFError when the peer is gone."""
        while b"\n" not in self._buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("no answer in time")
            self.connection.settimeout(remaining)
            chunk = self.connection.recv(65536)
            if not chunk:
                raise EOFError("connection closed by peer")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def close(self) -> None:
        """Close the socket; harmless when repeated."""
        self.connection.close()


class Qmp:
    """One QMP connection. Events that arrive in between are kept until somebody waits for them."""

    def __init__(self, path: str | Path, timeout: float = 60.0) -> None:
        """Connect and negotiate. ``timeout`` (seconds) also becomes the default for commands and events."""
        self.timeout = timeout
        self.events: list[dict[str, Any]] = []
        deadline = time.monotonic() + timeout
        self._lines = JsonLines(connect(path, deadline))
        try:
            self.greeting: dict[str, Any] = json.loads(self._lines.receive_line(deadline))
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the monitor to the next client."""
        self._lines.close()

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command with arguments exactly as QEMU spells them; returns its ``return`` member."""
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        self._lines.send(message)
        deadline = time.monotonic() + self.timeout
        while True:
            reply = json.loads(self._lines.receive_line(deadline))
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise QmpError(command, reply["error"])
            else:
                return reply["return"]

    def command(self, name: str, /, **arguments: Any) -> Any:
        """Like ``execute`` with Python keywords: ``node_name=`` is sent as ``node-name``."""
        return self.execute(name, {key.replace("_", "-"): value for key, value in arguments.items()})

    def hmp(self, line: str) -> str:
        """A line for the human monitor; the answer is text, errors too."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def wait_event(self, name: str, timeout: float | None = None, **data: Any) -> dict[str, Any]:
        """The next event ``name`` whose data contain ``data`` (keywords as in ``command``); taken off the list."""
        wanted = {key.replace("_", "-"): value for key, value in data.items()}
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        seen = 0
        while True:
            for index, event in enumerate(self.events[seen:], start=seen):
                if event["event"] == name and wanted.items() <= event.get("data", {}).items():
                    return self.events.pop(index)
            seen = len(self.events)
            reply = json.loads(self._lines.receive_line(deadline))
            if "event" in reply:
                self.events.append(reply)
