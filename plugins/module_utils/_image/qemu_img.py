# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""qemu-img: the only user of subprocesses. One function per subcommand; parsed answers or named errors out.

Formats are always given, never probed. File names are made absolute, so that none can be read as an option (``-x``),
a protocol (``nbd:x``) or options in JSON (``json:{}``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import math
import os
import resource
import struct
import typing as t
from dataclasses import dataclass

from .._errors import FileFailed, ImageInUse, ImageToolFailed, ImageToolMissing

_TOOL = "qemu-img"
_WORKERS = "16"  # facts: -W -m 16 -t none is the fastest copy there is
# QEMU's locks on image files (file-posix.c): byte 100 + n is held by who uses permission n, 1 being "write".
# Byte 200 + n is held by who does not let others use permission n. Together they span all of a user's locks.
_WRITERS_BYTE, _NO_WRITERS_BYTE = 101, 201
_FIRST_BYTE, _BYTES = 100, 200
_OURS_BYTE = 300  # none of QEMU's: two runs of ours keep each other out
_FLOCK = "hhqqi"


@dataclass(frozen=True)
class Image:
    """An image to read. ``backing`` overrides what its header names; without it the header decides."""

    path: str
    format: str
    backing: Image | None = None

    def arguments(self, format_option: str) -> tuple[list[str], str]:
        """Options and file name for the command line."""
        if self.backing is None:
            return [format_option, self.format], absolute(self.path)
        return [], "json:" + json.dumps(self.node())

    def node(self) -> dict[str, t.Any]:
        """QEMU's BlockdevOptions."""
        node: dict[str, t.Any] = {"driver": self.format, "file": {"driver": "file", "filename": absolute(self.path)}}
        return node if self.backing is None else {**node, "backing": self.backing.node()}


def absolute(path: str) -> str:
    """An absolute path (``..`` is kept: behind a link it would mean something else)."""
    return os.path.join(os.getcwd(), path)


@dataclass(frozen=True)
class Limits:
    """What qemu-img may use on an image nobody vouches for: seconds (of time, of processor), bytes of memory."""

    seconds: float = 60.0
    memory: int = 4 << 30


async def info(
    path: str, fmt: str = "qcow2", *, shared: bool = False, limits: Limits | None = None
) -> dict[str, t.Any]:
    """What ``qemu-img info`` says about this one file; its backing files are not opened.

    Check foreign images with :func:`..header.read_header` first: old releases open an external data file here.
    ``shared`` reads also what a QEMU is writing, and may then see it between two changes.
    """
    arguments = ["info", "--output=json", *(["-U"] if shared else []), "-f", fmt, absolute(path)]
    return _object(await _checked(arguments, (path,), limits=limits), path)


async def check_report(path: str, fmt: str = "qcow2", *, limits: Limits | None = None) -> dict[str, t.Any]:
    """The report of :func:`check`, also of an image that it found damaged.

    :raise ImageToolFailed: it cannot be checked.
    """
    arguments = ["check", "--output=json", _alone(path, fmt)]
    rc, stdout, stderr = await _run(arguments, limits=limits)
    if rc not in (0, 2, 3):
        raise _failure(arguments, (path,), _last_line(stderr) or _last_line(stdout) or f"exit status {rc}")
    return _object(stdout, path)


async def check(path: str, fmt: str = "qcow2") -> dict[str, t.Any]:
    """Check the consistency of one image; backing files are not opened. The report, also when it found leaks (rc 3).

    :raise ImageToolFailed: the image is damaged, or cannot be checked.
    """
    arguments = ["check", "--output=json", _alone(path, fmt)]
    rc, stdout, stderr = await _run(arguments)
    if rc not in (0, 3):
        raise _failure(arguments, (path,), _last_line(stderr) or _summary(stdout, path))
    return _object(stdout, path)


async def convert(
    source: Image,
    target: str,
    target_format: str,
    *,
    options: t.Mapping[str, str] | None = None,
    pass_fds: t.Sequence[int] = (),
) -> None:
    """Copy the content of ``source`` and all below it into the new file ``target``, sparsely, past the page cache.

    ``target`` exists and is empty (made by the caller, with owner and mode). ``options`` are creation options of the
    target's format. ``pass_fds`` stay open in qemu-img, so that a lock on them lasts as long as it writes.
    """
    source_options, name = source.arguments("-f")
    arguments = ["convert", *source_options, "-O", target_format, "-W", "-m", _WORKERS]
    # "-t writeback", not the default "unsafe": errors of writing back must not get lost.
    arguments += [
        "-t",
        "none" if takes_direct(target) else "writeback",
        "-T",
        "none" if takes_direct(source.path) else "writeback",
    ]
    for key, value in (options or {}).items():
        arguments += ["-o", f"{key}={value.replace(',', ',,')}"]
    await _checked([*arguments, name, absolute(target)], (source.path, target), pass_fds=pass_fds)


async def create(
    path: str,
    fmt: str,
    size: int | None = None,
    *,
    backing: Image | None = None,
    options: t.Mapping[str, str] | None = None,
) -> None:
    """Make an image of ``size`` bytes (default: the size of ``backing``); the header names ``backing`` as it is given.

    A relative backing name is relative to the directory of ``path``.
    """
    arguments = ["create", "-q", "-f", fmt]
    for key, value in (options or {}).items():
        arguments += ["-o", f"{key}={value.replace(',', ',,')}"]
    if backing is not None:
        arguments += ["-b", backing.path, "-F", backing.format]
    arguments += [absolute(path)] + ([] if size is None else [str(size)])
    await _checked(arguments, (path,))


async def compare(a: Image, b: Image) -> bool:
    """True when the guest would read the same from both; both must not be open for writing elsewhere.

    Of images of different size the rest of the longer must read as zeroes.
    """
    a_options, a_name = a.arguments("-f")
    b_options, b_name = b.arguments("-F")
    cache = "none" if takes_direct(a.path) and takes_direct(b.path) else "writeback"
    arguments = ["compare", "-q", "-T", cache, *a_options, *b_options, a_name, b_name]
    rc, _stdout, stderr = await _run(arguments)
    if rc not in (0, 1):
        raise _failure(arguments, (b.path, a.path), _last_line(stderr))
    return rc == 0


async def measure(source: Image, target_format: str, options: t.Mapping[str, str] | None = None) -> int:
    """Bytes a copy of ``source`` and all below it needs at most on the target's file system."""
    source_options, name = source.arguments("-f")
    arguments = ["measure", "--output=json", *source_options, "-O", target_format]
    for key, value in (options or {}).items():
        arguments += ["-o", f"{key}={value.replace(',', ',,')}"]
    report = _object(await _checked([*arguments, name], (source.path,)), source.path)
    return int(report["required"])


async def snapshot(path: str, action: t.Literal["create", "apply", "delete"], name: str) -> None:
    """Work on internal snapshot ``name`` of a qcow2 image that nobody has open. What lies below it is not opened.

    Of several of one name, QEMU takes the first. An image that has any bitmap cannot be taken back to a snapshot
    ("Device has active dirty bitmaps", also for a disabled or an empty one; measured with 7.2).
    """
    await _checked(["snapshot", "-q", f"-{action[0]}", name, _alone(path, "qcow2")], (path,))


async def add_bitmap(path: str, name: str, granularity: int) -> None:
    """Add an empty persistent bitmap that records from now on to a qcow2 image that nobody has open."""
    await _checked(["bitmap", "--add", "-g", str(granularity), _alone(path, "qcow2"), name], (path,))


async def remove_bitmap(path: str, name: str) -> None:
    """Remove a bitmap, also an inconsistent one, from a qcow2 image that nobody has open."""
    await _checked(["bitmap", "--remove", _alone(path, "qcow2"), name], (path,))


def takes_direct(path: str) -> bool:
    """Whether the file's file system does O_DIRECT (tmpfs before Linux 6.6, some FUSE ones and eCryptfs do not)."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as exc:
        return exc.errno != errno.EINVAL
    return True


def open_for_writing(path: str) -> bool:
    """Whether a QEMU (any process that locks images the way QEMU does) has the image open for writing."""
    return _locked(path, _WRITERS_BYTE, 1)


def in_use(path: str) -> bool:
    """Whether a QEMU has the image open at all, be it as the backing image of a VM that was restored instantly."""
    return _locked(path, _FIRST_BYTE, _BYTES)


@contextlib.contextmanager
def held(path: str) -> t.Iterator[None]:
    """Keep QEMUs from opening the image for writing, and other runs of ours from working on it, while the block runs.

    Where a file system has no locks this does nothing.

    :raise ImageInUse: somebody writes to it, or another run holds it, or has just replaced it.
    :raise FileFailed: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        raise FileFailed(path=path, doing="opening the image", reason=exc.strerror or str(exc)) from exc
    try:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _OURS_BYTE, 1, 0))
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, _NO_WRITERS_BYTE, 1, 0))
        except OSError as exc:
            if exc.errno in (errno.EACCES, errno.EAGAIN):
                raise ImageInUse(image=absolute(path), said="another run of this collection works on it") from exc
        # As QEMU does it: first the lock, then the look.
        if open_for_writing(path) or not os.path.samestat(os.fstat(fd), os.stat(path)):
            raise ImageInUse(image=absolute(path), said="its lock for writing is held, or it was just replaced")
        yield
    finally:
        os.close(fd)


