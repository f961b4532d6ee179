# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make bench` runs, so that it cannot rot, and its arithmetic is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.goals import Goal
from bench.measure import Contender, Group, measure
from bench.table import render

TESTS = Path(__file__).resolve().parent.parent


def test_contenders_take_turns_and_ratios_are_of_one_round() -> None:
    order: list[str] = []

    def contender(name: str, seconds: list[float], rounds: int | None = None) -> Contender:
        values = iter(seconds)

        def run() -> float:
            order.append(name)
            return next(values)

        return Contender(name, run, rounds)

    made = [contender("a", [1.0, 10.0, 4.0]), contender("b", [2.0, 30.0, 4.0]), contender("c", [5.0], rounds=1)]
    group = measure(Group("title", "a", 10_000_000), made, 3, lambda _line: None)
    assert order == ["a", "b", "c", "b", "a", "a", "b"]
    assert (group.median("a"), group.ratio("b"), group.difference("b"), group.ratio("c")) == (4.0, 2.0, 1.0, 5.0)
    lines = render(group).splitlines()
    assert lines[1] == "title"
    assert lines[3].split() == ["a", "4.00", "1.00-10.00", "2", "1"]


def test_goals_are_met_or_missed() -> None:
    assert Goal("speed", 2.0, 2.0, least=True).met
    assert not Goal("speed", 1.9, 2.0, least=True).met
    assert Goal("time", 1.5, 1.5).met
    assert Goal("time", 1.6, 1.5, " s").line() == "time: 1.60 s (at most 1.5 s): MISSED"


def quick_run(workdir: Path, case: str) -> tuple[str, list[dict[str, Any]]]:
    """What it printed, and its tables."""
    report = workdir / "report.json"
    words = ["--quick", "--only", case, "--directory", str(workdir), "--json", str(report)]
    environment = {key: value for key, value in os.environ.items() if key != "QMPBACKUP"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words],
        env={**environment, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [entry.name for entry in workdir.iterdir()] == ["report.json"]
    return done.stdout, json.loads(report.read_text())["groups"]


def test_a_quick_run_measures_and_names_the_absent(workdir: Path) -> None:
    printed, groups = quick_run(workdir, "incremental")
    absent = printed.partition("absent: ")[2].splitlines()[0]
    assert "qmpbackup (QMPBACKUP=DIR names no checkout)" in absent
    assert "libvirt and virtnbdbackup (left out of a quick run)" in absent
    assert [list(group["contenders"]) for group in groups] == 2 * [
        ["bare QMP script", "qmp_drive_backup", "qmp_drive_backup verify=false"]
    ]


CHAINS = {
    "chain": ["bare QMP script", "bare QMP script", "", "a chain of 8", "a chain of 8"],
    "trim": ["qemu-img compare", "qemu-img compare"],
    "prune": [
        "qemu-img commit of as many bytes",
        "qemu-img commit into the older increment itself",
        "backup_prune of 1 backup",
    ],
}


@pytest.mark.parametrize("case", CHAINS)
def test_a_quick_run_of_chains(case: str, workdir: Path) -> None:
    """The cases hold what they measure against other tools themselves, and fail when it is not the same."""
    _printed, groups = quick_run(workdir, case)
    assert [group["reference"] for group in groups] == CHAINS[case]
    for group in groups:
        assert group["notes"] if not group["contenders"] else group["reference"] in group["contenders"]
