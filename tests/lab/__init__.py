# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Real QEMUs for tests, demo and benchmarks. Knows nothing about the product, so that it can judge it."""

from __future__ import annotations