def _locked(path: str, start: int, length: int) -> bool:
    """Whether anybody holds a lock on these bytes, asked without taking one."""
    probe = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe)
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(fd)


def _alone(path: str, fmt: str) -> str:
    """A file name for qemu-img that keeps it from opening what lies below.

    Left alone, it opens the backing files too, and fails when one is missing (measured with check of 7.2).
    """
    node = Image(path, fmt).node()
    return "json:" + json.dumps({**node, "backing": None} if fmt == "qcow2" else node)


async def _checked(
    arguments: list[str], paths: t.Sequence[str], pass_fds: t.Sequence[int] = (), limits: Limits | None = None
) -> str:
    """Run it and return its output. ``paths`` are the files that may be in use, the likeliest first."""
    rc, stdout, stderr = await _run(arguments, pass_fds, limits)
    if rc != 0:
        raise _failure(arguments, paths, _last_line(stderr) or f"exit status {rc}")
    return stdout


def _failure(arguments: list[str], paths: t.Sequence[str], said: str) -> ImageInUse | ImageToolFailed:
    """In use or broken? The locks tell; the message is for people (and its words change between releases)."""
    for path in paths:
        if open_for_writing(path):
            return ImageInUse(image=absolute(path), said=said)
    return ImageToolFailed(tool=f"{_TOOL} {arguments[0]}", image=absolute(paths[0]), said=said)


