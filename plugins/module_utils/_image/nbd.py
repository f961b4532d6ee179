# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""A small NBD client: what is needed to read and write an image through qemu-nbd, over a socket that is connected.

Protocol: doc/proto.md of NBD; fixed newstyle with the oldest option and simple replies, which every server has.
"""

from __future__ import annotations

import socket
import struct

_GREETING = struct.Struct(">8s8sH")
_CHOICE = struct.Struct(">I8sII")
_EXPORT = struct.Struct(">QH")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_MAGIC, _OPTION_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH, _WRITE_ZEROES = 0, 1, 2, 3, 6
_FIXED_NO_ZEROES, _EXPORT_NAME = 3, 1
_DEPTH = 16
_MOST_ZEROES = 1 << 30


class NbdFailed(Exception):
    """The server refused, or what it says is no NBD. ``errno`` as the protocol has it, which is as Linux has it."""

    def __init__(self, doing: str, errno: int = 0) -> None:
        super().__init__(doing)
        self.errno = errno


class Nbd:
    """One export. Writes are sent on before earlier ones are answered; :meth:`flush` waits for all of them."""

    def __init__(self, sock: socket.socket) -> None:
        """:raise NbdFailed, OSError: the server is not there."""
        self._socket = sock
        self._waiting = 0
        magic, option_magic, _flags = _GREETING.unpack(self._receive(_GREETING.size))
        if (magic, option_magic) != (_MAGIC, _OPTION_MAGIC):
            raise NbdFailed("greeting")
        self._socket.sendall(_CHOICE.pack(_FIXED_NO_ZEROES, _OPTION_MAGIC, _EXPORT_NAME, 0))
        self.size, _flags = _EXPORT.unpack(self._receive(_EXPORT.size))

    def read_into(self, offset: int, view: memoryview) -> None:
        self._send(_READ, offset, len(view))
        self._answered("reading")
        self._receive_into(view)

    def write(self, offset: int, data: memoryview) -> None:
        self._send(_WRITE, offset, len(data))
        self._socket.sendall(data)
        self._pipelined("writing")

    def write_zeroes(self, offset: int, length: int) -> None:
        """The server may leave the place without data, as long as it reads as zeroes."""
        for start in range(offset, offset + length, _MOST_ZEROES):
            self._send(_WRITE_ZEROES, start, min(_MOST_ZEROES, offset + length - start))
            self._pipelined("writing zeroes")

    def flush(self) -> None:
        """All that was written is on disk."""
        self._settle(0, "writing")
        self._send(_FLUSH, 0, 0)
        self._answered("flushing")

    def close(self) -> None:
        self._send(_DISCONNECT, 0, 0)

    def _pipelined(self, doing: str) -> None:
        self._waiting += 1
        self._settle(_DEPTH, doing)

    def _settle(self, most: int, doing: str) -> None:
        while self._waiting > most:
            self._waiting -= 1
            self._answered(doing)

    def _send(self, command: int, offset: int, length: int) -> None:
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, command, 0, offset, length))

    def _answered(self, doing: str) -> None:
        magic, error, _cookie = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != _REPLY_MAGIC or error:
            raise NbdFailed(doing, error)

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        self._receive_into(memoryview(data))
        return bytes(data)

    def _receive_into(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError("the server closed the connection")
            view = view[count:]
