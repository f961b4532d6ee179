# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""When a run left behind counts as the backup that was asked for; and what a run must not take away."""

from __future__ import annotations

import json
import shutil
import typing as t

import pytest

from support.backup import Bench


def answer(bench: Bench, **options: t.Any) -> dict[str, t.Any]:
    found: dict[str, t.Any] = bench.backup(**options).ok().data["vms"][0]
    return found


@pytest.mark.parametrize(
    ("started", "satisfies"),
    [({}, True), ({"level": "copy"}, False), ({"sync": "top"}, False), ({"drives": ["d0"]}, False)],
)
def test_an_adopted_run_counts_if_it_is_what_was_asked_for(
    bench: Bench, started: dict[str, t.Any], satisfies: bool
) -> None:
    running = answer(bench, wait=False, **started)
    assert running["status"] == "running"
    after = answer(bench)
    assert (after["status"], after["backup"] == running["backup"]) == ("published", satisfies)
    assert running["backup"] in bench.ids()  # published in any case
    bench.no_leftovers()


def test_a_copy_that_never_ends_is_no_reason_to_make_no_backup(bench: Bench) -> None:
    bench.backup(sync="none", wait=False).ok()
    result = bench.backup()
    assert result.failed
    assert result.data["vms"][0]["error"]["kind"] == "CopyRunning"
    bench.backup(state="cancelled").ok()
    assert answer(bench)["status"] == "published"


def test_tags_that_no_manifest_can_hold_are_refused_before_anything_is_copied(bench: Bench) -> None:
    for tag in ("", "two\nlines"):
        result = bench.backup(tags=[tag])
        assert result.failed and "tags" in result.msg
    assert bench.entries() == []


@pytest.mark.parametrize("newer", [False, True])
def test_an_unreadable_manifest_takes_no_bitmap_away(bench: Bench, newer: bool) -> None:
    """Read again, its backup is what the next one builds on, as if nothing had been."""
    backup = answer(bench)["backup"]
    manifest = bench.store / backup / "manifest.json"
    kept = bench.store.parent / "manifest.json"
    shutil.copy2(manifest, kept)
    manifest.chmod(0o600)
    manifest.write_text(json.dumps({"format": 2}) if newer else "{", encoding="utf-8")
    bench.change()
    recovered = bench.backup(state="recovered")
    assert recovered.failed is newer
    if newer:
        assert recovered.data["vms"][0]["error"]["kind"] == "FormatUnsupported"
        assert bench.backup().failed
    shutil.move(kept, manifest)
    after = answer(bench)
    assert {drive["parent"] for drive in after["drives"]} == {backup}
    assert after["level"] == "incremental"


def test_an_experts_bitmap_is_cleared_on_all_drives_or_on_none(bench: Bench) -> None:
    for drive in bench.truth:
        bench.vm.command("block-dirty-bitmap-add", node=bench.vm.active_node(drive), name="mine")
    bench.change()
    before = {drive: bench.vm.bitmaps(drive)["mine"]["count"] for drive in bench.truth}
    with bench.stopped("qmp transaction", sync="incremental", bitmap="mine") as running:
        bench.break_target(1)
    assert running.finish().failed
    assert {drive: bench.vm.bitmaps(drive)["mine"]["count"] for drive in bench.truth} == before
    assert min(before.values()) > 0
