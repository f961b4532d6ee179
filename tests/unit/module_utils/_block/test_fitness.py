# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._block.fitness import Tracking, fitness
from support.blocks import MIB, drive, layer


@pytest.mark.parametrize(
    ("image", "possible", "default", "tracking", "says"),
    [
        ({}, True, True, Tracking.PERSISTENT, None),
        ({"compat": "0.10"}, True, True, Tracking.TRANSIENT, "qemu-img amend"),
        ({"driver": "raw", "compat": None}, True, True, Tracking.TRANSIENT, "raw"),
        ({"driver": "raw", "compat": None, "protocol": "host_device"}, True, True, Tracking.TRANSIENT, "raw"),
        ({"read_only": True}, True, False, Tracking.NONE, "read-only"),
        ({"driver": "quorum"}, False, False, Tracking.NONE, "quorum"),
    ],
)
def test_fitness(image: dict[str, t.Any], possible: bool, default: bool, tracking: Tracking, says: str | None) -> None:
    fit = fitness(drive(layer(**image)))
    assert (fit.possible, fit.default, fit.tracking) == (possible, default, tracking)
    assert fit.reason is None if says is None else says in str(fit.reason)


def test_removable_and_empty() -> None:
    assert not fitness(drive()).possible
    fit = fitness(drive(layer(), removable=True))
    assert fit.possible and not fit.default


def test_only_files_tell_how_much_data_they_have() -> None:
    assert layer(allocated=MIB).data_bound == MIB
    assert layer(allocated=100 * MIB).data_bound == 64 * MIB
    assert layer(allocated=0, protocol="host_device").data_bound == 64 * MIB
