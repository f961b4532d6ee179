# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the survival tests."""

from __future__ import annotations

import typing as t
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.backup import Bench, BenchFactory


@pytest.fixture
def bench_factory(workdir: Path) -> Iterator[BenchFactory]:
    """Benches in one directory; their QEMUs end with the test."""
    with ExitStack() as stack:

        def make(disks: int = 2, **options: t.Any) -> Bench:
            bench = Bench(workdir, disks, **options)
            stack.callback(bench.vm.close)
            return bench

        yield make


@pytest.fixture
def bench(bench_factory: BenchFactory) -> Bench:
    """A VM with two drives and an empty repository."""
    return bench_factory()
