#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qmp_block_rebase
short_description: Trim images in the middle of running VMs' chains
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Finds clusters of an overlay that hold just what the images below it show anyway, and gives their space back, while
    the guest goes on.
  - A copy without them is made beside the image and put in its place by QEMU. It has the same bitmaps, so the next
    backup by M(blockops.qemu.qmp_drive_backup) is an incremental one, and it is the same snapshot.
  - The active image, which the guest writes to, cannot be trimmed. The image below the overlay of a snapshot can.
  - QEMU needs C(blockdev-reopen), which it has from 6.1 on.
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._vms
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  vms:
    description:
      - The VMs to work on.
    required: true
  image:
    description:
      - The image to trim, by its file, its node name, or the name of a snapshot (which is the image below that
        snapshot's overlay). The task fails if it cannot be trimmed.
      - An image that an earlier run trimmed is found by its old file as well.
      - Default is every image that can be trimmed.
    type: str
  min_gain:
    description:
      - Bytes of redundant data from which on an image is trimmed.
    type: int
    default: 1048576
  delete:
    description:
      - Whether the file of an image is deleted when its copy has taken its place. Until then both take space.
      - Set to V(true) in a later run it also deletes what an earlier run left.
    type: bool
    default: true
  drives:
    description: Names of the drives to work on. Default is every drive that holds an image.
    type: list
    elements: str
  exclude_drives:
    description: Names of drives to leave out.
    type: list
    elements: str
notes:
  - Only overlays that this collection made are trimmed, and none that other images are based on or other processes have
    open. That is looked up in the directories of the VM's images; on shared storage other hosts can have some that are
    not seen.
  - The file of an image has another name when it is trimmed, with C(.trimmed) before its extension. The header of the
    image above follows.
  - QEMU lets an image be exchanged only under a node with a name of its own, and resets the options of that node which
    it is not told again. So one of the nodes above must be an overlay that M(blockops.qemu.qmp_snapshot) has made in
    this QEMU process, or come from C(-blockdev). For a VM with C(-drive) that means a snapshot has to be taken first.
  - An image with internal snapshots is refused, as these would be lost.
  - All data that an image and those below it could have in common is read twice, at most.
  - What a killed run has left is removed, or finished, by the next one.
  - A VM with other block jobs, such as a backup, is refused and not touched.
seealso:
  - module: blockops.qemu.qemu_img_rebase
  - module: blockops.qemu.qmp_block_commit
  - module: blockops.qemu.qmp_block_stream
  - module: blockops.qemu.qmp_snapshot
"""

EXAMPLES = r"""
- name: See how many bytes the images of a hypervisor's VMs hold twice
  blockops.qemu.qmp_block_rebase:
    vms: "{{ hypervisor.vms }}"
  check_mode: true
  register: redundant

- name: Give them back where it is worth the reading
  blockops.qemu.qmp_block_rebase:
    min_gain: 1073741824
    vms: "{{ hypervisor.vms }}"

- name: Trim one snapshot
  blockops.qemu.qmp_block_rebase:
    image: pre-patch
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
    status:
      description: V(trimmed), or V(unchanged) when there was nothing to trim. In check mode what it would be.
      type: str
      returned: when the images could be compared
    drives:
      description: The chains, drive by drive. In check mode as they would be.
      type: list
      elements: dict
      returned: when the images could be compared
      contains:
        name: {description: Name of the drive., type: str, returned: always}
        before:
          description: Files of the chain before, the active image first.
          type: list
          elements: str
          returned: always
        after: {description: Files of the chain after it., type: list, elements: str, returned: always}
        images:
          description: The images that were looked at, the topmost first.
          type: list
          elements: dict
          returned: always
          contains:
            image: {description: Its file., type: str, returned: always}
            replaced_by:
              description: The file of the trimmed copy; null if it was not trimmed.
              type: str
              returned: always
            dropped_bytes:
              description: Bytes of data in it that need not be. Null if it was not compared.
              type: int
              returned: always
            space_needed:
              description: Bytes that a trimmed copy takes at most. Null if it was not compared.
              type: int
              returned: always
            bitmaps: {description: Bitmaps that the copy has., type: list, elements: str, returned: always}
            reason: {description: Why it was not trimmed; null if it was., type: str, returned: always}
    freed_bytes:
      description: Bytes that the files take less than before, and less once an old one is deleted. Null in check mode.
      type: int
      returned: when the images could be compared
    skipped:
      description: Drives that were left out, with C(name) and C(reason).
      type: list
      elements: dict
      returned: when the images could be compared
    recovered:
      description: What a killed run had left and was (or would be) cleaned up.
      type: list
      elements: str
      returned: when the images could be compared
    deleted:
      description: Files that were (or would be) deleted.
      type: list
      elements: str
      returned: when the images could be compared
    kept:
      description: Files that have left the chain and stay where they are.
      type: list
      elements: str
      returned: when the images could be compared
    boot_drift:
      description:
        - Drives whose active image is not the one QEMU was started with, with C(drive), C(old) and C(new). Null if the
          command line of QEMU cannot be read.
      type: list
      elements: dict
      returned: when the images could be compared
    commands:
      description: QMP commands that were sent and may have changed something; none in check mode.
      type: list
      elements: dict
      returned: when the images could be compared
    seconds: {description: Seconds it took., type: float, returned: when the images could be compared}
error:
  description: Why nothing was tried on any VM, with C(kind) (a stable word), C(message) and data about it.
  returned: when the options cannot be meant
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible import runner
from ..module_utils._ansible.dependencies import require_qemu_qmp
from ..module_utils._ansible.specs_block_rebase import block_rebase_options, block_rebase_spec
from ..module_utils._ops.block_rebase import RebaseVms


def main() -> None:
    module = AnsibleModule(argument_spec=block_rebase_spec(), supports_check_mode=True)
    require_qemu_qmp(module)
    runner.run_vms(module, lambda: RebaseVms(block_rebase_options(module)))


if __name__ == "__main__":
    main()