async def _run(
    arguments: list[str], pass_fds: t.Sequence[int] = (), limits: Limits | None = None
) -> tuple[int, str, str]:
    """Exit status, stdout, stderr. Cancelled, it ends the child before it returns."""
    try:
        process = await asyncio.create_subprocess_exec(
            _TOOL,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
            pass_fds=tuple(pass_fds),
        )
    except FileNotFoundError as exc:
        raise ImageToolMissing(tool=_TOOL) from exc
    except PermissionError as exc:
        raise ImageToolFailed(tool=_TOOL, image=arguments[-1], said=str(exc.strerror)) from exc
    seconds = _limit(process.pid, limits)
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(), seconds)
    except (asyncio.CancelledError, asyncio.TimeoutError) as exc:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(exc, asyncio.CancelledError):
            raise
        said = f"it gave no answer within {seconds:g} s and was ended"
        raise ImageToolFailed(tool=_TOOL, image=arguments[-1], said=said) from exc
    return process.returncode or 0, stdout.decode(errors="replace"), stderr.decode(errors="replace")


def _limit(pid: int, limits: Limits | None) -> float | None:
    """Bound what the child may use from here on. The seconds to wait for it; ``None``: as long as it takes."""
    if limits is None:
        return None
    processor = math.ceil(limits.seconds) + 1
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_AS, (limits.memory, limits.memory))
        resource.prlimit(pid, resource.RLIMIT_CPU, (processor, processor))
    return limits.seconds


def _object(text: str, path: str) -> dict[str, t.Any]:
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ImageToolFailed(tool=_TOOL, image=absolute(path), said="its answer is not the expected JSON")
    return answer


def _summary(stdout: str, path: str) -> str:
    """What a check found, when it said so only in its report."""
    report = _object(stdout, path)
    return f"{report.get('corruptions', 0)} corruptions, {report.get('check-errors', 0)} errors while checking"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix(f"{_TOOL}: ") if lines else ""
