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
import ctypes
import errno
import json
import math
import os
import resource
import signal
import socket
import typing as t
from dataclasses import dataclass

from .._errors import ImageInUse, ImageToolFailed, ImageToolMissing
from .locks import held, in_use, open_for_writing, unwritten
from .nbd import NbdFailed

_TOOL, _SERVER = "qemu-img", "qemu-nbd"
_NOT_FOUND = 127  # what a shell says
_PRCTL = ctypes.CDLL(None).prctl  # looked up before any fork
_PR_SET_PDEATHSIG = 1
_WORKERS = "16"  # facts: -W -m 16 -t none is the fastest copy there is

# The locks are part of what this file is for; they lie in another one because both are long.
__all__ = ["held", "in_use", "open_for_writing", "unwritten"]


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


async def add_bitmap(path: str, name: str, granularity: int, *, recording: bool = True) -> None:
    """Add an empty persistent bitmap that records from now on to a qcow2 image that nobody has open."""
    disabled = [] if recording else ["--disable"]
    await _checked(["bitmap", "--add", *disabled, "-g", str(granularity), _alone(path, "qcow2"), name], (path,))


async def merge_bitmap(path: str, name: str, source: str, source_name: str) -> None:
    """Add what bitmap ``source_name`` of the image ``source`` has to bitmap ``name``; nobody has either image open."""
    arguments = ["bitmap", "--merge", source_name, "-F", "qcow2", "-b", _alone(source, "qcow2")]
    await _checked([*arguments, _alone(path, "qcow2"), name], (path, source))


async def remove_bitmap(path: str, name: str) -> None:
    """Remove a bitmap, also an inconsistent one, from a qcow2 image that nobody has open."""
    await _checked(["bitmap", "--remove", _alone(path, "qcow2"), name], (path,))


async def mapped(image: Image) -> list[dict[str, t.Any]]:
    """What ``qemu-img map`` says about an image and all below it."""
    options, name = image.arguments("-f")
    text = await _checked(["map", "--output=json", *options, name], (image.path,))
    return t.cast("list[dict[str, t.Any]]", _array(text, image.path))


async def rebase(path: str, backing: Image | None, *, unsafe: bool) -> None:
    """Give the qcow2 image another backing file, in place; the header names it as ``backing.path`` is given.

    Safe, it copies into the image what would look different. Unsafe, it writes the header and opens nothing else.
    """
    arguments = ["rebase", "-q", *(["-u"] if unsafe else []), "-b", "" if backing is None else backing.path]
    if backing is not None:
        arguments += ["-F", backing.format]
    if unsafe:
        await _checked([*arguments, _alone(path, "qcow2")], (path,))
    else:
        await _checked([*arguments, "-f", "qcow2", absolute(path)], (path,))


async def commit(path: str, base: str) -> None:
    """Write what the images above ``base`` hold into it, down the chain that the headers name. They are kept as is."""
    cache = "none" if takes_direct(path) and takes_direct(base) else "writeback"
    await _checked(["commit", "-q", "-d", "-t", cache, "-f", "qcow2", "-b", base, absolute(path)], (base, path))


@contextlib.asynccontextmanager
async def served(image: Image, *, writable: bool) -> t.AsyncIterator[socket.socket]:
    """A connected socket on which qemu-nbd serves the image (and what lies below) over NBD while the block runs.

    It is connected before qemu-nbd starts, which inherits the listening end: nothing to wait for, no file, no name.
    The server ends with the connection, and with this process however that ends.

    :raise ImageToolFailed, ImageInUse: qemu-nbd ended badly; raised instead of what the block says about that.
    """
    options, name = image.arguments("-f")
    cache = "none" if takes_direct(image.path) else "writeback"
    arguments = [*options, f"--cache={cache}", *([] if writable else ["-r"]), name]
    listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with client:
        with listener:
            listener.bind("")  # an address that the kernel makes up, in no file system
            listener.listen(1)
            client.connect(listener.getsockname())
            process = await _start_server(arguments, listener)
        try:
            yield client
        except (OSError, NbdFailed):
            client.close()
            await _served_well(process, image.path)
            raise
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        client.close()
        await _served_well(process, image.path)


async def _start_server(arguments: list[str], listener: socket.socket) -> asyncio.subprocess.Process:
    """qemu-nbd takes a socket the way systemd gives it: as descriptor 3, with its own process id in LISTEN_PID."""
    script = 'exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@"'
    return await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", script, _SERVER, *arguments,
        stdin=listener.fileno(),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
        preexec_fn=_end_with_parent,
    )  # fmt: skip


async def _served_well(process: asyncio.subprocess.Process, path: str) -> None:
    _stdout, stderr = await process.communicate()
    if process.returncode == _NOT_FOUND:
        raise ImageToolMissing(tool=_SERVER)
    if process.returncode:
        said = _last_line(stderr.decode(errors="replace")).removeprefix(f"{_SERVER}: ")
        if open_for_writing(path):
            raise ImageInUse(image=absolute(path), said=said)
        raise ImageToolFailed(tool=_SERVER, image=absolute(path), said=said or f"exit status {process.returncode}")


def _end_with_parent() -> None:
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def takes_direct(path: str) -> bool:
    """Whether the file's file system does O_DIRECT (tmpfs before Linux 6.6, some FUSE ones and eCryptfs do not)."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as exc:
        return exc.errno != errno.EINVAL
    return True


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
    return t.cast("dict[str, t.Any]", _json(text, path, dict))


def _array(text: str, path: str) -> list[t.Any]:
    return t.cast("list[t.Any]", _json(text, path, list))


def _json(text: str, path: str, kind: type) -> t.Any:
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, kind):
        raise ImageToolFailed(tool=_TOOL, image=absolute(path), said="its answer is not the expected JSON")
    return answer


def _summary(stdout: str, path: str) -> str:
    """What a check found, when it said so only in its report."""
    report = _object(stdout, path)
    return f"{report.get('corruptions', 0)} corruptions, {report.get('check-errors', 0)} errors while checking"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix(f"{_TOOL}: ") if lines else ""
