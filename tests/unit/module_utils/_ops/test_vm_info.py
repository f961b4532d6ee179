# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several sockets of one VM are one VM; several VMs are never taken for one."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.blockops.qemu.plugins.module_utils._errors import SocketBusy
from ansible_collections.blockops.qemu.plugins.module_utils._ops._outcome import Outcome
from ansible_collections.blockops.qemu.plugins.module_utils._ops.vm_info import without_twins

Pair = tuple[dict[str, t.Any], Outcome]


def vm(socket: str, pid: int, uuid: str | None) -> Pair:
    return {"socket": socket}, Outcome(False, {"process": {"pid": pid}, "uuid": uuid, "warnings": []})


def busy(socket: str, pid: int) -> Pair:
    return {"socket": socket}, Outcome(False, error=SocketBusy(socket=socket, timeout=1, pid=pid))


@pytest.mark.parametrize(
    ("pairs", "kept"),
    [
        ([vm("a", 7, "u"), vm("b", 7, "u")], ["a"]),
        ([vm("a", 7, "u"), vm("b", 8, "v")], ["a", "b"]),
        ([busy("a", 7), vm("b", 7, "u")], ["b"]),
        ([busy("a", 9), vm("b", 7, "u")], ["a", "b"]),
        ([busy("a", -1), vm("b", -1, "u")], ["a", "b"]),
        # In a container every process outside may seem to be 0; a socket may have been made by systemd or a manager.
        ([vm("a", 0, "u"), vm("b", 0, "v"), busy("c", 0)], ["a", "b", "c"]),
        ([vm("a", 1, "u"), vm("b", 1, "v")], ["a", "b"]),
        ([vm("a", 7, "u"), vm("b", 7, "v"), busy("c", 7)], ["a", "b", "c"]),
        # Without a uuid nobody can tell.
        ([vm("a", 7, None), vm("b", 7, None)], ["a", "b"]),
    ],
)
def test_without_twins(pairs: list[Pair], kept: list[str]) -> None:
    assert [entry["socket"] for entry, _outcome in without_twins(pairs)] == kept


def test_the_other_socket_is_told() -> None:
    ((_entry, outcome),) = without_twins([vm("a", 7, "u"), vm("b", 7, "u")])
    assert outcome.result["warnings"] == ["The VM has another monitor on b."]
