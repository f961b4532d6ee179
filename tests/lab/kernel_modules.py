# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
"""Which kernel modules the guest needs, in loading order. Reads the modules themselves: depmod never ran."""

from __future__ import annotations

import lzma
import re
import subprocess
from pathlib import Path

from lab.packages import PackageError


def _content(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", str(path)], capture_output=True, check=True).stdout
    return path.read_bytes()


class ModuleTree:
    """The modules of one unpacked kernel."""

    def __init__(self, tree: Path) -> None:
        """``tree`` is the root of the unpacked packages, merged-/usr or not."""
        modules = [path for path in tree.rglob("*") if re.search(r"\.ko(\.xz|\.zst)?$", path.name)]
        self._files = {path.name.split(".ko")[0].replace("-", "_"): path for path in modules}
        self._builtin = {
            Path(line).name.split(".ko")[0].replace("-", "_")
            for listing in tree.rglob("modules.builtin")
            for line in listing.read_text(encoding="ascii").splitlines()
        }
        self._contents: dict[str, bytes] = {}

    def _load(self, name: str) -> bytes:
        if name not in self._contents:
            self._contents[name] = _content(self._files[name])
        return self._contents[name]

    def _needs(self, name: str) -> list[str]:
        """depends= is a must, softdep=pre: is loaded when it exists (crc32c for ext4)."""
        content = self._load(name)
        hard = re.search(rb"\0depends=([^\0]*)\0", b"\0" + content)
        soft = re.search(rb"\0softdep=pre: ([^\0]*)\0", b"\0" + content)
        names = hard[1].decode().split(",") if hard and hard[1] else []
        if soft:
            names += [item for item in soft[1].decode().split() if item.replace("-", "_") in self._files]
        return [item.replace("-", "_") for item in names]

    def closure(self, wanted: list[str], optional: bool = False) -> list[tuple[str, bytes]]:
        """(name, content) of ``wanted`` and all they need, dependencies first; built-in ones are left out."""
        ordered: dict[str, bytes] = {}

        def visit(name: str) -> None:
            if name in ordered or name in self._builtin:
                return
            if name not in self._files:
                if optional:
                    return
                raise PackageError(f"the kernel has no module {name}")
            for need in self._needs(name):
                visit(need)
            ordered[name] = self._load(name)

        for name in wanted:
            visit(name)
        return list(ordered.items())
