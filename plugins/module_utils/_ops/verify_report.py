# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What a verification answers about each backup. Pure."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from .._errors import BlockOpsError
from .._repository.names import timestamp
from .._repository.verified import DRILL, FAILED, PASSED, VERIFIED, Verification
from .verify_types import Refused, Target, VerificationFailed


@dataclass(frozen=True)
class Result:
    """About one backup. ``known`` is what is known of it now; ``outcome`` is ``None`` when nothing was found out."""

    item: Target | Refused
    changed: bool = False
    outcome: str | None = None
    known: Verification | None = None
    seconds: float = 0.0
    without_checksum: tuple[str, ...] = ()
    error: BlockOpsError | None = None

    @property
    def name(self) -> str:
        item = self.item
        return f"{item.store.name}/{item.manifest.id}" if isinstance(item, Target) else f"{item.vm}/{item.backup}"

    def warnings(self) -> list[str]:
        return [f"{path} has no checksum to compare with." for path in self.without_checksum]

    def entry(self) -> dict[str, t.Any]:
        """Its entry in ``backups``."""
        answer = self._of_refused(self.item) if isinstance(self.item, Refused) else self._of_target(self.item)
        return answer if self.error is None else {**answer, "error": self.error.to_result()}

    def _of_refused(self, refused: Refused) -> dict[str, t.Any]:
        nothing = dict.fromkeys(("point", "level", "outcome", "due", "seconds_to_boot", "record"))
        empty: dict[str, t.Any] = {"checks": [], "images": 0, "without_checksum": [], "seconds": 0.0}
        return {"vm": refused.vm, "backup": refused.backup, "changed": False, **nothing, **empty}

    def _of_target(self, target: Target) -> dict[str, t.Any]:
        record = os.path.join(target.directory, VERIFIED)
        drill = self.known.check(DRILL) if self.known is not None else None
        return {
            "vm": target.store.name,
            "backup": target.manifest.id,
            "point": timestamp(target.manifest.point),
            "level": target.manifest.level,
            "changed": self.changed,
            "outcome": self.outcome,
            "due": target.due,
            "checks": [] if self.known is None else [check.to_result() for check in self.known.checks],
            "images": len({(link.id, drive.file) for links in target.chains for link, drive in links}),
            "without_checksum": list(self.without_checksum),
            "seconds": round(self.seconds, 3),
            "seconds_to_boot": drill.seconds if drill is not None and drill.outcome == PASSED else None,
            "record": record if os.path.lexists(record) else None,
        }


def before(target: Target) -> dict[str, t.Any] | None:
    """For diff mode: the record as it was."""
    return None if target.known is None else {**_summary(target.known), "finished": timestamp(target.known.finished)}


def after(result: Result, checks: t.Sequence[str]) -> dict[str, t.Any] | None:
    """For diff mode: the record as it is now or, in check mode, will be if nothing is found wrong."""
    target = result.item
    if not isinstance(target, Target):
        return None
    if not result.changed:
        return before(target)
    if result.outcome is not None and result.known is not None:
        return {**_summary(result.known), "finished": "now"}
    outcomes = {check.name: check.outcome for check in (target.known.checks if target.known else ())}
    expected = {"chain": FAILED} if target.broken else dict.fromkeys(("chain", *checks), PASSED)
    outcomes.update(expected)
    return {"outcome": FAILED if FAILED in outcomes.values() else PASSED, "checks": outcomes, "finished": "now"}


def _summary(known: Verification) -> dict[str, t.Any]:
    return {"outcome": known.outcome, "checks": {check.name: check.outcome for check in known.checks}}


def error_of(results: t.Sequence[Result]) -> BlockOpsError | None:
    """The error of the whole: that of the only backup, or all of them."""
    failed = [result for result in results if result.error is not None]
    if len(results) == 1 or not failed:
        return failed[0].error if failed else None
    reasons = " | ".join(f"{result.name}: {result.error}" for result in failed)
    return VerificationFailed(failed=len(failed), total=len(results), reasons=reasons)
