# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every kind of drive an administrator has, in full and incrementally, and what happens to drives in between."""

from __future__ import annotations

import json
import os
import typing as t
from pathlib import Path

import pytest

from lab import images
from lab.fixtures import QemuFactory
from support.points import KIB, MIB, Drive, Point, Qemu, Site, disk, leftovers


@pytest.fixture
def site(workdir: Path) -> Site:
    return Site(workdir)


def full_then_incremental(site: Site, qemu: Qemu, drive: str = "disk0", offset: int = 2 * MIB) -> Point:
    """A full, a change, an incremental of it; all content proved. Returns the incremental."""
    full = site.backup(qemu)
    assert full.levels[drive] == "full"
    qemu.write(drive, offset, 64 * KIB, 0xA1)
    increment = site.backup(qemu)
    assert increment.levels[drive] == "incremental", increment.reason(drive)
    assert increment.drive(drive)["copied"] <= 4 * MIB
    site.check()
    assert not leftovers(qemu)
    return increment


DEVICES: list[tuple[str, t.Any]] = [
    ("virtio-blk-pci", "blockdev"),
    ("virtio-blk-pci", "drive"),
    ("virtio-blk-pci", "legacy"),
    ("scsi-hd", "blockdev"),
    ("scsi-hd", "drive"),
    ("ide-hd", "blockdev"),
    ("ide-hd", "legacy"),
    ("nvme", "blockdev"),
    ("nvme", "drive"),
]


def together(site: Site, qemu: Qemu, offset: int = 2 * MIB) -> list[Point]:
    """As full_then_incremental, for all drives of the VM."""
    points = [site.backup(qemu)]
    assert set(points[0].levels) == set(qemu.drives)
    assert set(points[0].levels.values()) == {"full"}
    for drive in qemu.drives:
        qemu.write(drive, offset, 64 * KIB, 0xA1)
    points.append(site.backup(qemu))
    assert set(points[1].levels.values()) == {"incremental"}, points[1].data["drives"]
    site.check()
    assert not leftovers(qemu)
    return points


def test_every_device_and_both_ways_to_write_it(site: Site, qemu_factory: QemuFactory) -> None:
    drives = [
        Drive(f"{device}-{style}", disk(site.directory, f"{device}-{style}", 4 * MIB), device=device, style=style)
        for device, style in DEVICES
    ]
    qemu = qemu_factory("vm", drives)
    together(site, qemu)
    qemu.restart()
    assert set(site.backup(qemu).levels.values()) == {"incremental"}
    site.check()


