# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Command lines as they are really written, and the images they start from."""

from __future__ import annotations

import shlex
import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.graph import Drive
from ansible_collections.blockops.qemu.plugins.module_utils._block.startup import (
    StartupImage,
    absolute,
    looks_like_qemu,
    parse_startup,
    split_options,
    started_with,
    startup_gaps,
)
from support.blocks import layer

PROXMOX = (
    "/usr/bin/kvm -id 100 -name web,debug-threads=on -no-shutdown -chardev"
    " socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control -daemonize"
    " -device virtio-scsi-pci,id=scsihw0,bus=pci.0,addr=0x5"
    " -drive file=/var/lib/vz/images/100/vm-100-disk-0.qcow2,if=none,id=drive-scsi0,format=qcow2,aio=native"
    " -device scsi-hd,bus=scsihw0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,bootindex=100"
    " -drive if=none,id=drive-ide2,media=cdrom,aio=io_uring -device ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2"
    " -drive if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF_CODE.fd"
)
LIBVIRT = (
    "/usr/bin/qemu-system-x86_64 -name guest=web,debug-threads=on -S -machine pc-q35-7.2,usb=off,"
    "pflash0=libvirt-pflash0-format -no-user-config -nodefaults"
    """ -blockdev '{"driver":"file","filename":"/usr/share/OVMF_CODE.fd","node-name":"libvirt-pflash0-storage"}'"""
    """ -blockdev '{"node-name":"libvirt-pflash0-format","driver":"raw","file":"libvirt-pflash0-storage"}'"""
    """ -blockdev '{"driver":"file","filename":"/vms/base.qcow2","node-name":"libvirt-2-storage"}'"""
    """ -blockdev '{"node-name":"libvirt-2-format","driver":"qcow2","file":"libvirt-2-storage","backing":null}'"""
    """ -blockdev '{"driver":"file","filename":"/vms/top.qcow2","node-name":"libvirt-1-storage"}'"""
    """ -blockdev '{"node-name":"libvirt-1-format","driver":"qcow2","file":"libvirt-1-storage","""
    """"backing":"libvirt-2-format"}'"""
    """ -device '{"driver":"virtio-blk-pci","bus":"pci.4","drive":"libvirt-1-format","id":"virtio-disk0"}'"""
)

