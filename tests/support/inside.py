# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots inside images, taken by qmp_snapshot and judged by qemu-img and by what the guest reads."""

from __future__ import annotations

import json
import typing as t
from pathlib import Path

from lab import images
from lab.qemu import Drive, Qemu
from support.forked import run_forked
from support.killer import Trap
from support.module import Result

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
OLD, NEW = 0x21, 0x42


def snapshot(
    vm: t.Any, state: str = "present", trap: Trap | None = None, *, check: bool = False, **options: t.Any
) -> Result:
    """Run qmp_snapshot on one VM. ``vm`` has a name and a socket."""
    params: dict[str, t.Any] = {"name": "s1", "state": state, "quiesce": "off"}
    params.update(vms=[{"name": vm.name, "socket": str(vm.socket)}], **options)
    return run_forked("qmp_snapshot", params, trap, check=check)


def answer(result: Result) -> dict[str, t.Any]:
    (vm,) = result.ok().data["vms"]
    return t.cast("dict[str, t.Any]", vm)


def failure(result: Result) -> dict[str, t.Any]:
    """The error of a run that has to fail, and has to say what to do next."""
    assert result.failed, result
    error = result.data["vms"][0]["error"]
    assert error["message"] and "{" not in error["message"], error
    return t.cast("dict[str, t.Any]", error)


def predicted(vm: Qemu, state: str = "present", **options: t.Any) -> dict[str, t.Any]:
    """What check mode says, having changed nothing."""
    before = facts(vm)
    said = answer(snapshot(vm, state, check=True, **options))
    assert facts(vm) == before
    return said


def facts(vm: Qemu) -> dict[str, t.Any]:
    """What a run may change: snapshots, bitmaps and jobs, as QEMU tells the lab's own client; and whether it runs."""
    nodes = vm.nodes()
    return {
        "snapshots": {name: node["image"].get("snapshots") for name, node in nodes.items()},
        "bitmaps": {
            name: sorted(b.get("name", "") for b in node.get("dirty-bitmaps", ())) for name, node in nodes.items()
        },
        "jobs": vm.jobs(),
        "status": vm.command("query-status")["status"],
    }


def tags(path: str | Path) -> list[str]:
    """Names of the snapshots in an image, in order, as qemu-img lists them. -U: QEMU may have it open."""
    listed = images.run_tool("qemu-img", "info", "-U", "--output=json", path).stdout
    return [snap["name"] for snap in json.loads(listed).get("snapshots", [])]


def disk(directory: Path, name: str, **options: t.Any) -> Path:
    """A qcow2 image full of ``OLD``."""
    path = images.create(directory / f"{name}.qcow2", SIZE, **options)
    images.fill(path, [(0, SIZE, OLD)])
    return path


def overwrite(vm: Qemu, *drives: str) -> None:
    for drive in drives:
        vm.write(drive, MIB, 2 * MIB, NEW)


def is_old(vm: Qemu, *drives: str) -> bool:
    return all(vm.holds(drive, 0, SIZE, OLD) for drive in drives)


def sound(path: str | Path) -> None:
    report = images.check(path)
    assert not report.get("corruptions"), report


def applied_is_old(path: Path) -> None:
    """Of an image that nobody has open: its snapshot s1 holds what the guest had then. Changes the image."""
    sound(path)
    reference = disk(path.parent, f"reference-{path.stem}")
    images.run_tool("qemu-img", "snapshot", "-a", "s1", path)
    assert images.compare(path, reference)
    sound(path)


__all__ = ["Drive", "Qemu", "Trap"]
