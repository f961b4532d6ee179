# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An external snapshot as somebody takes it by hand: snapshot.py SOCKET NODE OVERLAY"""

from __future__ import annotations

import json
import socket
import sys


def main(path: str, node: str, overlay: str) -> None:
    arguments = {"node-name": node, "snapshot-file": overlay, "format": "qcow2", "snapshot-node-name": "by-hand"}
    commands = [{"execute": "qmp_capabilities"}, {"execute": "blockdev-snapshot-sync", "arguments": arguments}]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        stream = sock.makefile("rw")
        stream.readline()
        for command in commands:
            stream.write(json.dumps(command) + "\n")
            stream.flush()
            answer = json.loads(stream.readline())
            while "event" in answer:
                answer = json.loads(stream.readline())
            if "error" in answer:
                sys.exit(str(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
