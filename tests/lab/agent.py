# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""A tiny blocking client of the QEMU guest agent, standard library only."""

from __future__ import annotations

import base64
import json
import random
import time
from pathlib import Path
from typing import Any

from lab.qmp import JsonLines, QmpError, connect

_DELIMITER = b"\xff"


class Agent:
    """One synchronised agent connection. The agent serves one client at a time, so close it soon."""

    def __init__(self, path: str | Path, timeout: float = 30.0) -> None:
        """Connect and synchronise; TimeoutError when nobody answers within ``timeout`` seconds."""
        self.timeout = timeout
        self._lines = JsonLines(connect(path, time.monotonic() + timeout))
        try:
            self._synchronise(time.monotonic() + timeout)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the channel to the next client."""
        self._lines.close()

    def _synchronise(self, deadline: float) -> None:
        """guest-sync-delimited: skip whatever an earlier client left in the channel."""
        token = random.getrandbits(31)
        self._lines.send({"execute": "guest-sync-delimited", "arguments": {"id": token}}, prefix=_DELIMITER)
        while True:
            line = self._lines.receive_line(deadline)
            if _DELIMITER in line and json.loads(line.rsplit(_DELIMITER, 1)[1]).get("return") == token:
                return

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run one agent command and return its ``return`` member."""
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        self._lines.send(message)
        reply = json.loads(self._lines.receive_line(time.monotonic() + self.timeout))
        if "error" in reply:
            raise QmpError(command, reply["error"])
        return reply["return"]

    def command(self, name: str, /, **arguments: Any) -> Any:
        """Like ``execute`` with Python keywords: ``capture_output=`` is sent as ``capture-output``."""
        return self.execute(name, {key.replace("_", "-"): value for key, value in arguments.items()})

    def send_only(self, command: str, arguments: dict[str, Any] | None = None) -> None:
        """For commands that answer with silence on success, like guest-shutdown."""
        self._lines.send({"execute": command, "arguments": arguments or {}})

    def run(self, argv: list[str], stdin: bytes | None = None) -> tuple[int, bytes, bytes]:
        """Run a program in the guest; (exit code, stdout, stderr)."""
        arguments: dict[str, Any] = {"path": argv[0], "arg": argv[1:], "capture-output": True}
        if stdin is not None:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        pid = self.execute("guest-exec", arguments)["pid"]
        deadline = time.monotonic() + self.timeout
        pause = 0.005
        while True:
            status = self.execute("guest-exec-status", {"pid": pid})
            if status["exited"]:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"still running in the guest: {argv}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        out, err = (base64.b64decode(status.get(key, "")) for key in ("out-data", "err-data"))
        return int(status.get("exitcode", 128 + status.get("signal", 0))), out, err
