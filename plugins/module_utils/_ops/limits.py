# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The limits that many operations let the user set: time-outs and bandwidth."""

from __future__ import annotations

import typing as t


def wrong_limits(
    times: t.Mapping[str, float], job_timeout: float | None = None, bandwidth: int | None = None
) -> str | None:
    """Why they cannot be meant, or ``None``. ``times``: those that must not be 0, by option."""
    if bandwidth is not None and bandwidth < 1:
        return "bandwidth must be at least 1 byte per second; omit it for no limit."
    for name, seconds in times.items():
        if seconds <= 0:
            return f"{name} must be more than 0 seconds, not {seconds:g}."
    if job_timeout is not None and job_timeout < 0:
        return f"job_timeout must not be negative, not {job_timeout:g}."
    return None
