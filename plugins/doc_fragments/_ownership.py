# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this doc fragment is **PRIVATE** to the collection. It can change at any time.
"""Who may read what a module writes. Must equal ownership_spec() in module_utils/_ansible/specs.py."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  owner:
    description: User (name or id) who shall own the files that are written. Default is the user the task runs as.
    type: str
  group:
    description: Group (name or id) of the files that are written. Default is that of the user the task runs as.
    type: str
  file_mode:
    description: Mode (octal) of the files that are written. It must not allow writing, as backups are never changed.
    type: str
    default: "0400"
  directory_mode:
    description: Mode (octal) of the directories that are made. Existing ones are left as they are.
    type: str
    default: "0700"
"""