def test_throttle_filter_on_top(site: Site, qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("vm", [Drive("disk0", disk(site.directory, "d"), throttle_bps=1 << 30)])
    full_then_incremental(site, qemu)


def test_iothread(site: Site, qemu_factory: QemuFactory) -> None:
    drive = Drive("disk0", disk(site.directory, "d"), device_options={"iothread": "io0"})
    # an object goes before the device that names it
    qemu = qemu_factory("vm", [drive], extra_args=["-object", "iothread,id=io0"])
    full_then_incremental(site, qemu)


def test_device_without_an_id(site: Site, qemu_factory: QemuFactory) -> None:
    """Named after its -drive, else after its node."""
    one, two = disk(site.directory, "one"), disk(site.directory, "two")
    arguments = ["-drive", f"if=none,id=first,file={one},format=qcow2", "-device", "virtio-blk-pci,drive=first"]
    node = {"driver": "qcow2", "node-name": "second", "file": {"driver": "file", "filename": str(two)}}
    arguments += ["-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=second"]
    qemu = qemu_factory("vm", [], extra_args=arguments)
    point = site.backup(qemu)
    assert point.levels == {"first": "full", "second": "full"}
    assert site.backup(qemu).levels == {"first": "incremental", "second": "incremental"}
    site.check()


def test_drive_that_no_device_uses(site: Site, qemu_factory: QemuFactory) -> None:
    """Not a drive of the guest; with its name it can be had all the same."""
    spare = disk(site.directory, "spare")
    line = ["-drive", f"if=none,id=spare,file={spare},format=qcow2"]
    qemu = qemu_factory("vm", [Drive("disk0", disk(site.directory, "d"))], extra_args=line)
    point = site.backup(qemu)
    assert point.levels == {"disk0": "full"}
    (skipped,) = point.data["skipped"]
    assert skipped["name"] == "spare"
    assert "no device" in skipped["reason"]
    assert site.backup(qemu, drives=["spare"]).levels == {"spare": "full"}
    site.check()


def test_new_and_removed_drive(site: Site, qemu_factory: QemuFactory) -> None:
    one, two = Drive("one", disk(site.directory, "one")), Drive("two", disk(site.directory, "two"))
    qemu = qemu_factory("vm", [one], uuid="6f2c9d0e-6c8c-4a39-9d4c-000000000001")
    site.backup(qemu)
    qemu.write("one", 3 * MIB, 64 * KIB, 2)
    qemu.quit()
    qemu = qemu_factory("vm", [one, two], uuid=qemu.uuid)
    both = site.backup(qemu)
    assert both.levels == {"one": "incremental", "two": "full"}
    assert "no earlier backup" in both.reason("two")
    assert both.data["level"] == "incremental"
    qemu.quit()
    qemu = qemu_factory("vm", [two], uuid=qemu.uuid)
    removed = site.call(qemu).ok()
    assert [drive["name"] for drive in removed.data["vms"][0]["drives"]] == ["two"]
    assert any("one" in warning and both.id in warning for warning in removed.warnings), removed.warnings
    site.check()


def test_grown_while_running_and_with_data_in_the_new_part(site: Site, qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("vm", [Drive("disk0", disk(site.directory, "d"))])
    site.backup(qemu)
    qemu.execute("block_resize", {"node-name": "disk0-node", "size": 24 * MIB})
    qemu.write("disk0", 20 * MIB, 64 * KIB, 3)
    grown = site.backup(qemu)
    assert grown.levels == {"disk0": "incremental"}
    assert grown.drive("disk0")["virtual_size"] == 24 * MIB
    qemu.write("disk0", 23 * MIB, 64 * KIB, 4)
    assert site.backup(qemu).levels == {"disk0": "incremental"}
    site.check()


def test_shrunk(site: Site, qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("vm", [Drive("disk0", disk(site.directory, "d"))])
    site.backup(qemu)
    qemu.execute("block_resize", {"node-name": "disk0-node", "size": 8 * MIB})
    shrunk = site.backup(qemu)
    assert shrunk.levels == {"disk0": "full"}
    assert "shrunk from" in shrunk.reason("disk0")
    site.check()


def test_raw_drive_grown(site: Site, qemu_factory: QemuFactory) -> None:
    """What a device grows by may hold anything, so the bitmap does not tell all."""
    qemu = qemu_factory("vm", [Drive("disk0", disk(site.directory, "d", fmt="raw"), fmt="raw")])
    site.backup(qemu)
    qemu.execute("block_resize", {"node-name": "disk0-node", "size": 24 * MIB})
    grown = site.backup(qemu)
    assert grown.levels == {"disk0": "full"}
    assert "has grown" in grown.reason("disk0")
    site.check()


def test_node_renamed_by_a_restart(site: Site, qemu_factory: QemuFactory) -> None:
    image = disk(site.directory, "d")
    qemu = qemu_factory("vm", [Drive("disk0", image)])
    site.backup(qemu)
    qemu.write("disk0", 5 * MIB, 64 * KIB, 5)
    qemu.quit()
    qemu = qemu_factory("vm", [Drive("disk0", image, node_name="quite-another")], uuid=qemu.uuid)
    assert site.backup(qemu).levels == {"disk0": "incremental"}
    site.check()


def test_clean_restart_keeps_the_chain(site: Site, qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("vm", [Drive("disk0", disk(site.directory, "d"))])
    site.backup(qemu)
    for life in range(3):
        qemu.write("disk0", (2 + life) * MIB, 64 * KIB, 0x20 + life)
        qemu.restart()
        qemu.write("disk0", (8 + life) * MIB, 64 * KIB, 0x30 + life)
        assert site.backup(qemu).levels == {"disk0": "incremental"}
    site.check()


def without_persistence(site: Site, qemu: Qemu, why: str) -> None:
    full = site.backup(qemu)
    assert any(why in warning and "after each restart" in warning for warning in full.warnings), full.warnings
    qemu.write("disk0", 5 * MIB, 64 * KIB, 5)
    assert site.backup(qemu).levels == {"disk0": "incremental"}
    qemu.restart()
    again = site.backup(qemu)
    assert again.levels == {"disk0": "full"}
    assert why in again.reason("disk0")
    assert "restarted" in again.reason("disk0")
    site.check()


def test_raw_drive_is_incremental_until_qemu_ends(site: Site, qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("vm", [Drive("disk0", disk(site.directory, "d", fmt="raw"), fmt="raw")])
    without_persistence(site, qemu, "the raw format cannot store bitmaps")


def test_qcow2_version_2_is_incremental_until_qemu_ends(site: Site, qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("vm", [Drive("disk0", disk(site.directory, "d", compat="0.10"))])
    without_persistence(site, qemu, "amend -o compat=1.1")


def test_read_only_drives_and_media_are_left_out_with_the_reason(site: Site, qemu_factory: QemuFactory) -> None:
    drives = [
        Drive("disk0", disk(site.directory, "d")),
        Drive("locked", disk(site.directory, "locked"), readonly=True, share_rw=False),
        Drive("empty", None, device="ide-cd"),
        Drive("medium", disk(site.directory, "iso", fmt="raw"), fmt="raw", device="ide-cd"),
    ]
    qemu = qemu_factory("vm", drives)
    point = site.backup(qemu)
    assert point.levels == {"disk0": "full"}
    skipped = {skip["name"]: skip["reason"] for skip in point.data["skipped"]}
    assert set(skipped) == {"locked", "empty", "medium"}
    assert "read-only" in skipped["locked"]
    assert "no medium" in skipped["empty"]
    assert "removable" in skipped["medium"]
    assert point.manifest["skipped"] == point.data["skipped"]
    # asked for by name they are copied; only what is not there cannot be
    named = site.backup(qemu, drives=["locked", "medium"])
    assert named.levels == {"locked": "full", "medium": "full"}
    refused = site.call(qemu, drives=["empty"])
    assert refused.data["vms"][0]["error"]["kind"] == "DriveUnfit"
    site.check()


def test_firmware_pair(site: Site, qemu_factory: QemuFactory) -> None:
    """Code is read-only and skipped, variables are a drive; and they can be saved as a definition file as well."""
    code = images.create(site.directory / "code.fd", 4 * MIB, "raw")
    variables = disk(site.directory, "vars", 256 * KIB, "raw")
    drives = [
        Drive("disk0", disk(site.directory, "d")),
        Drive("code", code, fmt="raw", device="pflash0", readonly=True),
        Drive("vars", variables, fmt="raw", device="pflash1"),
    ]
    qemu = qemu_factory("vm", drives)
    point = site.backup(qemu, definition=[str(variables)])
    names = set(point.levels)
    assert "disk0" in names
    assert len(names) == 2, point.data
    assert len(point.data["skipped"]) == 1
    (saved,) = point.manifest["definition"]
    assert (point.path / saved["file"]).read_bytes() == variables.read_bytes()
    site.check()


def test_json_file_name(site: Site, qemu_factory: QemuFactory) -> None:
    image = disk(site.directory, "d")
    name = "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}})
    escaped = name.replace(",", ",,")
    arguments = ["-drive", f"if=none,id=b0,file={escaped}", "-device", "virtio-blk-pci,drive=b0,id=disk0,share-rw=on"]
    qemu = qemu_factory("vm", [], extra_args=arguments)
    full_then_incremental(site, qemu)
    qemu.restart()
    assert site.backup(qemu).levels == {"disk0": "incremental"}


def test_external_data_file(site: Site, qemu_factory: QemuFactory) -> None:
    data = site.directory / "payload.data"
    image = disk(site.directory, "d", data_file=str(data), data_file_raw=True)
    qemu = qemu_factory("vm", [Drive("disk0", image)])
    point = full_then_incremental(site, qemu)
    assert "data-file" not in json.dumps(images.info(point.image("disk0"))["format-specific"])


def test_encrypted_image_is_backed_up_in_plain_and_says_so(site: Site, qemu_factory: QemuFactory) -> None:
    secret = ["--object", "secret,id=sec0,data=geheim"]
    secret_of_the_vm = ["-object", secret[1]]
    image = site.directory / "luks.qcow2"
    options = "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=100"
    for last in (False, False, False, True):
        # It measures its own processor time, and gives up when the clock does not move meanwhile.
        done = images.run_tool(
            "qemu-img",
            "create",
            "-q",
            *secret,
            "-f",
            "qcow2",
            "-o",
            options,
            image,
            "8M",
            accept=(0,) if last else (0, 1),
        )
        if done.returncode == 0:
            break
    drive = Drive("disk0", image, options={"encrypt": {"format": "luks", "key-secret": "sec0"}})
    qemu = qemu_factory("vm", [drive], extra_args=secret_of_the_vm)
    qemu.write("disk0", 0, MIB, 0x42)
    point = full_then_incremental(site, qemu)
    assert any("encrypted" in warning for warning in point.warnings), point.warnings
    assert any("encrypted" in warning for warning in point.manifest["warnings"])


def test_odd_sizes(site: Site, qemu_factory: QemuFactory) -> None:
    sizes = {
        f"{fmt}{size}": (size, fmt)
        for size in (512, MIB + 512, 3 * MIB + 512, 64 * KIB - 512)
        for fmt in ("qcow2", "raw")
    }
    drives = [Drive(name, disk(site.directory, name, size, fmt), fmt=fmt) for name, (size, fmt) in sizes.items()]
    qemu = qemu_factory("vm", drives)
    site.backup(qemu)
    for name, (size, _fmt) in sizes.items():
        qemu.write(name, size - 512, 512, 0x77)
    point = site.backup(qemu)
    assert set(point.levels.values()) == {"incremental"}
    assert {drive["name"]: drive["virtual_size"] for drive in point.data["drives"]} == {
        name: size for name, (size, _fmt) in sizes.items()
    }
    site.check()


def test_drive_of_no_size(site: Site, qemu_factory: QemuFactory) -> None:
    qemu = qemu_factory("vm", [Drive("disk0", disk(site.directory, "d", 0)), Drive("disk1", disk(site.directory, "e"))])
    assert site.backup(qemu).levels == {"disk0": "full", "disk1": "full"}
    site.backup(qemu)
    site.check()


LAYOUTS: dict[str, dict[str, t.Any]] = {
    "clusters-512": {"cluster_size": "512"},
    "clusters-4k": {"cluster_size": "4k"},
    "clusters-2M": {"cluster_size": "2M"},
    "extended-l2": {"extended_l2": True, "cluster_size": "128k"},
    "lazy-refcounts": {"lazy_refcounts": True},
    "preallocated": {"preallocation": "full"},
}


def test_layouts_of_the_source(site: Site, qemu_factory: QemuFactory) -> None:
    drives = [Drive(name, disk(site.directory, name, 8 * MIB, **options)) for name, options in LAYOUTS.items()]
    together(site, qemu_factory("vm", drives), offset=2 * MIB + 4096)


def test_compressed_source(site: Site, qemu_factory: QemuFactory) -> None:
    plain, packed = disk(site.directory, "plain"), site.directory / "packed.qcow2"
    images.run_tool("qemu-img", "convert", "-c", "-O", "qcow2", plain, packed)
    full_then_incremental(site, qemu_factory("vm", [Drive("disk0", packed)]), offset=256 * KIB)


def test_huge_sparse_drive(site: Site, qemu_factory: QemuFactory) -> None:
    """2 TiB, next to no data: neither time nor space may go with the virtual size."""
    image = disk(site.directory, "huge", "2T")
    images.fill(image, [((2 << 40) - MIB, MIB, 3)])
    qemu = qemu_factory("vm", [Drive("disk0", image)])
    first = site.call(qemu).ok().data["vms"][0]
    qemu.write("disk0", 1 << 40, 64 * KIB, 4)
    second = site.call(qemu).ok().data["vms"][0]
    assert [first["level"], second["level"]] == ["full", "incremental"]
    assert first["seconds"] < 15 and second["seconds"] < 15, (first["seconds"], second["seconds"])
    for data in (first, second):
        assert os.stat(data["drives"][0]["path"]).st_blocks * 512 < 64 * MIB
    qemu.quit()
    assert images.compare(image, second["drives"][0]["path"])


def test_backing_chain_is_copied_as_one(site: Site, qemu_factory: QemuFactory) -> None:
    base = disk(site.directory, "base")
    overlay = images.create(site.directory / "overlay.qcow2", backing=base)
    images.fill(overlay, [(4 * MIB, MIB, 6)])
    full_then_incremental(site, qemu_factory("vm", [Drive("disk0", overlay)]))


ZEROING = ("write -z {} {}", "write -z -u {} {}", "discard {} {}")


def test_zeroes_in_an_increment_hide_the_data_below(site: Site, qemu_factory: QemuFactory) -> None:
    sizes = ("4k", "64k", "2M")
    drives = []
    for size in sizes:
        image = disk(site.directory, f"d{size}", 24 * MIB, cluster_size=size)
        images.fill(image, [(0, 24 * MIB, 0x55)])
        drives.append(Drive(f"d{size}", image, options={"discard": "unmap"}))
    qemu = qemu_factory("vm", drives)
    site.backup(qemu)
    for name in qemu.drives:
        for number, command in enumerate(ZEROING):
            start = number * 8 * MIB
            for offset, length in ((0, 2 * MIB), (4 * MIB + 4096, 8192), (6 * MIB - 512, MIB + 1024)):
                qemu.qemu_io(name, command.format(start + offset, length))
    assert set(site.backup(qemu).levels.values()) == {"incremental"}
    for name in qemu.drives:
        qemu.write(name, MIB, 4096, 0x56)
    assert set(site.backup(qemu).levels.values()) == {"incremental"}
    site.check()
    qemu.quit()
    for drive in drives:
        assert images.compare(str(drive.image), site.points[-1].image(drive.id))
