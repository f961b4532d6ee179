# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The command line of a drill's QEMU. Pure.

What would connect it with anything outside of its directory is refused: networks, sockets, monitors, the host's
devices, files it could write to. What is appended comes last, because of repeated options QEMU takes the last one; but
not so for networks (measured with 7.2: ``-nic none`` after ``-nic user`` leaves the first one), hence the refusal.
"""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass

from .._block.startup import option_pairs
from .._errors import DriveUnknown, InputInvalid

AGENT_PORT = "org.qemu.guest_agent.0"
AGENT, CONSOLE, QMP = "agent", "console", "qmp"
INTERFACES = ("virtio-blk", "virtio-scsi", "sata", "ide", "nvme")
_PORTS = 6  # of an AHCI controller

_PLACEHOLDER = re.compile(r"\{(?:drive:(?P<drive>[^{}]+)|(?P<directory>directory))\}")
_NETWORKS = frozenset({"net", "nic"})
_REFUSED = frozenset(
    {
        "add-fd", "chardev", "chroot", "daemonize", "debugcon", "fsdev", "gdb", "incoming", "loadvm", "mon", "monitor",
        "netdev", "parallel", "pidfile", "qmp", "qmp-pretty", "qtest", "readconfig", "s", "S", "serial", "set", "spice",
        "tpmdev", "virtfs", "vnc", "writeconfig", "xen-attach", "xen-domid",
    }
)  # fmt: skip
_HOST_DEVICES = ("vfio", "usb-host", "vhost", "ivshmem", "u2f", "ccid", "scsi-block", "scsi-generic", "ipmi-bmc-extern")
_DISKS = frozenset({"drive", "blockdev", "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "pflash", "mtdblock"})
_READ_ONLY = re.compile(r"(?:^|,)(?:readonly|read-only)(?:=on)?(?:,|$)|media=cdrom|\"read-only\"\s*:\s*true")
_NAMES_SOMETHING = re.compile(r"/|file(?:name)?=(?!\w+(?:,|$))|nbd|rbd|iscsi|ssh|nfs|gluster|http|host_")


@dataclass(frozen=True)
class Machine:
    """What boots. ``command``: the user's whole command line; without it, one is made of the rest. Memory in bytes."""

    qemu: str = "qemu-system-x86_64"
    machine: str = "q35"
    accel: str = "kvm:tcg"
    cpu: str | None = None
    cpus: int = 1
    memory: int = 1 << 30
    interface: str = "virtio-blk"
    arguments: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Overlay:
    """A throw-away image on the backup of a drive."""

    drive: str
    path: str
    serial: str | None = None


def check_machine(machine: Machine) -> None:
    """:raise InputInvalid: the drill would reach something outside, or would not boot from the backup."""
    given = machine.command or (machine.qemu, *machine.arguments)
    for option, value in option_pairs(given):
        wrong = _wrong(option, value)
        if wrong is not None:
            raise InputInvalid(message=f"-{option} {value} cannot be used in a drill: {wrong}.")
    if any(AGENT_PORT in argument for argument in given):
        raise InputInvalid(message="The drill adds the channel of the guest agent itself: leave yours out.")
    if machine.command and not any("{drive:" in argument for argument in machine.command):
        raise InputInvalid(message="drill.command does not boot from the backup: no argument has {drive:NAME} in it.")


def _wrong(option: str, value: str) -> str | None:
    if option in _NETWORKS and value != "none":
        return "a restored VM must not be on a network with the one that it is a copy of"
    if option in _REFUSED:
        return "it would connect the drill with something outside, or keep it from being watched"
    if (option == "device" and value.lstrip('{" ').startswith(_HOST_DEVICES)) or '"driver":"vfio' in value:
        return f"{value} is a device of the host"
    harmless = "{drive:" in value or "{directory}" in value or _READ_ONLY.search(value)
    if option in _DISKS and _NAMES_SOMETHING.search(value) and not harmless:
        return f"{value} is neither a {{drive:NAME}} nor read-only, so the guest could change it"
    return None


