# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Stands in for the get-pip that ansible-test downloads: pip from ensurepip, then the wanted version from PyPI."""

from __future__ import annotations

import os
import re
import subprocess
import sys

# Before ensurepip is imported: it points PIP_CONFIG_FILE at nothing, and the user's certificate settings are lost.
ENVIRONMENT = dict(os.environ)


def main() -> int:
    import ensurepip

    ensurepip.bootstrap()
    found = re.search(r"get_pip_([0-9_]+)", os.path.basename(__file__))
    wanted = "pip==" + found.group(1).replace("_", ".") if found else "pip"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted]
    return subprocess.call(command, env=ENVIRONMENT)


sys.exit(main())
