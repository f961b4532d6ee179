#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_img_commit
short_description: Commit a disk image that nobody has open into an image below it
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Writes what an image holds into its backing file, or into an image further down its chain. The guest sees the same
    disk afterwards.
  - Then an empty overlay on the base takes the place of the image, under the same path, or the image is deleted.
  - Nothing else may be based on the images that change or go. This is looked for, and refused.
  - QEMU's locks are respected, and the error names the processes that have an image open.
extends_documentation_fragment:
  - blockops.qemu._attributes
attributes:
  check_mode:
    support: full
    details: How large the files will be is not known then.
  diff_mode:
    support: full
  idempotent:
    support: full
    details: With O(delete) only together with O(missing_ok), because an image that is gone has nothing to say.
options:
  path:
    description: The image to commit. It must be qcow2.
    type: path
    required: true
  base:
    description:
      - The image to commit into. It must be in the chain of O(path). A relative path is relative to the directory of
        O(path).
      - If omitted, the image right below.
    type: path
  delete:
    description:
      - Delete the image when it is committed, and those between it and O(base) that M(blockops.qemu.qmp_snapshot) made.
        What starts the VM has to name O(base) from then on.
      - If V(false), an empty overlay takes the place of the image. Images in between stay where they are, of no use to
        anybody.
    type: bool
    default: false
  missing_ok:
    description: Take it for committed and deleted before when there is no image. Needs O(delete).
    type: bool
    default: false
  allowed_directories:
    description:
      - Absolute paths of the directories that all files of the chain must lie in or below, links resolved.
      - They are also searched (not below them) for images that are based on what would be changed or deleted.
      - If empty, the image's own directory.
    type: list
    elements: path
    default: []
notes:
  - Images based on these in other directories are not found unless those are in O(allowed_directories).
  - An interrupted commit has changed the base, but the images above it still hide that, and the guest sees what it saw.
    Run the task again to finish it. Do not use the base by itself before that.
  - Snapshots that lie between the image and the base are no more after this, nor is the one that the base was.
  - Tracking bitmaps are merged, so that the next backup is an incremental. Those that cannot go on are named, and the
    next backup is a full one. A raw base can have no bitmaps.
seealso:
  - module: blockops.qemu.qemu_img_rebase
  - module: blockops.qemu.qemu_img_snapshot
"""

EXAMPLES = r"""
- name: Write what was changed since the snapshot into the image below, and go on with an empty overlay
  blockops.qemu.qemu_img_commit:
    path: /vms/web.pre-patch.qcow2

- name: Put a whole chain into its base, and delete it
  blockops.qemu.qemu_img_commit:
    path: /vms/web.monday.qcow2
    base: web.qcow2
    delete: true
    missing_ok: true
"""

RETURN = r"""
image:
  description: The image.
  returned: success
  type: str
  sample: /vms/web.pre-patch.qcow2
base:
  description: The image that it was (or would be) committed into; null when there is no image.
  returned: success
  type: str
chain:
  description: The chain there is (or would be) now, the active image first.
  returned: success
  type: list
  elements: dict
  contains:
    path: {description: Path of the image., type: str}
    format: {description: Its format., type: str}
    backing_file: {description: The backing file as its header spells it., type: str}
    backing_format: {description: The format its header names for that., type: str}
    virtual_size: {description: Bytes a guest would see., type: int}
    allocated: {description: Bytes its file takes on disk; null when that is not known yet., type: int}
    snapshot:
      description: Name of the external snapshot that lies below this image; null when there is no record beside it.
      type: str
committed_bytes:
  description: Bytes of data that were (or would be) written into the base.
  returned: success
  type: int
needed_bytes:
  description: How many of them the base had no room for, and had to grow by.
  returned: success
  type: int
deleted:
  description: Images that were (or would be) deleted.
  returned: success
  type: list
  elements: str
left_behind:
  description: Images between the image and the base that are of no use any more and stay where they are.
  returned: success
  type: list
  elements: str
bitmaps:
  description: Bitmaps that go on.
  returned: success
  type: list
  elements: str
lost_bitmaps:
  description: Bitmaps that cannot go on.
  returned: success
  type: list
  elements: str
recovered:
  description: What a killed run had left behind, and what was done about it.
  returned: success
  type: list
  elements: str
error:
  description: What failed, with C(kind) (a stable word), C(message) and data that depends on the kind.
  returned: on failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible.runner import run
from ..module_utils._ansible.specs_rebase import image_commit_request, image_commit_spec
from ..module_utils._ops.img_commit import commit_image


def main() -> None:
    module = AnsibleModule(**image_commit_spec())
    run(module, lambda: commit_image(image_commit_request(module.params, check_mode=module.check_mode)))


if __name__ == "__main__":
    main()
