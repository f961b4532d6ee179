# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Note: this doc fragment is **PRIVATE** to the collection. It can change at any time.
"""The options of every qmp_* module. Must equal the specs in module_utils/_ansible/specs.py (a test compares them)."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
requirements:
  - On the hypervisor Python 3.9 or newer and the Python package C(qemu.qmp).
  - QEMU 6.0 or newer with a QMP monitor on a UNIX socket that no other program holds.
options:
  vms:
    description:
      - The VMs to work on, all of this host in one task. One VM is a list of one.
      - The result RV(ignore:vms) of M(blockops.qemu.qmp_vm_info) can be given as it is.
      - A VM that fails never stops the others; the task fails at the end and names those that failed.
    type: list
    elements: dict
    suboptions:
      name:
        description:
          - The VM's name in results and in repositories. Default is the name QEMU was started with (C(-name)), else the
            socket's file name without its ending.
        type: str
      socket:
        description: Path of the VM's QMP socket.
        type: path
      agent_socket:
        description:
          - Path of the socket of the VM's guest agent. When omitted, QEMU is asked for the chardev behind its channel
            C(org.qemu.guest_agent.0).
        type: path
      drives:
        description:
          - Names of the drives to work on; default is every drive that can be backed up. A drive's name is the id of
            its device, else that of its C(-drive).
          - The drive descriptions of M(blockops.qemu.qmp_vm_info) are taken as well.
        type: list
        elements: raw
      exclude_drives:
        description: Names of drives to leave out.
        type: list
        elements: str
      definition:
        description: Files that belong to the VM (start-up definition, firmware variables) and are saved with a backup.
        type: list
        elements: path
      uuid: &ignored
        description: Ignored; taken so that the result of M(blockops.qemu.qmp_vm_info) can be given as it is.
        type: raw
      status: *ignored
      running: *ignored
      qemu_version: *ignored
      process: *ignored
      agent: *ignored
      jobs: *ignored
      bitmaps: *ignored
      leftovers: *ignored
      boot_drift: *ignored
      findings: *ignored
      warnings: *ignored
      changed: *ignored
      error: *ignored
  max_parallel:
    description: How many VMs are worked on at a time.
    type: int
    default: 8
  timeout:
    description:
      - Seconds to wait for an answer, be it the greeting of a QMP socket, one QMP command, the guest agent or the lock
        on a VM's backups. It does not limit how long jobs run.
    type: float
    default: 30.0
"""
