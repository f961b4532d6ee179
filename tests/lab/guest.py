# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""The lab's guest: a Debian or Ubuntu kernel, busybox and the real guest agent, 4 MB, built once into the cache.

It mounts each ext4 disk under /mnt/SERIAL, freezes and thaws through qemu-ga with a hook, runs ``guest-exec`` lines
in busybox sh, and powers off on the ACPI button or ``guest-shutdown``.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.cache import built_once
from lab.images import create, run_tool
from lab.kernel_modules import ModuleTree
from lab.packages import PackageError, Say, depends, fetch, kernel_packages, shared_libraries

_CORE = ["virtio_pci", "virtio_blk", "virtio_console", "ext4", "button", "evdev"]
_STORAGE = ["virtio_scsi", "sd_mod", "ahci", "ata_piix", "nvme"]
_AGENT = "/usr/sbin/qemu-ga"

_TEXTS = {
    "etc/inittab": (
        "::respawn:/usr/sbin/qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0"
        " -F/etc/qemu/fsfreeze-hook -t /run -f /run/qemu-ga.pid\n"
        "::respawn:/bin/busybox acpid -f -c /etc/acpi -l /run/acpid.log\n"
    ),
    "etc/acpi/PWRF/00000080": "#!/bin/sh\nexec /sbin/shutdown\n",
    # journal of freezes and thaws; a test may install /run/hook to slow down or to refuse a freeze
    "etc/qemu/fsfreeze-hook": '#!/bin/sh\necho "$1" >>/run/fsfreeze.log\n[ ! -x /run/hook ] || exec /run/hook "$1"\n',
    # called by guest-shutdown with -h/-H/-r and by the power button without arguments
    "sbin/shutdown": (
        "#!/bin/sh\nexport PATH=/bin:/sbin\ncd /\nkill -KILL -1\numount /mnt/* 2>/dev/null\nsync\n"
        'case "$1" in -r) reboot -f ;; -H) halt -f ;; *) poweroff -f ;; esac\n'
    ),
    "etc/passwd": "root::0:0:root:/:/bin/sh\n",
}


@dataclass(frozen=True)
class GuestImage:
    """What a VM boots: kernel and initramfs for -kernel and -initrd."""

    kernel: Path
    initrd: Path

    def arguments(self) -> list[str]:
        """QEMU arguments that boot it with a console on the first serial port."""
        append = "console=ttyS0 quiet panic=-1 tsc=unstable"
        return ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", append]


def _texts() -> dict[str, str]:
    """Scripts and configuration of the guest: path -> content."""
    return {**_TEXTS, "init": (Path(__file__).parent / "guest_init.sh").read_text(encoding="utf-8")}


def _print(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


def guest_image(say: Say = _print) -> GuestImage:
    """The guest from the cache, built when missing (needs apt's package lists and about 30 MB of download)."""
    recipe = f"{_CORE}{_STORAGE}{_texts()}"
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    directory = built_once(f"guest-{digest}", lambda work, target: _build(work, target, say))
    return GuestImage(directory / "vmlinuz", directory / "initrd.gz")


def _build(work: Path, target: Path, say: Say) -> None:
    """Leave kernel and initramfs in ``target``; ``work`` is scratch."""
    tree = fetch([*kernel_packages(), "qemu-guest-agent"], work, say)
    agent = next(path for path in tree.rglob("qemu-ga") if path.is_file() and os.access(path, os.X_OK))
    try:
        libraries = shared_libraries(agent, tree)
    except PackageError:
        say("this host lacks libraries of the agent")
        fetch(depends("qemu-guest-agent"), work, say)
        libraries = shared_libraries(agent, tree)
    root = work / "root"
    _populate(root, tree)
    for inside, source in {_AGENT: agent, **libraries}.items():
        place = root / inside.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)
    kernel = max(tree.rglob("vmlinuz-*"), key=lambda path: path.stat().st_size)
    shutil.copy(kernel, target / "vmlinuz")
    say("packing the initramfs")
    _pack(root, target / "initrd.gz")
    say("the guest is ready")


def _populate(root: Path, tree: Path) -> None:
    """Busybox with its applets, our init and configuration, the kernel modules in loading order."""
    for name in ("bin", "sbin", "usr/sbin", "etc", "proc", "sys", "dev", "run", "lib", "modules"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    if busybox is None:
        raise PackageError("busybox is missing: install busybox-static")
    shutil.copy(busybox, root / "bin" / "busybox")
    listing = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for applet in set(listing.stdout.split()) - {"busybox", "shutdown"}:
        (root / "bin" / applet).symlink_to("busybox")
    for name, text in _texts().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    modules = ModuleTree(tree)
    core = modules.closure(_CORE)
    loaded = {name for name, _content in core}
    extra = [(name, content) for name, content in modules.closure(_STORAGE, optional=True) if name not in loaded]
    for group, members in (("core", core), ("storage", extra)):
        (root / "modules" / group).mkdir()
        for number, (name, content) in enumerate(members):
            (root / "modules" / group / f"{number:02}-{name}.ko").write_bytes(content)


def _pack(root: Path, target: Path) -> None:
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    command = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"]
    done = subprocess.run(command, cwd=root, input="\n".join(names).encode(), capture_output=True, check=True)
    target.write_bytes(gzip.compress(done.stdout, 6, mtime=0))


def create_ext4(path: str | Path, size: int, fmt: str = "qcow2", label: str = "lab", **options: object) -> Path:
    """An image with an empty ext4 on the whole disk, as the guest's data disks are. ``size`` in bytes.

    No lazy initialisation: the guest's kernel would go on writing by itself and nothing would ever be "unchanged".
    """
    with tempfile.NamedTemporaryFile(dir=Path(path).parent, prefix=".ext4-") as raw:
        os.truncate(raw.name, size)
        command = ["mkfs.ext4", "-q", "-F", "-L", label, "-E", "lazy_itable_init=0,lazy_journal_init=0", raw.name]
        environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        create(path, size, fmt, None, None, **options)
        run_tool("qemu-img", "convert", "-n", "-f", "raw", "-O", fmt, raw.name, path)
    return Path(path)


if __name__ == "__main__":
    print(guest_image())
