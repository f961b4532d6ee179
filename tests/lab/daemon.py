# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""qemu-storage-daemon: QMP and the block layer without a machine, 0.03 s to start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.process import MonitoredProcess


def daemon_binary() -> str:
    """The storage daemon next to ``$BLOCKOPS_QEMU``, else the one in PATH."""
    chosen = os.environ.get("BLOCKOPS_QEMU")
    if chosen and (Path(chosen).parent / "qemu-storage-daemon").exists():
        return str(Path(chosen).parent / "qemu-storage-daemon")
    return "qemu-storage-daemon"


class StorageDaemon(MonitoredProcess):
    """Context manager around one qemu-storage-daemon. ``blockdevs`` are blockdev-add arguments opened at start."""

    def __init__(
        self,
        name: str,
        directory: str | Path,
        blockdevs: Sequence[Mapping[str, Any]] = (),
        extra_args: Sequence[str] = (),
        binary: str | None = None,
        user: int | None = None,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(name, Path(directory), user=user, timeout=timeout)
        self.blockdevs = [dict(options) for options in blockdevs]
        self.extra_args = list(extra_args)
        self.binary = binary or daemon_binary()

    def argv(self) -> list[str]:
        """The complete command line."""
        line = [self.binary]
        for number, path in enumerate((self.socket, self.control_socket)):
            line += ["--chardev", f"socket,id=lab-mon{number},path={path},server=on,wait=off"]
            line += ["--monitor", f"chardev=lab-mon{number},mode=control"]
        for options in self.blockdevs:
            line += ["--blockdev", json.dumps(options)]
        return line + self.extra_args