# The command line after the program, and what it starts from: file, format, qdev, device, nodes.
Row = tuple[str, list[tuple[t.Any, ...]]]
ROWS: list[Row] = [
    ("", []),
    ("-hda a.qcow2", [("/vms/a.qcow2", None, None, "ide0-hd0", ())]),
    ("-m 512 a.qcow2 -snapshot", [("/vms/a.qcow2", None, None, "ide0-hd0", ())]),
    ("-append -hda -nographic /d/b.raw", [("/d/b.raw", None, None, "ide0-hd0", ())]),
    (
        "-hda a -hdb b -hdd d -cdrom c",
        [
            ("/vms/a", None, None, "ide0-hd0", ()),
            ("/vms/b", None, None, "ide0-hd1", ()),
            ("/vms/d", None, None, "ide1-hd1", ()),
            ("/vms/c", None, None, "ide1-cd0", ()),
        ],
    ),
    (
        "-M q35 -hda /a -drive file=/b,format=raw",
        [("/a", None, None, "ide0-hd0", ()), ("/b", "raw", None, "ide1-hd0", ())],
    ),
    (
        "-drive if=virtio,file=/c -drive if=virtio,index=4,file=/d -drive file=/e,if=virtio -drive if=none,file=/f",
        [
            ("/c", None, None, "virtio0", ()),
            ("/d", None, None, "virtio4", ()),
            ("/e", None, None, "virtio1", ()),
            ("/f", None, None, "none0", ()),
        ],
    ),
    ("-drive if=ide,bus=1,unit=1,file=/b", [("/b", None, None, "ide1-hd1", ())]),
    ("-M virt -drive file=/b,format=qcow2", [("/b", "qcow2", None, "virtio0", ())]),
    (
        "-drive format=raw,file=/a,,b.raw,id=d0,if=none,node-name=n -device virtio-blk-pci,drive=d0,id=vda",
        [("/a,b.raw", "raw", "vda", "d0", ("n",))],
    ),
    ("-drive if=virtio,driver=qcow2,file.driver=file,file.filename=/a", [("/a", "qcow2", None, "virtio0", ())]),
    (
        """-drive 'if=virtio,file=json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"/a"}}'""",
        [("/a", "qcow2", None, "virtio0", ())],
    ),
    ("-drive if=none,id=cd0 -device ide-cd,drive=cd0", []),
    ("-drive file=nbd://h/x,if=virtio,format=raw", [("nbd://h/x", "raw", None, "virtio0", ())]),
    (
        "-blockdev driver=qcow2,node-name=n,file.driver=file,file.filename=/a,,b -device nvme,drive=n,id=q,serial=1",
        [("/a,b", "qcow2", "q", None, ("n",))],
    ),
    ("-blockdev qcow2,node-name=n,file.driver=file,file.filename=x", [("/vms/x", "qcow2", None, None, ("n",))]),
    (
        "-blockdev driver=file,node-name=f,filename=/a -blockdev driver=raw,node-name=n,file=f"
        ' -device \'{"driver":"virtio-blk-pci","drive":"n","id":"vda"}\'',
        [("/a", "raw", "vda", None, ("n",))],
    ),
    ("-blockdev driver=file,node-name=f,filename=/a -device scsi-hd,drive=f", [("/a", "file", None, None, ("f",))]),
    (
        "-object throttle-group,id=tg,x-bps-total=1 -blockdev driver=throttle,node-name=t,throttle-group=tg,"
        "file.driver=qcow2,file.node-name=n,file.file.driver=file,file.file.filename=/a -device nvme,drive=t,id=q",
        [("/a", "qcow2", "q", None, ("t", "n"))],
    ),
    (
        """-blockdev '{"driver":"throttle","node-name":"t","throttle-group":"g","file":"n"}'"""
        """ -blockdev '{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"/a"}}'""",
        [("/a", "qcow2", None, None, ("t", "n"))],
    ),
    ("-blockdev driver=nbd,node-name=n,server.type=unix,server.path=/s -device nvme,drive=n,id=q", []),
    ("-blockdev {broken -hda /a", [("/a", None, None, "ide0-hd0", ())]),
    ("--blockdev=driver=file,node-name=f,filename=/a", [("/a", "file", None, None, ("f",))]),
    (
        PROXMOX.partition(" ")[2],
        [
            ("/var/lib/vz/images/100/vm-100-disk-0.qcow2", "qcow2", "scsi0", "drive-scsi0", ()),
            ("/usr/share/OVMF_CODE.fd", "raw", None, "pflash0", ()),
        ],
    ),
    (
        LIBVIRT.partition(" ")[2],
        [
            ("/usr/share/OVMF_CODE.fd", "raw", None, None, ("libvirt-pflash0-format",)),
            ("/vms/top.qcow2", "qcow2", "virtio-disk0", None, ("libvirt-1-format",)),
        ],
    ),
]


def parse(line: str) -> tuple[StartupImage, ...]:
    return parse_startup(["qemu-system-x86_64", *shlex.split(line)], "/vms")


@pytest.mark.parametrize(("line", "images"), ROWS, ids=[line[:60] for line, _images in ROWS])
def test_images_of_a_command_line(line: str, images: list[tuple[t.Any, ...]]) -> None:
    assert [(i.file, i.format, i.qdev, i.device, i.nodes) for i in parse(line)] == images


@pytest.mark.parametrize(
    ("line", "explicit"),
    [
        ("-drive file=/a,if=virtio", False),
        ("-drive file=/a,if=virtio,backing.file.filename=/b", True),
        ("-blockdev qcow2,node-name=n,file.driver=file,file.filename=/a,backing=b", True),
        ("""-blockdev '{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"/a"}}'""", False),
        (
            """-blockdev '{"driver":"qcow2","node-name":"n","backing":null,"file":{"filename":"/a"}}'""",
            True,
        ),
        (LIBVIRT.partition(" ")[2].replace("OVMF", "o"), True),
    ],
)
def test_explicit_backing_images(line: str, explicit: bool) -> None:
    assert parse(line)[-1].explicit_backing is explicit


