# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The tables that `make bench` prints, and the same as JSON."""

from __future__ import annotations

from typing import Any

from bench.measure import Group

_HEAD = ("contender", "median s", "min-max", "MB/s", "ratio")


def render(group: Group) -> str:
    """One group as text; the ratio is to the group's reference, pairwise within the rounds."""
    notes = [f"  {note}" for note in group.notes]
    if not group.samples:
        return "\n".join([f"\n{group.title}", *notes])
    rows = [_HEAD, *(_row(group, name) for name in group.samples)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [f"\n{group.title}"]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join([*lines, *notes])


def _row(group: Group, name: str) -> tuple[str, ...]:
    values = group.samples[name].values()
    median = group.median(name)
    speed = "" if group.amount is None or name in group.copies_nothing else f"{group.amount / median / 1e6:.0f}"
    ratio = "1" if name == group.reference else ""
    if not ratio and group.reference in group.samples:
        ratio = f"{group.ratio(name):.2f}"
    return name, f"{median:.2f}", f"{min(values):.2f}-{max(values):.2f}", speed, ratio


def to_json(group: Group) -> dict[str, Any]:
    """The group with every sample, for later comparison."""
    return {
        "title": group.title,
        "reference": group.reference,
        "amount": group.amount,
        "notes": group.notes,
        "contenders": {
            name: {"median": group.median(name), "samples": list(samples.values())}
            for name, samples in group.samples.items()
        },
    }
