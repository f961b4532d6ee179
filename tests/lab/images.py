# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Disk images by qemu-img and qemu-io: making, filling and, above all, judging them independently of the product."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

_BLOCK = 8 * 1024 * 1024
_STAMP_EVERY = 4096


class ImageToolFailed(Exception):
    """qemu-img or qemu-io said no; carries its words."""


def _tool(name: str) -> str:
    """The tool next to ``$BLOCKOPS_QEMU`` when that is set and complete, else from PATH."""
    chosen = os.environ.get("BLOCKOPS_QEMU")
    if chosen:
        sibling = Path(chosen).parent / name
        if sibling.exists():
            return str(sibling)
    return name


def run_tool(name: str, *arguments: str | Path, accept: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run an image tool; any exit code outside ``accept`` raises ImageToolFailed."""
    argv = [_tool(name), *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode not in accept:
        raise ImageToolFailed(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr or done.stdout}")
    return done


def create(
    path: str | Path,
    size: int | str | None = None,
    fmt: str = "qcow2",
    backing: str | Path | None = None,
    backing_fmt: str | None = None,
    **options: object,
) -> Path:
    """qemu-img create. ``size`` in bytes (or qemu-img's "64M"), omitted = the backing image's.

    ``options`` are the format's, as qemu-img spells them (cluster_size, data_file, ...).
    """
    arguments: list[str | Path] = ["create", "-q", "-f", fmt]
    if backing is not None:
        arguments += ["-b", backing, "-F", backing_fmt or "qcow2"]
    for key, value in options.items():
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
        arguments += ["-o", f"{key}={text.replace(',', ',,')}"]
    arguments.append(path)
    if size is not None:
        arguments.append(str(size))
    run_tool("qemu-img", *arguments)
    return Path(path)


def fill(path: str | Path, writes: Iterable[tuple[int, int, int]], fmt: str = "qcow2") -> None:
    """Write (offset, length, pattern byte) triples into an image that nobody has open."""
    arguments: list[str | Path] = ["-f", fmt]
    for offset, length, pattern in writes:
        arguments += ["-c", f"write -q -P {pattern} {offset} {length}"]
    done = run_tool("qemu-io", *arguments, path)
    if done.stdout.strip() or done.stderr.strip():  # some qemu-io failures keep exit code 0
        raise ImageToolFailed(f"qemu-io {path}: {done.stdout}{done.stderr}")


def fill_random(path: str | Path, nbytes: int, seed: int, *, offset: int = 0, fmt: str = "qcow2") -> None:
    """Put ``nbytes`` of incompressible, deterministic data at ``offset``; every 4 KiB block differs from all others.

    O_DIRECT where the file system allows it, so that gigabytes for a benchmark leave the page cache alone.
    A formatted image gets the data through a raw file beside it and ``qemu-img convert -n``; what it held is lost.
    """
    if fmt == "raw":
        _write_random(Path(path), nbytes, seed, offset)
        return
    size = int(info(path)["virtual-size"])
    with tempfile.NamedTemporaryFile(dir=Path(path).parent, prefix=".fill-") as raw:
        os.truncate(raw.name, size)
        _write_random(Path(raw.name), nbytes, seed, offset)
        mode = "none" if _direct_possible(Path(path).parent) else "writeback"
        convert = ["convert", "-n", "-W", "-m", "16", "-t", mode, "-T", mode, "-f", "raw", "-O", fmt]
        run_tool("qemu-img", *convert, raw.name, path)


def _direct_possible(directory: Path) -> bool:
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".direct-") as probe:
        try:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            return False
        return True


def _write_random(path: Path, nbytes: int, seed: int, offset: int) -> None:
    """One random block from the seed, rewritten with a stamp in each 4 KiB: disk speed, not Mersenne-twister speed."""
    aligned = nbytes % 4096 == 0 and offset % 4096 == 0 and _direct_possible(path.parent)
    flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if aligned else 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        with closing(mmap.mmap(-1, _BLOCK)) as buffer, memoryview(buffer) as view:  # page aligned for O_DIRECT
            view[:] = random.Random(seed).randbytes(_BLOCK)
            for position in range(0, nbytes, _BLOCK):
                for stamp in range(0, _BLOCK, _STAMP_EVERY):
                    view[stamp : stamp + 8] = (position + stamp).to_bytes(8, "big")
                length = min(_BLOCK, nbytes - position)
                if os.pwrite(descriptor, view[:length], offset + position) != length:
                    raise OSError(errno.EIO, "short write", str(path))
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def compare(
    a: str | Path,
    b: str | Path,
    fmt_a: str = "qcow2",
    fmt_b: str = "qcow2",
    *,
    strict: bool = False,
    shared: bool = False,
) -> bool:
    """Do two images (whole chains) hold the same data? Never of a running VM: unflushed L2 tables
    look like differences.

    ``strict`` makes different sizes a difference too. ``shared`` is for images that a QEMU keeps open for writing
    and no longer writes to.
    """
    extra = ["-s"] if strict else []
    extra += ["-U"] if shared else []
    done = run_tool("qemu-img", "compare", *extra, "-f", fmt_a, "-F", fmt_b, a, b, accept=(0, 1))
    return done.returncode == 0


def check(path: str | Path, fmt: str = "qcow2") -> dict[str, Any]:
    """qemu-img check's report; ImageToolFailed for an image it cannot read. Sound = no corruptions, no leaks."""
    done = run_tool("qemu-img", "check", "-f", fmt, "--output=json", path, accept=(0, 2, 3))
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def info(path: str | Path, fmt: str | None = None) -> dict[str, Any]:
    """qemu-img info of one image, also while a VM has it open."""
    chosen = ["-f", fmt] if fmt else []
    report: dict[str, Any] = json.loads(run_tool("qemu-img", "info", "-U", *chosen, "--output=json", path).stdout)
    return report


def chain(path: str | Path) -> list[str]:
    """File names from the active image down to the base, as qemu-img resolves them."""
    done = run_tool("qemu-img", "info", "-U", "--backing-chain", "--output=json", path)
    return [str(image["filename"]) for image in json.loads(done.stdout)]


def bitmaps(path: str | Path) -> dict[str, list[str]]:
    """Persistent bitmaps stored in a qcow2: name -> flags ("auto" = enabled, "in-use" = not closed properly)."""
    data = info(path, "qcow2").get("format-specific", {}).get("data", {})
    return {str(bitmap["name"]): list(bitmap["flags"]) for bitmap in data.get("bitmaps", [])}
