# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""The lab's last line of clean-up: a process of its own that outlives a killed test run for a moment.

It reads JSON lines ``[action, token, remove]`` from stdin. End of input means that the parent is gone, however it went
(SIGKILL included): every process that carries a guarded token in its command line is killed, and guarded directories
are removed. Tokens are unique temporary paths, so nothing else can match. PR_SET_PDEATHSIG would not do: it does not
survive QEMU's ``-daemonize``, and it fires when the starting *thread* ends.
Run by path with any python3: standard library only, no imports from the lab.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress


def processes_with(token: str) -> list[int]:
    """Pids whose command line holds ``token``, the caller excluded."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as cmdline:
            if os.fsencode(token) in cmdline.read():
                found.append(int(entry))
    return found


def kill_processes_with(token: str, deadline: float = 10.0) -> list[int]:
    """SIGKILL until no process with ``token`` is left (zombies have an empty command line). Returns the pids killed."""
    killed: set[int] = set()
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        pids = processes_with(token)
        if not pids:
            break
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(0.005)
    return sorted(killed)


def main() -> None:
    """Collect tokens until the parent is gone, then clean up in the order of registration."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    guarded: dict[str, bool] = {}
    for line in sys.stdin:
        action, token, remove = json.loads(line)
        if action == "guard":
            guarded[token] = remove
        else:
            guarded.pop(token, None)
    for token in guarded:
        kill_processes_with(token)
    for token, remove in guarded.items():
        if remove:
            shutil.rmtree(token, ignore_errors=True)


if __name__ == "__main__":
    main()
