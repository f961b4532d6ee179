# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The block graph from answers of a real QEMU 7.2 (recorded/*.json; statistics cut out)."""

from __future__ import annotations

import copy
import json
import typing as t
from pathlib import Path

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.fitness import fitness
from ansible_collections.blockops.qemu.plugins.module_utils._block.graph import (
    Bitmap,
    Drive,
    drive_name,
    fit_together,
    parse_drives,
)

RECORDED = Path(__file__).parent / "recorded"
KEYS = ("query-block", "query-blockstats", "query-named-block-nodes")


def answers(name: str) -> list[t.Any]:
    data = json.loads((RECORDED / f"{name}.json").read_text())
    return [data[key] for key in KEYS]


def drives(name: str) -> dict[str, Drive]:
    return {drive.name: drive for drive in parse_drives(*answers(name))}


@pytest.fixture(scope="module")
def many() -> dict[str, Drive]:
    return drives("many")


def test_every_drive_has_a_name(many: dict[str, Drive]) -> None:
    assert sorted(many) == ["cd", "chain", "drv", "leg", "old", "raw", "ro", "slow"]


def test_a_chain_from_the_active_image_down(many: dict[str, Drive]) -> None:
    assert [layer.file for layer in many["chain"].layers] == ["/vms/top.qcow2", "/vms/base.qcow2"]
    assert [layer.read_only for layer in many["chain"].layers] == [False, True]
    assert many["chain"].active.bitmap("foreign") == Bitmap("foreign", 0, 65536, True, False, True, False)
    assert many["chain"].active.bitmap("other") is None


@pytest.mark.parametrize(
    ("name", "driver", "compat", "filters", "read_only"),
    [
        ("raw", "raw", None, 0, False),
        ("old", "qcow2", "0.10", 0, False),
        ("slow", "qcow2", "1.1", 1, False),
        ("drv", "qcow2", "1.1", 0, False),
        ("leg", "qcow2", "1.1", 0, False),
        ("ro", "qcow2", "1.1", 0, True),
    ],
)
def test_the_active_image(
    many: dict[str, Drive], name: str, driver: str, compat: str | None, filters: int, read_only: bool
) -> None:
    image = many[name].active
    assert (image.driver, image.compat, image.read_only, image.protocol) == (driver, compat, read_only, "file")
    assert (image.virtual_size, len(many[name].filters)) == (4 << 20, filters)


def test_an_empty_drive_has_no_layers(many: dict[str, Drive]) -> None:
    assert many["cd"].empty and many["cd"].removable


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chain", (True, True, "persistent")),
        ("raw", (True, True, "transient")),
        ("old", (True, True, "transient")),
        ("slow", (True, True, "persistent")),
        ("ro", (True, False, "none")),
        ("cd", (False, False, "none")),
    ],
)
def test_fitness_of_recorded_drives(many: dict[str, Drive], name: str, expected: tuple[bool, bool, str]) -> None:
    fit = fitness(many[name])
    assert (fit.possible, fit.default, fit.tracking.value) == expected
    assert (fit.reason is None) == (fit.tracking.value == "persistent")


def test_the_filter_of_a_running_job_is_not_the_image() -> None:
    drive = drives("job")["d0"]
    assert len(drive.filters) == 1
    assert drive.active.node == "d0-node"
    assert drives("afterwards")["d0"].filters == ()


def test_answers_from_before_and_after_a_job_do_not_fit_together() -> None:
    """A drive would seem to be empty: the nodes no longer have the filter that the tree begins with."""
    _block, during, nodes_during = answers("job")
    block, after, nodes_after = answers("afterwards")
    assert fit_together(during, nodes_during) and fit_together(after, nodes_after)
    assert not fit_together(during, nodes_after)
    assert parse_drives(block, during, nodes_after)[0].empty


def test_nameless_bitmaps_of_a_job_are_no_bitmaps() -> None:
    block, stats, nodes = copy.deepcopy(answers("afterwards"))
    for node in nodes:
        node["dirty-bitmaps"] = [{"count": 1, "granularity": 65536, "recording": True, "busy": True}]
    assert parse_drives(block, stats, nodes)[0].active.bitmaps == ()


def test_two_drives_of_one_name_are_told_apart_by_their_paths() -> None:
    block, stats, nodes = copy.deepcopy(answers("afterwards"))
    for answer in (block, stats):
        twin = copy.deepcopy(answer[0])
        answer[0]["qdev"], twin["qdev"] = "/machine/peripheral/d0/virtio-backend", "/machine/peripheral/d0/1"
        answer.append(twin)
    names = [drive.name for drive in parse_drives(block, stats, nodes)]
    assert names == ["/machine/peripheral/d0/virtio-backend", "/machine/peripheral/d0/1"]


def test_a_relative_file_name_is_made_absolute() -> None:
    block, stats, nodes = copy.deepcopy(answers("afterwards"))
    for node in nodes:
        node["image"]["filename"] = "images/../disk.qcow2"
    assert parse_drives(block, stats, nodes, "/srv")[0].active.file == "/srv/disk.qcow2"


@pytest.mark.parametrize(
    ("qdev", "device", "node", "name"),
    [
        ("vda", "", "n", "vda"),
        ("/machine/peripheral/vda/virtio-backend", "x", "n", "vda"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "drive0", "n", "drive0"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "", "named", "named"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "", "#block12", "device[0]"),
        (None, "", "n", "n"),
        (None, "", None, "unnamed"),
    ],
)
def test_names_of_drives(qdev: str | None, device: str, node: str | None, name: str) -> None:
    assert drive_name(qdev, device, node) == name
