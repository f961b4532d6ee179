# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line of a drill: what is refused, and what is made."""

from __future__ import annotations

import json

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import DriveUnknown, InputInvalid
from ansible_collections.blockops.qemu.plugins.module_utils._ops.verify_command import (
    INTERFACES,
    Machine,
    Overlay,
    check_machine,
    command_line,
)

OVERLAYS = (Overlay("vda", "/room/0.qcow2", "S,1"), Overlay("data disk", "/room/1.qcow2"))
FINE = [
    ["-nic", "none"],
    ["-net", "none"],
    ["-kernel", "/boot/vmlinuz", "-append", "console=ttyS0"],
    ["-drive", "file={drive:vda},format=qcow2,if=virtio"],
    ["-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd"],
    ["-drive", "file=/iso/rescue.iso,media=cdrom"],
    ["-cdrom", "/iso/rescue.iso"],
    ["-blockdev", '{"driver":"file","filename":"/x","read-only": true,"node-name":"f"}'],
    ["-blockdev", "driver=file,filename={drive:vda},node-name=f"],
    ["-blockdev", "driver=qcow2,file=f,node-name=q"],
    ["-device", "virtio-blk-pci,drive=q"],
    ["-device", "virtio-net-pci"],
    ["-object", "rng-random,id=r,filename=/dev/urandom"],
]
REFUSED = [
    ["-nic", "user"],
    ["--nic", "bridge,br=br0"],
    ["-netdev", "tap,id=n0"],
    ["-net", "user"],
    ["-net"],
    ["-daemonize"],
    ["-pidfile", "/run/web.pid"],
    ["-qmp", "unix:/run/vms/web.qmp,server=on,wait=off"],
    ["-chardev", "socket,id=m,path=/run/vms/web.qmp,server=on"],
    ["-monitor", "stdio"],
    ["-serial", "tcp::4444,server"],
    ["-vnc", ":1"],
    ["-incoming", "tcp:0:4444"],
    ["-readconfig", "/etc/vm.cfg"],
    ["-S"],
    ["-hda", "/var/lib/vms/web.qcow2"],
    ["/var/lib/vms/web.qcow2"],
    ["-nodefaults", "../web.qcow2"],
    ["-drive", "file=/var/lib/vms/web.qcow2,if=virtio"],
    ["-drive", "file=web.qcow2,if=virtio"],
    ["-drive", "file=nbd:localhost:10809"],
    ["-drive", "file=/var/lib/vms/web.qcow2,readonly=off"],
    ["-blockdev", "driver=file,filename=/var/lib/vms/web.qcow2,node-name=f"],
    ["-blockdev", "driver=nbd,server.type=inet,server.host=h,server.port=1"],
    ["-device", "vfio-pci,host=01:00.0"],
    ["-device", '{"driver":"vfio-pci","host":"01:00.0"}'],
    ["-device", "usb-host,vendorid=1"],
    ["-device", "virtserialport,chardev=a,name=org.qemu.guest_agent.0"],
]


@pytest.mark.parametrize("arguments", FINE, ids=" ".join)
def test_fine(arguments: list[str]) -> None:
    check_machine(Machine(arguments=tuple(arguments)))


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_refused(arguments: list[str]) -> None:
    with pytest.raises(InputInvalid):
        check_machine(Machine(arguments=tuple(arguments)))
    with pytest.raises(InputInvalid):
        check_machine(Machine(command=("qemu", "-hda", "{drive:vda}", *arguments)))


def test_a_command_has_to_boot_from_the_backup() -> None:
    with pytest.raises(InputInvalid):
        check_machine(Machine(command=("qemu-system-x86_64", "-M", "pc")))


@pytest.mark.parametrize("interface", INTERFACES)
def test_made(interface: str) -> None:
    line = command_line(Machine(interface=interface), OVERLAYS, "/room", "drill", "uuid")
    nodes = [json.loads(line[number + 1]) for number, word in enumerate(line) if word == "-blockdev"]
    assert [node["file"]["filename"] for node in nodes] == ["/room/0.qcow2", "/room/1.qcow2"]
    devices = [line[number + 1] for number, word in enumerate(line) if word == "-device"]
    disks = [device for device in devices if ",drive=" in device]
    assert [device.split("bootindex=")[1].split(",")[0] for device in disks] == ["1", "2"]
    assert disks[0].endswith("serial=S,,1")
    assert disks[1].endswith("serial=blockops-1") == (interface == "nvme")
    assert ("virtio-scsi,id=blockops-scsi" in devices) == (interface == "virtio-scsi")
    assert line[line.index("-nic") + 1] == "none"


@pytest.mark.parametrize(
    ("interface", "places"),
    [
        ("sata", ["blockops-ahci0.0", "blockops-ahci0.1", "blockops-ahci0.5", "blockops-ahci1.0"]),
        ("ide", ["ide.0,unit=0", "ide.0,unit=1", "ide.2,unit=1", "ide.3,unit=0"]),
    ],
)
def test_places(interface: str, places: list[str]) -> None:
    overlays = [Overlay(str(number), f"/room/{number}.qcow2") for number in range(7)]
    line = command_line(Machine(interface=interface), overlays, "/room", "drill", "uuid")
    devices = [word for word in line if word.startswith("ide-hd")]
    for number, place in zip((0, 1, 5, 6), places):
        assert f",bus={place}," in devices[number]
    controllers = [word for word in line if word.startswith("ahci")]
    assert controllers == (["ahci,id=blockops-ahci0", "ahci,id=blockops-ahci1"] if interface == "sata" else [])


def test_placeholders() -> None:
    machine = Machine(command=("qemu", "-hda", "{drive:data disk}", "-append", "{directory}/x {other} {}"))
    line = command_line(machine, OVERLAYS, "/room", "drill", "uuid")
    assert line[:5] == ["qemu", "-hda", "/room/1.qcow2", "-append", "/room/x {other} {}"]
    assert line[5:9] == ["-name", "drill", "-uuid", "uuid"]
    with pytest.raises(DriveUnknown, match="vda, data disk"):
        command_line(Machine(arguments=("{drive:vdb}",)), OVERLAYS, "/room", "drill", "uuid")
