# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""What an operation answers: data for a module's result, never a call into Ansible."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from .._errors import BlockOpsError


@dataclass(frozen=True)
class Outcome:
    """Result of one operation on one thing (a VM, a repository, a restored point).

    ``result`` holds the documented return values; ``before`` and ``after`` are plain data for diff mode; ``error``
    does not exclude a ``result``: what is known when something fails is returned with it.
    """

    changed: bool
    result: dict[str, t.Any] = field(default_factory=dict)
    before: t.Any = None
    after: t.Any = None
    warnings: tuple[str, ...] = ()
    error: BlockOpsError | None = None
