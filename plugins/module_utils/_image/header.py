# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""The header of a qcow2 file, read without opening the image.

QEMU opens what a header names (backing files, external data files) as soon as it opens the image, and old releases do
so even for ``qemu-img info``. An image that others could have changed is therefore looked at here first. Layout:
docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass

from .._errors import ImageInvalid

_HEADER = struct.Struct(">4sIQIIQI")  # magic, version, backing offset and length, cluster bits, size, encryption
_FEATURES = struct.Struct(">QQQII")  # v3: incompatible, compatible, autoclear, refcount order, header length
_EXTENSION = struct.Struct(">II")
_V2_LENGTH = 72
_LIMIT = 1 << 21  # header, extensions and backing name lie in the first cluster, 2 MiB at most
_LONGEST_NAME = 1023
_BACKING_FORMAT, _DATA_FILE_NAME = 0xE2792ACA, 0x44415441
_DIRTY, _CORRUPT, _DATA_FILE = 1, 2, 4


@dataclass(frozen=True)
class Header:
    """What a qcow2 header says; ``virtual_size`` in bytes. ``data_file_name`` is where the data is, if not in here."""

    version: int
    virtual_size: int
    backing_file: str | None
    backing_format: str | None
    encrypted: bool
    data_file: bool
    corrupt: bool
    data_file_name: str | None = None


def read_header(path: str) -> Header:
    """Read the header of the regular file ``path`` (a link is refused).

    :raise ImageInvalid: it is no qcow2 file, or its header makes no sense.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb", buffering=0) as stream:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ImageInvalid(path=path, reason="it is not a regular file")
            start = stream.read(_V2_LENGTH + _FEATURES.size)
            return _parse(path, start + (stream.read(_header_rest(path, start)) or b""))
    except OSError as exc:
        raise ImageInvalid(path=path, reason=f"it cannot be read: {exc.strerror or exc}") from exc


def _header_rest(path: str, start: bytes) -> int:
    """How many bytes more the first cluster has."""
    if len(start) < _V2_LENGTH or start[:4] != b"QFI\xfb":
        raise ImageInvalid(path=path, reason="it is not a qcow2 image")
    cluster_bits: int = _HEADER.unpack_from(start)[4]
    if not 9 <= cluster_bits <= 21:
        raise ImageInvalid(path=path, reason=f"its clusters have 2^{cluster_bits} bytes")
    return max(min(1 << cluster_bits, _LIMIT) - len(start), 0)


def _parse(path: str, data: bytes) -> Header:
    _magic, version, offset, length, _bits, size, crypt = _HEADER.unpack_from(data)
    if version not in (2, 3):
        raise ImageInvalid(path=path, reason=f"its qcow2 version is {version}")
    features, header_length = 0, _V2_LENGTH
    if version == 3:
        if len(data) < _V2_LENGTH + _FEATURES.size:
            raise ImageInvalid(path=path, reason="its header is cut off")
        features, _compatible, _autoclear, _order, header_length = _FEATURES.unpack_from(data, _V2_LENGTH)
    extensions = _extensions(path, data, header_length)
    backing_format, data_file = extensions.get(_BACKING_FORMAT), extensions.get(_DATA_FILE_NAME)
    return Header(
        version=version,
        virtual_size=size,
        backing_file=_backing(path, data, offset, length),
        backing_format=None if backing_format is None else backing_format.decode("ascii", "replace"),
        encrypted=crypt != 0,
        data_file=bool(features & _DATA_FILE),
        corrupt=bool(features & _CORRUPT),
        data_file_name=None if data_file is None else os.fsdecode(data_file),
    )


def _backing(path: str, data: bytes, offset: int, length: int) -> str | None:
    if not offset:
        return None
    if not 0 < length <= _LONGEST_NAME or offset + length > len(data):
        raise ImageInvalid(path=path, reason="the name of its backing file lies outside its header")
    return os.fsdecode(data[offset : offset + length])


def _extensions(path: str, data: bytes, position: int) -> dict[int, bytes]:
    """The header extensions up to the end marker; of two of one kind the first."""
    found: dict[int, bytes] = {}
    while position + _EXTENSION.size <= len(data):
        kind, length = _EXTENSION.unpack_from(data, position)
        position += _EXTENSION.size
        if kind == 0:
            break
        if position + length > len(data):
            raise ImageInvalid(path=path, reason="a header extension is longer than the header")
        found.setdefault(kind, data[position : position + length])
        position += (length + 7) & ~7
    return found
