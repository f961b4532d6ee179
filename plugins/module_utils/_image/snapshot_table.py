# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Whether a qcow2 image still is what it was, told from its first-level tables. Reads an image that nobody has open.

A snapshot's table points to second-level tables that are never changed while it does: whoever writes to the image
gets a copy, and its active table another entry. So equal tables mean equal content, exactly and without reading any;
and an overlay whose table is empty has nothing of its own. Layout: docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import os
import struct

from .._errors import ImageInvalid

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_INCOMPATIBLE, _EXTENDED = 72, 1 << 4
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQ")  # size of the VM state, size of the disk
_COPIED = 1 << 63  # "not shared": of the entry, not of the data
_LARGEST_TABLE = 32 << 20  # QEMU's own limit
_MOST_SNAPSHOTS = 65536


def at_snapshot(path: str, snapshot: str) -> bool:
    """Whether the disk in the image is exactly the one of the internal snapshot with the id ``snapshot``.

    :raise ImageInvalid: the tables cannot be read.
    """
    with _Tables(path) as tables:
        found = tables.snapshot(snapshot)
        if found is None:
            return False
        offset, entries, size = found
        if size is not None and size != tables.size:
            return False
        return tables.disk(tables.offset, tables.entries) == tables.disk(offset, entries)


def has_data(path: str) -> bool:
    """Whether the image itself holds anything (zeroes that hide what lies below it included).

    :raise ImageInvalid: the tables cannot be read.
    """
    with _Tables(path) as tables:
        return any(tables.disk(tables.offset, tables.entries))


class _Tables:
    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> _Tables:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as exc:
            raise self._invalid(exc.strerror or str(exc)) from exc
        self._stream = os.fdopen(fd, "rb")
        header = self._at(0, _HEADER.size)
        (magic, version, _backing, _length, bits, self.size, _crypt, self.entries, self.offset, _refcounts, _clusters,
         self._snapshots, self._snapshots_offset) = _HEADER.unpack(header)  # fmt: skip
        if magic != b"QFI\xfb" or not 9 <= bits <= 21:
            raise self._invalid("it is not a qcow2 image")
        features = struct.unpack(">Q", self._at(_INCOMPATIBLE, 8))[0] if version >= 3 else 0
        # One entry covers one table of one cluster, whose entries cover one cluster each.
        self._covers = (1 << bits) // (16 if features & _EXTENDED else 8) << bits
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stream.close()

    def disk(self, offset: int, entries: int) -> list[int]:
        """The entries that hold the disk, the rest being the state of a VM; as many as the disk needs."""
        needed = -(-self.size // self._covers)
        held = min(needed, entries)
        if held * 8 > _LARGEST_TABLE:
            raise self._invalid("its first-level table is too large")
        read: list[int] = [entry & ~_COPIED for entry in struct.unpack(f">{held}Q", self._at(offset, held * 8))]
        return read + [0] * min(needed - held, _LARGEST_TABLE)

    def snapshot(self, wanted: str) -> tuple[int, int, int | None] | None:
        """Offset and number of the entries, and the size of the disk, of the snapshot with this id."""
        position = self._snapshots_offset
        for _number in range(min(self._snapshots, _MOST_SNAPSHOTS)):
            fields = _SNAPSHOT.unpack(self._at(position, _SNAPSHOT.size))
            offset, entries, id_length, name_length, extra_length = (
                fields[0],
                fields[1],
                fields[2],
                fields[3],
                fields[8],
            )
            extra = self._at(position + _SNAPSHOT.size, min(extra_length, _EXTRA.size))
            size = _EXTRA.unpack(extra)[1] if len(extra) == _EXTRA.size else None
            position += _SNAPSHOT.size + extra_length
            if self._at(position, id_length) == wanted.encode():
                return offset, entries, size
            position = (position + id_length + name_length + 7) & ~7
        return None

    def _at(self, position: int, length: int) -> bytes:
        try:
            self._stream.seek(position)
            data = self._stream.read(length)
        except (OSError, OverflowError, ValueError) as exc:
            raise self._invalid(str(exc)) from exc
        if len(data) != length:
            raise self._invalid("it is cut off")
        return data

    def _invalid(self, reason: str) -> ImageInvalid:
        return ImageInvalid(path=self._path, reason=reason)
