# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The VMs that are backed up: paused QEMUs with one disk each, every one in a directory of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import images
from lab.drive import Drive
from lab.qemu import Qemu

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """One VM; ``size`` is its disk's, in bytes."""

    qemu: Qemu
    size: int

    @property
    def image(self) -> Path:
        return Path(str(self.qemu.drives["d0"].image))

    @property
    def node(self) -> str:
        return self.qemu.drives["d0"].node

    def entry(self) -> dict[str, Any]:
        """As the option ``vms`` wants it."""
        return {"name": self.qemu.name, "socket": str(self.qemu.socket)}

    def dirty(self, amount: int, seed: int) -> None:
        """Write ``amount`` bytes as the guest would, 1 MiB at a time, to random places that do not overlap."""
        for place in places(amount, self.size, seed):
            self.qemu.write("d0", place * MIB, MIB, 1 + seed % 255)
        self.qemu.flush("d0")


def places(amount: int, size: int, seed: int) -> list[int]:
    """Random, distinct MiBs of a disk of ``size`` bytes that make up ``amount`` bytes."""
    return random.Random(seed).sample(range(size // MIB), amount // MIB)


def make_disk(path: Path, size: int, data: int, seed: int) -> Path:
    """A qcow2 whose first ``data`` bytes are random; the rest was never written."""
    images.create(path, size)
    if data:
        images.fill_random(path, data, seed)
    return path


@contextmanager
def machine(directory: Path, size: int, data: int, name: str = "vm", seed: int = 1) -> Iterator[Machine]:
    """One VM, started."""
    with machines(directory, [size], data, name, seed) as made:
        yield made[0]


@contextmanager
def machines(
    directory: Path, sizes: Sequence[int], data: int, name: str = "vm", seed: int = 1
) -> Iterator[list[Machine]]:
    """One VM for each size."""
    with ExitStack() as stack:
        made = []
        for number, size in enumerate(sizes):
            home = directory / f"{name}{number}"
            home.mkdir()
            disk = make_disk(home / "d0.qcow2", size, data, seed + number)
            qemu = Qemu(f"{name}{number}", [Drive("d0", disk)], home)
            stack.callback(qemu.close)
            made.append(Machine(qemu, size))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda machine: machine.qemu.start(), made))
        yield made
