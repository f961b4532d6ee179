#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_img_rebase
short_description: Give a disk image that nobody has open another backing file, or trim it
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Gives a qcow2 image that nobody has open another backing file, or none. The guest sees no difference, because what
    the new backing file does not show is copied into the image.
  - With O(trim) drops from the image what its backing file shows anyway, and turns zeroes that take space into zeroes
    that take none. C(qemu-img rebase) does neither.
  - A new image is made beside the old one and takes its place by a rename. Killed at any moment, the image is the old
    or the new one, and the task ends right when it is run again.
  - QEMU's locks are respected, and the error names the processes that have an image open.
extends_documentation_fragment:
  - blockops.qemu._attributes
attributes:
  check_mode:
    support: full
    details:
      - Images are compared in check mode too, so the numbers of bytes are the same.
      - The size of the new file is not known then, and the name of the old image has the time in it.
  diff_mode:
    support: full
  idempotent:
    support: full
    details:
      - Whether there is something to trim is found by comparing, so O(trim) reads the image in each run.
options:
  path:
    description: The image. It must be qcow2.
    type: path
    required: true
  backing:
    description:
      - The backing file it shall have. A relative path is relative to the directory of O(path).
      - If empty, it shall have none, and gets a copy of all that is below it.
      - If omitted, it is the present one. That is for O(trim), and for O(relative).
    type: path
  backing_format:
    description:
      - The format of O(backing).
      - If omitted, it is the one that the present chain gives this file, or else qcow2 if the file begins as such an
        image does. A raw image that is not in the present chain is never guessed.
    type: str
    choices: [qcow2, raw]
  relative:
    description:
      - Whether the image names its backing file by a path that is relative to its own directory.
      - If omitted, the name stays as it is when the file stays the same. Otherwise it is relative when the backing
        file is in the directory of the image or below it.
    type: bool
  unsafe:
    description:
      - Change the name of the backing file only, because the new one holds the same as the old one. Needs O(proof) or
        O(acknowledge).
    type: bool
    default: false
  proof:
    description: V(compare) compares the old and the new backing file, with all below them, before anything is changed.
    type: str
    choices: [compare]
  acknowledge:
    description:
      - V(contents_equal) says that you know that both hold the same. It is the only way when the old one was renamed or
        moved, and cannot be read any more.
    type: str
    choices: [contents_equal]
  trim:
    description:
      - Drop what the backing file shows anyway. What is compressed in the image is not compressed afterwards.
    type: bool
    default: false
  in_place:
    description:
      - Change the image itself, which needs no space for another one. What was recorded by its dirty bitmaps may grow.
      - It is based on the old backing file until the end, so interrupted it shows what it showed.
    type: bool
    default: false
  backup:
    description: Keep the old image as C(NAME.before-rebase-TIME). It needs the old backing file.
    type: bool
    default: false
  allowed_directories:
    description:
      - Absolute paths of the directories that all files of the old and the new chain must lie in or below, links
        resolved.
      - If empty, the image's own directory.
    type: list
    elements: path
    default: []
notes:
  - Persistent dirty bitmaps are kept exactly, so incremental backups go on. An inconsistent one is dropped and named.
  - Images with internal snapshots are only given another name of an equal backing file, never trimmed or rebuilt.
  - The record of an external snapshot beside the image follows, when what is below still is a snapshot.
  - O(backup) needs a file system with hard links.
seealso:
  - module: blockops.qemu.qemu_img_commit
  - module: blockops.qemu.qemu_img_info
"""

EXAMPLES = r"""
- name: Give back the space of what the template shows anyway
  blockops.qemu.qemu_img_rebase:
    path: /vms/web.qcow2
    trim: true
    allowed_directories: [/vms, /templates]

- name: Base it on a newer template, keeping what the guest sees
  blockops.qemu.qemu_img_rebase:
    path: /vms/web.qcow2
    backing: /templates/debian-13.qcow2
    trim: true
    backup: true
    allowed_directories: [/vms, /templates]

- name: Make it independent
  blockops.qemu.qemu_img_rebase:
    path: /vms/web.qcow2
    backing: ''

- name: Follow a backing file that was renamed
  blockops.qemu.qemu_img_rebase:
    path: /vms/web.qcow2
    backing: base-renamed.qcow2
    unsafe: true
    acknowledge: contents_equal
"""

RETURN = r"""
image:
  description: The image.
  returned: success
  type: str
  sample: /vms/web.qcow2
method:
  description:
    - How it was (or would be) done. V(header) changed the name only, V(build) made a new image of what differs,
      V(copy) let C(qemu-img rebase) work in place, V(none) had nothing to do.
  returned: success
  type: str
  sample: build
backing_file:
  description: The backing file as the header spells it (or would) now; null when there is none.
  returned: success
  type: str
backing_format:
  description: The format the header names for that.
  returned: success
  type: str
chain:
  description: The chain there is (or would be) now, the image first.
  returned: success
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
dropped_bytes:
  description: Bytes of the disk that the old image held and the new one need not.
  returned: success
  type: int
zeroed_bytes:
  description: Bytes of the disk that were zeroes taking space, and take none now.
  returned: success
  type: int
copied_bytes:
  description: Bytes of the disk that the image had from below and holds itself now; not known with O(in_place).
  returned: success
  type: int
allocated_before:
  description: Bytes its file took on disk before.
  returned: success
  type: int
allocated:
  description: Bytes its file takes on disk now; null when it would be made.
  returned: success
  type: int
bitmaps:
  description: Dirty bitmaps that went (or would go) over to the new image.
  returned: success
  type: list
  elements: str
lost_bitmaps:
  description: Inconsistent dirty bitmaps, which were not kept.
  returned: success
  type: list
  elements: str
kept_as:
  description: Where the old image is kept; null when it is not.
  returned: success
  type: str
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
from ..module_utils._ansible.specs_rebase import image_rebase_request, image_rebase_spec
from ..module_utils._ops.img_rebase import rebase_image


def main() -> None:
    module = AnsibleModule(**image_rebase_spec())
    run(module, lambda: rebase_image(image_rebase_request(module.params, check_mode=module.check_mode)))


if __name__ == "__main__":
    main()
