# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""`make demo` tells the truth, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guest import GuestImage
from lab.process import interruptible
from lab.reaper import processes_with

ROOT = Path(__file__).resolve().parents[2]


def start(scratch: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        interruptible([str(ROOT / "scripts" / "demo")]),
        env={**os.environ, "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def gone(scratch: Path, seconds: float = 10.0) -> bool:
    """Neither files nor processes of the demo are left (the reaper may need a moment)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not os.listdir(scratch) and not processes_with(f"{scratch}/"):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Where the demo makes its temporary directory; short, for the sockets."""
    directory = Path(tempfile.mkdtemp(prefix="d-"))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.timeout(300)
def test_demo(scratch: Path, guest_image: GuestImage) -> None:
    process = start(scratch)
    output, _err = process.communicate(timeout=280)
    assert process.returncode == 0, output
    assert re.search(r"^restored data: identical \(sha256 [0-9a-f]{64}\)$", output, flags=re.MULTILINE), output
    rows = re.findall(r"^(web|db) +\w+-\w+ +(full|incremental) +filesystem +([\d,]+) ", output, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [(name, level) for name in ("db", "web") for level in ("full", "incremental")]
    copied = [int(row[2].replace(",", "")) for row in rows]
    assert copied[1] < copied[0] / 10
    assert copied[3] < copied[2] / 10
    assert gone(scratch)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_demo_cleans_up(scratch: Path, guest_image: GuestImage, number: signal.Signals) -> None:
    process = start(scratch)
    for line in process.stdout or ():
        if "Make the virtual environment" in line:  # Ansible runs, two VMs run
            break
    process.send_signal(number)
    output, _err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), output
    assert gone(scratch), f"{os.listdir(scratch)} {processes_with(str(scratch))}"
