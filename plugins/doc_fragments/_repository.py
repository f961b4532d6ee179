# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this doc fragment is **PRIVATE** to the collection. It can change at any time.

from __future__ import annotations


class ModuleDocFragment:
    # Equal to repository_options() in plugins/module_utils/_ansible/specs_repository.py; a test compares them.
    DOCUMENTATION = r"""
options:
  repository:
    description:
      - The directory that holds the backups, on the host the module runs on.
      - Its layout is described in the file C(docs/repository_format.md) of the collection.
    type: path
    required: true
"""
