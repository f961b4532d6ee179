#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_img_snapshot
short_description: Snapshots of a disk image that nobody has open
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Makes and removes internal snapshots of a qcow2 image that nobody has open, and takes the image back to one.
  - Takes a VM that is switched off back to an external snapshot that M(blockops.qemu.qmp_snapshot) made. A fresh
    overlay on the snapshot takes the place of the active image, under the same path, so that what starts the VM need
    not change.
  - The snapshots of an image are listed by M(blockops.qemu.qemu_img_info).
  - QEMU's locks are respected, and the error names the processes that have the image open.
extends_documentation_fragment:
  - blockops.qemu._attributes
attributes:
  check_mode:
    support: full
    details: The name under which a discarded image would be kept has the time in it, and differs.
  diff_mode:
    support: full
  idempotent:
    support: full
    details:
      - Whether an image still is at a snapshot is told from its tables. A disk that was changed and changed back counts
        as changed.
options:
  path:
    description: The image; with O(type=external) the active image of the chain. It must be qcow2.
    type: path
    required: true
  name:
    description: Name of the snapshot.
    type: str
    required: true
  state:
    description:
      - V(present) and V(absent) are for O(type=internal).
      - With V(applied) the image is what it was at the time of the snapshot, and the snapshot stays. What was written
        since then is lost with O(type=internal), so take another snapshot first if you may want it back.
    type: str
    choices: [present, absent, applied]
    default: present
  type:
    description: The type of the snapshot.
    type: str
    choices: [internal, external]
    default: internal
  discarded:
    description:
      - What to do with the branch above the snapshot, with O(type=external) and O(state=applied).
      - V(keep) renames the old active image to C(NAME.discarded-TIME). The images between it and the snapshot stay
        where they are.
      - V(delete) deletes all of them that M(blockops.qemu.qmp_snapshot) or this module made. Other images are never
        deleted, nor what lies below one. The snapshots in the branch go with it.
    type: str
    choices: [keep, delete]
    default: keep
  remove_bitmaps:
    description:
      - QEMU takes no image with dirty bitmaps back to an internal snapshot, and afterwards they would be wrong. So with
        O(type=internal) and O(state=applied) bitmaps are removed first, and the next backup of the drive is a full one.
      - V(ours) removes those that this collection made, and fails if there are others. V(all) removes all.
    type: str
    choices: [ours, all]
    default: ours
  allowed_directories:
    description:
      - Absolute paths of the directories that all files of the chain must lie in or below, links resolved.
      - They are also searched (not below them) for images that are based on what would be changed or deleted.
      - If empty, the image's own directory.
    type: list
    elements: path
    default: []
notes:
  - Images based on this one in other directories are not found unless those are in O(allowed_directories).
  - An overlay made by applying an external snapshot has a bitmap for each tracking bitmap of the snapshot, so that the
    next backup is an incremental.
  - Applying an external snapshot needs a file system with hard links. Killed at any moment, the task ends right when it
    is run again.
seealso:
  - module: blockops.qemu.qemu_img_info
  - module: blockops.qemu.qmp_snapshot
"""

EXAMPLES = r"""
- name: Take an internal snapshot of a disk that is not in use
  blockops.qemu.qemu_img_snapshot:
    path: /vms/web.qcow2
    name: before-upgrade

- name: Take the disk back to it
  blockops.qemu.qemu_img_snapshot:
    path: /vms/web.qcow2
    name: before-upgrade
    state: applied

- name: Remove it
  blockops.qemu.qemu_img_snapshot:
    path: /vms/web.qcow2
    name: before-upgrade
    state: absent

- name: Take a VM that is switched off back to its external snapshot, and delete what it wrote since
  blockops.qemu.qemu_img_snapshot:
    path: /vms/web.pre-patch.qcow2
    name: pre-patch
    type: external
    state: applied
    discarded: delete
"""

RETURN = r"""
image:
  description: The image.
  returned: success
  type: str
  sample: /vms/web.qcow2
snapshots:
  description: The internal snapshots there are (or would be) now.
  returned: success, with O(type=internal)
  type: list
  elements: dict
  contains:
    id: {description: The id; null when it would be made., type: str, sample: '1'}
    name: {description: The name., type: str}
    vm_state_size: {description: Bytes of memory and device state; 0 when only the disk is in it., type: int}
    date: {description: 'When it was taken, UTC; null when it would be made.', type: str}
removed_bitmaps:
  description: Dirty bitmaps that were (or would be) removed.
  returned: success, with O(type=internal)
  type: list
  elements: str
chain:
  description: The chain there is (or would be) now, the active image first.
  returned: success, with O(type=external)
  type: list
  elements: dict
  contains:
    path: {description: Path of the image., type: str}
    format: {description: Its format., type: str}
    backing_file: {description: The backing file as its header spells it., type: str}
    backing_format: {description: The format its header names for that., type: str}
    virtual_size: {description: Bytes a guest would see., type: int}
    allocated: {description: Bytes its file takes on disk; null when it would be made., type: int}
    snapshot:
      description: Name of the external snapshot that lies below this image; null when there is no record beside it.
      type: str
discarded:
  description: Images that no longer are where they were.
  returned: success, with O(type=external)
  type: list
  elements: dict
  contains:
    path: {description: Where it was., type: str}
    allocated: {description: Bytes its file took on disk., type: int}
    deleted: {description: Whether it was (or would be) deleted., type: bool}
    kept_as: {description: Where it is now; null when it is deleted., type: str}
discarded_bytes:
  description: Bytes that the branch above the snapshot takes on disk, which is about what was written since.
  returned: success, with O(type=external)
  type: int
left_behind:
  description: Images of that branch that stay where they are.
  returned: success, with O(type=external)
  type: list
  elements: str
bitmaps:
  description: Tracking bitmaps of the new overlay. With at least one the next backup can be an incremental.
  returned: success, with O(type=external)
  type: list
  elements: str
recovered:
  description: What a killed run had left behind, and what was done about it.
  returned: success, with O(type=external)
  type: list
  elements: str
error:
  description: What failed, with C(kind) (a stable word), C(message) and data that depends on the kind.
  returned: on failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible.runner import run
from ..module_utils._ansible.specs_image import image_snapshot_request, image_snapshot_spec
from ..module_utils._ops.img_snapshot import change_snapshot


def main() -> None:
    module = AnsibleModule(**image_snapshot_spec())
    run(module, lambda: change_snapshot(image_snapshot_request(module.params, check_mode=module.check_mode)))


if __name__ == "__main__":
    main()
