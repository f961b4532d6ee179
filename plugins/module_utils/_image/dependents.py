# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Which images are based on a file: found by reading headers, before the file is removed or replaced.

Only what the given directories hold is found. An image elsewhere (another host's, an unmounted one's) can be based on
the file all the same, so this refuses mistakes, and proves nothing.
"""

from __future__ import annotations

import json
import os
import typing as t

from .._errors import ImageInvalid
from .header import read_header

_JSON, _FILE = "json:", "file:"


def dependents(path: str, directories: t.Iterable[str]) -> list[str]:
    """The files in ``directories`` (not below them) whose backing file is ``path``; unreadable ones are skipped.

    A backing name is understood in every way QEMU could: relative to where the overlay lies and to where a link to it
    lies, and as ``file:`` and ``json:`` names.
    """
    found = set()
    identity = _identity(path)
    for directory in {os.path.realpath(directory) for directory in directories}:
        for name in _names(directory):
            candidate = os.path.join(directory, name)
            if any(_same(lower, path, identity) for lower in backing_paths(candidate)):
                found.add(candidate)
    return sorted(found)


def backing_paths(overlay: str) -> set[str]:
    """Every path that the header of ``overlay`` could mean as its backing file; none for what is no qcow2 image."""
    real = os.path.realpath(overlay)
    try:
        name = read_header(real).backing_file
    except ImageInvalid:
        return set()
    directories = {os.path.dirname(real), os.path.dirname(os.path.abspath(overlay))}
    return {os.path.join(directory, plain) for plain in _plain(name or "") for directory in directories}


def _plain(name: str) -> set[str]:
    """The file names in a backing name."""
    if name.startswith(_JSON):
        try:
            return set(_filenames(json.loads(name[len(_JSON) :])))
        except (ValueError, RecursionError):
            return set()
    return {part for part in (name, name[len(_FILE) :] if name.startswith(_FILE) else "") if part}


def _filenames(node: t.Any) -> t.Iterator[str]:
    """Whatever a JSON description of a node calls a filename, nested or dotted (``file.filename``)."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, str) and key.rsplit(".", 1)[-1] == "filename":
            yield from _plain(value)
        else:
            yield from _filenames(value)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _same(candidate: str, path: str, identity: tuple[int, int] | None) -> bool:
    """The same file by name, or (links of either kind) by what the name leads to."""
    if "\0" in candidate:
        return False
    if os.path.realpath(candidate) == os.path.realpath(path):
        return True
    return identity is not None and _identity(candidate) == identity