@pytest.mark.parametrize(
    ("line", "temporary"),
    [
        ("-drive file=/a,if=virtio,snapshot=on", True),
        ("-drive file=/a,if=virtio -snapshot", True),
        ("-snapshot -drive file=/a,if=virtio,snapshot=off", False),
        ("-hda /a", False),
    ],
)
def test_overlays_of_qemu_itself(line: str, temporary: bool) -> None:
    assert parse(line)[0].temporary is temporary


def test_what_is_spelled() -> None:
    (image,) = parse("-drive file=file:sub/../a.qcow2,if=virtio,id=x")
    assert (image.file, image.spelled, image.keys) == ("/vms/a.qcow2", "file:sub/../a.qcow2", ("x",))


@pytest.mark.parametrize(
    ("file", "result"),
    [("/a", "/a"), ("a", "/vms/a"), ("./a:b", "/vms/a:b"), ("nbd:h:1", "nbd:h:1"), ("file:a", "/vms/a")],
)
def test_absolute_paths(file: str, result: str) -> None:
    assert absolute(file, "/vms") == result


def test_doubled_commas() -> None:
    assert split_options("a=1,,2,b,c=,,,d=e=f", "x") == {"a": "1,2", "b": "on", "c": ",", "d": "e=f"}
    assert split_options("pc,a=b", "type") == {"type": "pc", "a": "b"}


def test_gaps() -> None:
    assert startup_gaps(["q", "-hda", "x"]) == ()
    assert "vm.cfg" in startup_gaps(["q", "-readconfig", "vm.cfg", "-set", "drive.d.file=x"])[0]
    assert startup_gaps(["q", "-daemonize", "-hda", "/x", "-hdb", "nbd:h:1"]) == ()
    (gap,) = startup_gaps(["q", "-daemonize", "-hda", "x"])
    assert gap.startswith("x is relative")


@pytest.mark.parametrize(
    ("argv", "is_qemu"),
    [
        (["/lib/systemd/systemd", "--switched-root", "--system"], False),
        (["python3", "manager.py"], False),
        (["kvm", "-hda", "x"], True),
        (["/opt/renamed", "-M", "pc"], True),
        (["qemu-storage-daemon", "--blockdev", "x"], True),
        ([], False),
    ],
)
def test_command_lines_of_others(argv: list[str], is_qemu: bool) -> None:
    assert looks_like_qemu(argv) is is_qemu


@pytest.mark.parametrize(
    ("drive", "file"),
    [
        (Drive("vda", "/machine/peripheral/vda/virtio-backend", "", False, (), (layer("/z"),)), "/a"),
        (Drive("vda", "vda", "", False, (), (layer("/z"),)), "/a"),
        (Drive("d1", "/machine/peripheral-anon/device[0]", "d1", False, (), (layer("/z"),)), "/b"),
        # A drive and a device of the same name that are two.
        (Drive("vdb", None, "vdb", False, (), (layer("/z"),)), None),
        (Drive("t", None, "", False, ("t",), (layer("/z"),)), "/c"),
        (Drive("n", None, "", False, (), (layer("/z", node="new"), layer("/c", node="n"))), "/c"),
        (Drive("x", "/machine/peripheral-anon/device[3]", "", False, (), (layer("/z"),)), None),
    ],
)
def test_which_image_a_drive_was_started_with(drive: Drive, file: str | None) -> None:
    images = (
        StartupImage("/a", "/a", "raw", qdev="vda", device="vdx"),
        StartupImage("/b", "/b", "raw", device="d1"),
        StartupImage("/d", "/d", "raw", qdev="vdb"),
        StartupImage("/c", "/c", "raw", nodes=("t", "n")),
    )
    found = started_with(drive, images)
    assert (found.file if found else None) == file