def command_line(machine: Machine, overlays: t.Sequence[Overlay], directory: str, name: str, uuid: str) -> list[str]:
    """Program and arguments. ``directory`` is the drill's own, without commas in its path.

    :raise DriveUnknown: a placeholder names a drive that the backup does not have.
    """
    own = _own(directory, name, uuid)
    if machine.command:
        return [*(_filled(argument, overlays, directory, name) for argument in machine.command), *own]
    line = [machine.qemu, "-nodefaults", "-no-user-config", "-machine", f"{machine.machine},accel={machine.accel}"]
    line += ["-m", f"{max(machine.memory >> 20, 1)}M", "-smp", str(machine.cpus)]
    line += [] if machine.cpu is None else ["-cpu", machine.cpu]
    line += _controllers(machine.interface, len(overlays))
    for number, overlay in enumerate(overlays):
        line += _drive(machine.interface, number, overlay)
    return [*line, *(_filled(argument, overlays, directory, name) for argument in machine.arguments), *own]


def _own(directory: str, name: str, uuid: str) -> list[str]:
    """Identity, isolation, and the ways to watch it: console, agent, QMP."""
    line = ["-name", name, "-uuid", uuid, "-nic", "none", "-display", "none"]
    line += ["-chardev", f"file,id=blockops-console,path={directory}/{CONSOLE}", "-serial", "chardev:blockops-console"]
    for channel in (QMP, AGENT):
        line += ["-chardev", f"socket,id=blockops-{channel},path={directory}/{channel},server=on,wait=off"]
    line += ["-mon", "chardev=blockops-qmp,mode=control", "-device", "virtio-serial,id=blockops-serial"]
    return [*line, "-device", f"virtserialport,bus=blockops-serial.0,chardev=blockops-agent,name={AGENT_PORT}"]


def _controllers(interface: str, drives: int) -> list[str]:
    if interface == "virtio-scsi":
        return ["-device", "virtio-scsi,id=blockops-scsi"]
    wanted = range(0, drives, _PORTS) if interface == "sata" else ()
    return [word for first in wanted for word in ("-device", f"ahci,id=blockops-ahci{first // _PORTS}")]


def _drive(interface: str, number: int, overlay: Overlay) -> list[str]:
    """One drive, in the order of the manifest to boot from. Nothing is flushed: it is thrown away."""
    cache = {"no-flush": True}
    file = {"driver": "file", "filename": overlay.path, "cache": cache}
    node = {"driver": "qcow2", "node-name": f"blockops-{number}", "cache": cache, "discard": "unmap", "file": file}
    kinds = {"virtio-blk": "virtio-blk", "virtio-scsi": "scsi-hd", "sata": "ide-hd", "ide": "ide-hd", "nvme": "nvme"}
    device = {"driver": kinds[interface], "id": f"blockops-drive-{number}", "drive": f"blockops-{number}"}
    # Left alone, QEMU puts all of them on the first bus it finds, and refuses those that do not fit (7.2).
    if interface == "sata":
        device["bus"] = f"blockops-ahci{number // _PORTS}.{number % _PORTS}"
    elif interface == "ide":
        device.update(bus=f"ide.{number // 2}", unit=str(number % 2))
    serial = overlay.serial or (f"blockops-{number}" if interface == "nvme" else None)  # nvme insists on one
    text = ",".join(f"{key}={value}" for key, value in device.items()).replace("driver=", "", 1)
    # From 1: QEMU takes 0 for -kernel.
    text += f",bootindex={number + 1}" + ("" if serial is None else f",serial={serial.replace(',', ',,')}")
    return ["-blockdev", json.dumps(node), "-device", text]


def _filled(argument: str, overlays: t.Sequence[Overlay], directory: str, name: str) -> str:
    paths = {overlay.drive: overlay.path for overlay in overlays}

    def value(found: re.Match[str]) -> str:
        if found["directory"]:
            return directory
        if found["drive"] not in paths:
            raise DriveUnknown(vm=name, drive=found["drive"], known=", ".join(paths))
        return paths[found["drive"]]

    return _PLACEHOLDER.sub(value, argument)
