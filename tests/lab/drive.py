# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""How a drive appears on QEMU's command line: the variety that administrators really use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

_CONTROLLERS = {"scsi": "virtio-scsi-pci,id=lab-scsi", "usb-storage": "qemu-xhci,id=lab-xhci"}
_NO_SHARE_RW = ("ide-cd", "scsi-cd", "floppy")


@dataclass(frozen=True)
class Drive:
    """One drive of the guest.

    ``device``: a QEMU device name (virtio-blk-pci, scsi-hd, ide-hd, ide-cd, scsi-cd, nvme, usb-storage), or
    ``pflash0``/``pflash1`` for the firmware pair.
    ``style``: ``blockdev`` (-blockdev + -device), ``drive`` (-drive if=none + -device), ``legacy`` (-drive if=virtio
    or if=ide, the device has no id; its block backend is called ``id``).
    ``image=None``: an empty removable drive. A ``json:`` or ``nbd://`` file name goes through ``style="drive"``.
    ``options``/``file_options``/``device_options``: merged into the format node, the protocol node, the device.
    ``throttle_bps``: bytes per second of a throttle node above the format node (blockdev style).
    """

    id: str
    image: str | Path | None
    fmt: str = "qcow2"
    device: str = "virtio-blk-pci"
    style: Literal["blockdev", "drive", "legacy"] = "blockdev"
    readonly: bool = False
    removable: bool = False
    share_rw: bool = True
    node_name: str | None = None
    serial: str | None = None
    throttle_bps: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    file_options: Mapping[str, Any] = field(default_factory=dict)
    device_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def node(self) -> str:
        """The name of the node that the device is attached to (blockdev style)."""
        return self.node_name or f"{self.id}-node"

    @property
    def backend(self) -> str:
        """The name of the block backend (query-block's ``device``) of the two -drive styles."""
        return self.id if self.style == "legacy" else f"drive-{self.id}"

    @property
    def is_firmware(self) -> bool:
        """pflash is a property of the machine, not a device."""
        return self.device.startswith("pflash")

    @property
    def is_cdrom(self) -> bool:
        """CD drives may be empty and are read-only."""
        return self.device.endswith("-cd")

    @property
    def controller(self) -> str | None:
        """The -device argument of the controller that the drive needs."""
        return next((argument for prefix, argument in _CONTROLLERS.items() if self.device.startswith(prefix)), None)

    def arguments(self) -> list[str]:
        """The drive's part of the command line, without controller and firmware wiring."""
        return {"blockdev": self._as_blockdev, "drive": self._as_drive, "legacy": self._as_legacy}[self.style]()

    def _as_blockdev(self) -> list[str]:
        if self.image is None:
            return ["-device", self._device(None)]
        read_only = self.readonly or self.is_cdrom
        protocol = {"driver": "file", "filename": str(self.image), **self.file_options}
        node: dict[str, Any] = {"driver": self.fmt, "read-only": read_only, "file": protocol, **self.options}
        head = []
        if self.throttle_bps is not None:
            head = ["-object", f"throttle-group,id=tg-{self.id},x-bps-total={self.throttle_bps}"]
            node = {"driver": "throttle", "throttle-group": f"tg-{self.id}", "read-only": read_only, "file": node}
        node["node-name"] = self.node
        wiring = [] if self.is_firmware else ["-device", self._device(self.node)]
        return [*head, "-blockdev", json.dumps(node), *wiring]

    def _drive_options(self) -> str:
        text = f",id={self.backend}"
        if self.image is not None:
            text += f",file={_escape(self.image)},format={self.fmt}"
        if self.readonly and self.image is not None:
            text += ",readonly=on"
        if self.is_cdrom:
            text += ",media=cdrom"
        if self.node_name is not None:
            text += f",node-name={self.node_name}"
        if self.throttle_bps is not None:
            text += f",throttling.bps-total={self.throttle_bps}"
        return text + "".join(f",{key}={_escape(value)}" for key, value in self.options.items())

    def _as_drive(self) -> list[str]:
        return ["-drive", f"if=none{self._drive_options()}", "-device", self._device(self.backend)]

    def _as_legacy(self) -> list[str]:
        interface = re.split(r"[-_]", self.device)[0]
        return ["-drive", f"if={interface}{self._drive_options()}"]

    def _device(self, backend: str | None) -> str:
        text = f"{self.device},id={self.id}"
        if backend is not None:
            text += f",drive={backend}"
        if self.share_rw and self.device not in _NO_SHARE_RW:
            text += ",share-rw=on"
        serial = self.serial or (self.id if self.device == "nvme" else None)
        if serial is not None:
            text += f",serial={serial}"
        if self.removable and self.device == "usb-storage":
            text += ",removable=on"
        return text + "".join(f",{key}={_escape(value)}" for key, value in self.device_options.items())


def _escape(value: object) -> str:
    """QEMU's option syntax: a comma in a value is doubled; booleans are on/off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")
