# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""A paused QEMU without a guest: 0.1 s to start, real block layer, real QMP."""

from __future__ import annotations

import os
import re
import uuid as uuids
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.drive import Drive
from lab.process import LabError, MonitoredProcess

__all__ = ["Drive", "LabError", "Qemu"]


def system_binary() -> str:
    """``$BLOCKOPS_QEMU`` or the QEMU in PATH."""
    return os.environ.get("BLOCKOPS_QEMU") or "qemu-system-x86_64"


class Qemu(MonitoredProcess):
    """Context manager around one ``qemu-system-x86_64 -S``.

    ``user``: uid (and gid) to run as, for tests of permissions; needs root. Its sockets then are in ``NAME.run``, and
    the writable images of its drives are handed to that user.
    """

    def __init__(
        self,
        name: str,
        drives: Sequence[Drive],
        directory: str | Path,
        uuid: str | None = None,
        extra_args: Sequence[str] = (),
        binary: str | None = None,
        user: int | None = None,
        second_monitor: bool = True,
        agent: bool = False,
        paused: bool = True,
        memory: int = 64,
        timeout: float = 30.0,
    ) -> None:
        """``memory`` in MiB; ``second_monitor=False``: one monitor in all; ``detach`` after each use of it."""
        super().__init__(name, Path(directory), user=user, timeout=timeout)
        self.drives = {drive.id: drive for drive in drives}
        self.uuid = uuid or str(uuids.uuid4())
        self.extra_args = list(extra_args)
        self.binary = binary or system_binary()
        self.agent_socket = self.run_directory / f"{name}.qga" if agent else None
        self.paused = paused
        self.memory = memory
        if not second_monitor:
            self.control_socket = self.socket

    def argv(self) -> list[str]:
        """The complete command line."""
        machine = "pc" + "".join(f",{drive.device}={drive.node}" for drive in self.drives.values() if drive.is_firmware)
        line = [self.binary, "-accel", "tcg", "-M", machine, "-m", str(self.memory), "-nodefaults", "-display", "none"]
        line += ["-name", self.name, "-uuid", self.uuid, *(["-S"] if self.paused else [])]
        for number, path in enumerate(dict.fromkeys((self.socket, self.control_socket))):
            line += ["-chardev", f"socket,id=lab-mon{number},path={path},server=on,wait=off"]
            line += ["-mon", f"chardev=lab-mon{number},mode=control"]
        if self.agent_socket is not None:
            line += ["-chardev", f"socket,id=lab-qga,path={self.agent_socket},server=on,wait=off"]
            line += ["-device", "virtio-serial-pci"]
            line += ["-device", "virtserialport,chardev=lab-qga,name=org.qemu.guest_agent.0"]
        for controller in dict.fromkeys(drive.controller for drive in self.drives.values()):
            line += ["-device", controller] if controller else []
        for drive in self.drives.values():
            line += drive.arguments()
        return line + self.extra_args

    def start(self) -> None:
        """Start; with ``user`` the images are handed over first."""
        if self.user is not None:
            for drive in self.drives.values():
                if drive.image is not None and not drive.readonly and os.path.exists(drive.image):
                    os.chown(drive.image, self.user, self.user)
        super().start()
        if self.control_socket == self.socket:
            self.detach()  # the only monitor: leave it to the module under test

    def hmp(self, line: str) -> str:
        """A human monitor command; errors come back as text."""
        return self.control.hmp(line)

    def qemu_io(self, drive_id: str, command: str) -> str:
        """Run a qemu-io command on a drive as its device would (no permission conflict); returns what it printed.

        The monitor answers "" *even when the I/O fails*: QEMU prints "write failed: Input/output error" to its own
        stdout instead. So the log is what counts. The path of the device comes from QEMU, because some devices
        (virtio-*-pci, usb-storage) hand their drive to a child.
        """
        before = self.log.stat().st_size
        answer = self.hmp(f'qemu-io -d {self.block(drive_id)["qdev"]} "{command}"')
        if answer.strip():
            raise LabError(f"qemu-io {drive_id} {command}: {answer.strip()}")
        with self.log.open("rb") as log:
            log.seek(before)
            return log.read().decode(errors="replace")

    def write(self, drive_id: str, offset: int, length: int, pattern: int) -> None:
        """Write ``length`` bytes of ``pattern`` at ``offset`` as the guest would. LabError when not all was written."""
        printed = self.qemu_io(drive_id, f"write -P {pattern} {offset} {length}")
        if not re.search(rf"wrote {length}/{length} bytes at offset {offset}\b", printed):
            raise LabError(f"write to {drive_id} failed: {printed.strip()}")

    def holds(self, drive_id: str, offset: int, length: int, pattern: int) -> bool:
        """Does the guest see ``pattern`` in this range?"""
        printed = self.qemu_io(drive_id, f"read -P {pattern} {offset} {length}")
        if not re.search(rf"read {length}/{length} bytes at offset {offset}\b", printed):
            raise LabError(f"read of {drive_id} failed: {printed.strip()}")
        return "Pattern verification failed" not in printed

    def flush(self, drive_id: str | None = None) -> None:
        """Flush one drive or all that hold an image, so that qemu-img sees what was written."""
        chosen = [self.drives[drive_id]] if drive_id else [d for d in self.drives.values() if not d.is_firmware]
        for drive in chosen:
            if drive.image is not None:
                self.qemu_io(drive.id, "flush")

    def block(self, drive_id: str) -> dict[str, Any]:
        """The drive's entry of query-block, whichever style it was made in."""
        for entry in self.command("query-block"):
            path = str(entry.get("qdev", "")).removeprefix("/machine/peripheral/").split("/", 1)[0]
            if drive_id in (path, entry.get("device")):
                return dict(entry)
        raise LabError(f"{self.name} has no drive {drive_id}")

    def active_node(self, drive_id: str) -> str:
        """The node that the drive's device is attached to right now."""
        return str(self.block(drive_id)["inserted"]["node-name"])

    def bitmaps(self, drive_id: str) -> dict[str, dict[str, Any]]:
        """Named bitmaps on the drive's active image, by name (below a throttle or filter node as well)."""
        inserted = self.block(drive_id)["inserted"]
        found = list(inserted.get("dirty-bitmaps", []))
        if not found and inserted.get("drv") not in ("qcow2", "raw"):
            image = inserted["image"]["filename"]
            for node in self.nodes().values():
                if node["drv"] == "qcow2" and node["image"]["filename"] == image:
                    found += node.get("dirty-bitmaps", [])
        return {str(bitmap["name"]): bitmap for bitmap in found if "name" in bitmap}
