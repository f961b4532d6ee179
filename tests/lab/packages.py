# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Debian and Ubuntu packages fetched and unpacked, never installed: the host stays as it is."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

Say = Callable[[str], None]
# the smallest kernel first; -virtual and -generic are Ubuntu's
_KERNEL_METAPACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-generic", "linux-image-amd64")


class PackageError(Exception):
    """apt could not deliver; carries its words."""


def _run(*argv: str, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode != 0:
        raise PackageError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def depends(package: str) -> list[str]:
    """Names of the real packages that ``package`` depends on; empty when apt does not know it."""
    done = subprocess.run(
        ["apt-cache", "depends", "--no-recommends", "--no-suggests", package],
        capture_output=True,
        text=True,
        check=False,
    )
    return re.findall(r"^\s*\|?Depends: ([^<\s]+)$", done.stdout, re.MULTILINE)


def kernel_packages() -> list[str]:
    """The packages that hold the newest small kernel and its modules (Ubuntu keeps them in a second package)."""
    for meta in _KERNEL_METAPACKAGES:
        images = [name for name in depends(meta) if re.match(r"linux-image-.*\d", name)]
        if images:
            return [*images[:1], *(name for name in depends(images[0]) if name.startswith("linux-modules-"))]
    raise PackageError(f"no kernel package found, run apt-get update; looked for {', '.join(_KERNEL_METAPACKAGES)}")


def fetch(packages: list[str], into: Path, say: Say) -> Path:
    """Download ``packages`` and unpack them into one tree. Returns the tree."""
    downloads, tree = into / "deb", into / "tree"
    downloads.mkdir(parents=True, exist_ok=True)
    tree.mkdir(exist_ok=True)
    for package in packages:
        _run("apt-cache", "show", package)  # apt-get takes an unknown name for a pattern and fetches all that match
    say(f"downloading {' '.join(packages)}")
    try:
        _run("apt-get", "-q", "download", *packages, cwd=downloads)
    except PackageError:
        say("package lists look outdated: apt-get update")
        _run("apt-get", "-q", "update")
        _run("apt-get", "-q", "download", *packages, cwd=downloads)
    for archive in sorted(downloads.glob("*.deb")):
        _run("dpkg-deb", "-x", str(archive), str(tree))
        archive.unlink()
    return tree


def shared_libraries(program: Path, tree: Path) -> dict[str, Path]:
    """What ``program`` needs at run time: path in the guest -> file on the host (``tree`` first, then the system).

    Asked of the loader in ``tree`` when there is one, because the system's may be older than the program.
    """
    loader = next((str(path) for path in tree.rglob("ld-linux-x86-64.so.2") if path.is_file()), "")
    paths = sorted({str(library.parent) for library in tree.rglob("*.so*")})
    command = [loader or "/lib64/ld-linux-x86-64.so.2", *(["--library-path", ":".join(paths)] if paths else [])]
    done = subprocess.run([*command, "--list", str(program)], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode != 0 or "not found" in output:  # a library, or a version of it: "GLIBC_2.38' not found"
        raise PackageError(f"{program.name} lacks libraries: {output}")
    found = re.findall(r"^\s*(?:(\S+) => )?(/\S+) \(0x", output, re.MULTILINE)
    # the name in the program's header counts for the loader, the default directory for the others
    libraries = {name if name.startswith("/") else f"/lib/{name}": Path(path) for name, path in found if name}
    return {"/lib64/ld-linux-x86-64.so.2": Path(command[0]), **libraries}
