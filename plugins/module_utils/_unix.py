# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Connecting to a UNIX socket of QEMU, which serves one client at a time."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time

_RETRY = 0.05


class NotASocket(OSError):
    """The path is something else."""


class Claim:
    """A claim on one thing of this host that ends with the process, however that ends. ``close()`` gives it back.

    An abstract UNIX socket address: the kernel lets one process have it, and leaves no file behind.
    """

    def __init__(self, name: str) -> None:
        """:raise OSError: another process has it (EADDRINUSE)."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(f"\0blockops.qemu/{name}")
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()


def is_claimed(name: str) -> bool:
    """Whether a process has this claim now. Only a look: whoever wants to claim it is not disturbed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(f"\0blockops.qemu/{name}")
        except OSError:
            return False
    return True


async def connect_unix(path: str, deadline: float) -> socket.socket:
    """A connected, non-blocking UNIX socket. Raises TimeoutError at ``deadline`` (time.monotonic), else OSError.

    connect() itself says EAGAIN when the backlog of the listener is full, which QEMU's (length 1) is as soon as two
    clients wait; asyncio would take that for "in progress" and call it connected.
    """
    while True:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise NotASocket(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(path)
            return sock
        except BlockingIOError as exc:
            sock.close()
            if time.monotonic() > deadline:
                raise TimeoutError(path) from exc
        except OSError:
            sock.close()
            raise
        await asyncio.sleep(_RETRY)
