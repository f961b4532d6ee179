# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""python -m bench [--quick] [--only CASE]... [--directory DIR] [--json FILE]"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import chain, fleet, footprint, freeze, full, incremental, prune, snapshot, table, trim
from bench.case import Bench, Outcome
from lab.guard import workspace

CASES: dict[str, Callable[[Bench], Outcome]] = {
    "full": full.run,
    "incremental": incremental.run,
    "fleet": fleet.run,
    "footprint": footprint.run,
    "freeze": freeze.run,
    "snapshot": snapshot.run,
    "chain": chain.run,
    "trim": trim.run,
    "prune": prune.run,
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measure the collection beside other tools.")
    parser.add_argument("--quick", action="store_true", help="small disks and one round: does it work at all?")
    parser.add_argument("--only", action="append", choices=CASES, metavar="CASE", help="one of: " + ", ".join(CASES))
    parser.add_argument("--directory", help="where disks and backups go (default: the temporary directory)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every sample there")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    chosen = arguments(words)
    begin = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    with workspace(chosen.directory) as directory:
        bench = Bench(directory, chosen.quick, lambda line: print(line, file=sys.stderr, flush=True))
        for name in chosen.only or CASES:
            outcomes[name] = CASES[name](bench)
    _print(outcomes, bench, time.monotonic() - begin)
    if chosen.json:
        chosen.json.write_text(json.dumps(_plain(outcomes, bench), indent=1) + "\n")
    return 0


def _print(outcomes: dict[str, Outcome], bench: Bench, seconds: float) -> None:
    for outcome in outcomes.values():
        for group in outcome.groups:
            print(table.render(group))
    goals = [goal for outcome in outcomes.values() for goal in outcome.goals]
    if goals:
        print("\ngoals\n" + "\n".join(f"  {goal.line()}" for goal in goals))
    print(f"\nabsent: {'; '.join(bench.absent) or 'no peer'}")
    print(f"measured on {os.cpu_count()} CPUs in {seconds:.0f} s; ratios are medians of pairs within one round")


def _plain(outcomes: dict[str, Outcome], bench: Bench) -> dict[str, Any]:
    return {
        "absent": bench.absent,
        "groups": [table.to_json(group) for outcome in outcomes.values() for group in outcome.groups],
        "goals": [goal.line() for outcome in outcomes.values() for goal in outcome.goals],
    }


if __name__ == "__main__":
    sys.exit(main())
