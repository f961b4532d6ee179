#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qmp_dirty_bitmap
short_description: Dirty bitmaps of running VMs
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Makes sure that the drives of running VMs have, or do not have, a dirty bitmap of a given name. Such a bitmap
    records which parts of a drive the guest writes to.
  - All drives of a VM change in one transaction, so at one instant, and all of them or none.
  - M(blockops.qemu.qmp_drive_backup) makes and removes its own bitmaps and needs none of this. This module is for the
    bitmaps of other tools, and for finding out how much a guest writes.
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._vms
attributes:
  check_mode:
    support: partial
    details:
      - With O(state=merged), whether a bitmap that is there already would get anything new is not known beforehand.
        It is taken for changed as soon as there is anything in the sources.
  diff_mode:
    support: full
  idempotent:
    support: partial
    details:
      - With O(state=cleared) and O(state=merged) a second run changes something if the guest has written since the
        first.
options:
  vms:
    description:
      - The VMs to work on.
    required: true
  name:
    description:
      - Name of the bitmap, 1 to 1023 bytes. It is looked for in the active image of each drive.
    type: str
    required: true
  state:
    description:
      - V(present) makes the bitmap where it is missing; it records from then on.
      - V(absent) removes it. That is all that can be done with one that is inconsistent.
      - V(enabled) and V(disabled) have it record, or pause it. It is made where it is missing.
      - V(cleared) forgets what it has recorded. It is made where it is missing.
      - V(merged) adds to it what is recorded in the O(sources). Where it is missing it is made, and does not record
        by itself.
    type: str
    choices: [present, absent, enabled, disabled, cleared, merged]
    default: present
  sources:
    description:
      - The bitmaps to merge. They stay as they are.
      - Without C(drive) and C(node) a bitmap is looked for in all images of the drive's own chain, and those of all
        of them are taken. So what was recorded before and after an external snapshot comes together.
    type: list
    elements: dict
    suboptions:
      name:
        description: Name of the bitmap.
        type: str
        required: true
      drive:
        description: Name of the drive in whose chain it is. It must be as large as the other.
        type: str
      node:
        description: Name of the node, which is one image, that it is on.
        type: str
  granularity:
    description:
      - Bytes that one bit stands for, a power of 2 from 512 to 2147483648. The default for a new bitmap is the size
        of the image's clusters, from 4096 to 65536.
      - If given, a bitmap of another granularity is an error, because QEMU cannot change it.
    type: int
  persistent:
    description:
      - Whether the bitmap is stored in the image when QEMU ends. The default for a new one is V(true) where the image
        can store it (qcow2 version 3), V(false) elsewhere.
      - If given, a bitmap of the other kind is an error, because QEMU cannot change it.
    type: bool
  ours:
    description:
      - Allow to remove a bitmap by which this collection tracks what changed since a backup. The next backup of the
        drive is a full one then.
      - Nothing but removing is ever done to those. An increment would miss changes if one was cleared, paused or made
        by hand.
    type: bool
    default: false
  drives:
    description: Names of the drives to work on. Default is every drive that the guest can write to.
    type: list
    elements: str
  exclude_drives:
    description: Names of drives to leave out.
    type: list
    elements: str
notes:
  - A persistent bitmap is written into the image when QEMU ends in good order. If QEMU is killed, one made since its
    start is lost, and an older one is inconsistent then.
  - QEMU changes no persistent bitmap of an image below the active one. RV(vms[].drives[].below) says where there are
    such ones of the same name.
seealso:
  - module: blockops.qemu.qmp_vm_info
  - module: blockops.qemu.qmp_drive_backup
"""

EXAMPLES = r"""
- name: Record from now on what the guests write
  blockops.qemu.qmp_dirty_bitmap:
    name: since-monday
    vms: "{{ hypervisor.vms }}"

- name: Remove the bitmaps of a tool that is no longer used
  blockops.qemu.qmp_dirty_bitmap:
    name: qmpbackup-vda
    state: absent
    vms: "{{ hypervisor.vms }}"

- name: Add up what two bitmaps have recorded, in all images of the drive's chain
  blockops.qemu.qmp_dirty_bitmap:
    name: week
    state: merged
    sources:
      - name: since-monday
      - name: weekend
    drives: [vda]
    vms:
      - socket: /run/vms/web.qmp
"""

RETURN = r"""
vms:
  description: One element for each VM, in the order of O(vms).
  returned: always
  type: list
  elements: dict
  contains:
    name: {description: Name of the VM; null when nobody answered and none was given., type: str, returned: always}
    socket: {description: Its QMP socket., type: str, returned: always}
    changed: {description: Whether anything was (or would be) changed., type: bool, returned: always}
    error:
      description: What failed, with C(kind) (a stable word), C(message) and data that depends on the kind.
      type: dict
      returned: on failure
    bitmap: {description: Name of the bitmap., type: str, returned: success}
    status:
      description: The O(state) that was (or would be) reached, V(unchanged) if all was as it should be.
      type: str
      returned: success
    drives:
      description: The drives it was about.
      type: list
      elements: dict
      returned: success
      contains:
        name: {description: Name of the drive., type: str, returned: always}
        node: {description: Node of its active image., type: str, returned: always}
        changed: {description: Whether the bitmap was (or would be) changed here., type: bool, returned: always}
        bitmap:
          description: The bitmap as it is then; null when there is none.
          type: dict
          returned: always
          contains:
            state:
              description: V(recording), V(disabled), V(busy) (in use by a job) or V(inconsistent).
              type: str
              returned: always
            count:
              description: Bytes that it says were written; null in check mode when that is not known.
              type: int
              returned: always
            granularity: {description: Bytes that one bit stands for., type: int, returned: always}
            persistent: {description: Whether it is stored when QEMU ends., type: bool, returned: always}
        below:
          description: Images below the active one that have a bitmap of this name as well. They are never changed.
          type: list
          elements: str
          returned: always
    skipped:
      description: Drives that were left out, with C(name) and C(reason).
      type: list
      elements: dict
      returned: success
    commands:
      description: The QMP command that was (or would be) sent; empty when there was nothing to do.
      type: list
      elements: dict
      returned: success
    seconds: {description: Seconds it took., type: float, returned: success}
error:
  description: Why nothing was tried on any VM, with C(kind) (a stable word), C(message) and data about it.
  returned: when the options cannot be meant
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible import runner
from ..module_utils._ansible.dependencies import require_qemu_qmp
from ..module_utils._ansible.specs_bitmap import bitmap_options, bitmap_spec
from ..module_utils._ops.dirty_bitmap import DirtyBitmapVms


def main() -> None:
    module = AnsibleModule(argument_spec=bitmap_spec(), supports_check_mode=True)
    require_qemu_qmp(module)
    runner.run_vms(module, lambda: DirtyBitmapVms(bitmap_options(module)))


if __name__ == "__main__":
    main()
