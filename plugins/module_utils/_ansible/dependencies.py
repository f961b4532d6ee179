# Copyright: (c) 2026, blockops.qemu contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this module util is **PRIVATE** to the collection. It can change at any time.
"""Third-party packages a module needs on the hypervisor, and the message when one is missing."""

from __future__ import annotations

import typing as t

from .._qmp.session import QEMU_QMP_ERROR
from .runner import fail_missing

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule


def require_qemu_qmp(module: AnsibleModule) -> None:
    """End the module with Ansible's usual message when qemu.qmp cannot be imported."""
    if QEMU_QMP_ERROR is not None:
        fail_missing(module, "qemu.qmp", QEMU_QMP_ERROR)
