# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real QEMUs without a guest, kept the way an administrator without libvirt does. Lies beside the VMs' files.

vm.py start NAME DRIVE...     runs (the BIOS finds nothing to boot); images NAME-DRIVE.qcow2 are made when missing
vm.py write NAME DRIVE OFFSET LENGTH PATTERN     as the guest would
vm.py kill NAME               SIGKILL
vm.py kill-all
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import uuid

HERE = pathlib.Path(__file__).resolve().parent
SIZE = 16 * 1024 * 1024


def image(name: str, drive: str) -> pathlib.Path:
    path = HERE / f"{name}-{drive}.qcow2"
    if not path.exists():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)], check=True)
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 17 0 2M", str(path)], check=True, capture_output=True)
    return path


def start(name: str, *drives: str) -> None:
    identity = HERE / f"{name}.uuid"
    if not identity.exists():
        identity.write_text(str(uuid.uuid4()))
    line = ["qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]
    line += ["-name", name, "-uuid", identity.read_text(), "-daemonize", "-pidfile", str(HERE / f"{name}.pid")]
    for number, ending in enumerate(("qmp", "ctl")):
        line += ["-chardev", f"socket,id=mon{number},path={HERE / name}.{ending},server=on,wait=off"]
        line += ["-mon", f"chardev=mon{number},mode=control"]
    for drive in drives:
        file = {"driver": "file", "filename": str(image(name, drive))}
        line += ["-blockdev", json.dumps({"driver": "qcow2", "node-name": f"{drive}-node", "file": file})]
        line += ["-device", f"virtio-blk-pci,id={drive},drive={drive}-node,share-rw=on"]
    with open(HERE / f"{name}.log", "ab") as log:
        subprocess.run(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)


def human(name: str, text: str) -> None:
    """A human monitor command over the second monitor."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"{HERE / name}.ctl")
        stream = sock.makefile("rw")
        stream.readline()
        commands = [{"execute": "qmp_capabilities"}]
        commands += [{"execute": "human-monitor-command", "arguments": {"command-line": text}}]
        for command in commands:
            stream.write(json.dumps(command) + "\n")
            stream.flush()
            answer = json.loads(stream.readline())
            while "event" in answer:
                answer = json.loads(stream.readline())
            if answer.get("return") not in ({}, ""):
                sys.exit(f"{text}: {answer}")


def write(name: str, drive: str, offset: str, length: str, pattern: str) -> None:
    device = f"/machine/peripheral/{drive}/virtio-backend"
    human(name, f'qemu-io -d {device} "write -P {pattern} {offset} {length}"')
    human(name, f'qemu-io -d {device} "flush"')


def alive(pid: int) -> bool:
    try:
        return bool(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def kill(name: str) -> None:
    pidfile = HERE / f"{name}.pid"
    if not pidfile.exists():
        return
    pid = int(pidfile.read_text())
    if not alive(pid) or os.fsencode(str(pidfile)) not in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
        return
    os.kill(pid, signal.SIGKILL)
    while alive(pid):
        time.sleep(0.01)


def kill_all() -> None:
    for pidfile in HERE.glob("*.pid"):
        kill(pidfile.stem)


if __name__ == "__main__":
    {"start": start, "write": write, "kill": kill, "kill-all": kill_all}[sys.argv[1]](*sys.argv[2:])
