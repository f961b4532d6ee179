# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What holds for every file: a licence header, and nothing of the machine it was written on."""

from __future__ import annotations

import re
from pathlib import Path

from architecture.source import ROOT, project_files, text_of

IDENTIFIER = "SPDX-License-" + "Identifier: GPL-3.0-or-later"
COPYRIGHT = "Copyright: (c) 2026, blockops.qemu contributors"
WITH_HEADER = {".cfg", ".py", ".pyi", ".sh", ".toml", ".yaml", ".yml"}
GENERATED = {"changelogs/changelog.yaml"}
HEADER_LINES = 12

# Directories of build machines, put together here so that this file does not find itself.
MACHINE_PATHS = ["/" + name + "/" for name in ("work", "farm", "workspace", "builds")]


def needs_header(path: Path) -> bool:
    if str(path.relative_to(ROOT)) in GENERATED:
        return False
    return path.suffix in WITH_HEADER or text_of(path).startswith("#!")


def test_every_file_has_its_licence_header() -> None:
    missing = []
    for path in filter(needs_header, project_files()):
        head = "\n".join(text_of(path).split("\n")[:HEADER_LINES])
        if IDENTIFIER not in head or COPYRIGHT not in head:
            missing.append(str(path.relative_to(ROOT)))
    assert not missing


def test_no_paths_of_a_build_machine() -> None:
    forbidden = MACHINE_PATHS + ([f"{ROOT}/"] if len(ROOT.parts) > 2 else [])
    pattern = re.compile("|".join(r"(?<![\w.}])" + re.escape(path) for path in forbidden))
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in project_files()
        for number, line in enumerate(text_of(path).split("\n"), start=1)
        if pattern.search(line)
    ]
    assert not found


def test_requirements_name_no_registry() -> None:
    locks = [path for path in project_files() if path.name.startswith("requirements")]
    assert locks
    assert not [path.name for path in locks if re.search(r"index-url|find-links|@ *(https?|file):", text_of(path))]
