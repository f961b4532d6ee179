#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_img_info
short_description: Describe disk images, also ones that nobody vouches for
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Describes images and the chains below them, with snapshots, bitmaps, users and (if asked) consistency.
  - QEMU opens whatever an image's header names, be it another user's file, a device or a server. So this module reads
    the headers of the whole chain itself, and follows plain names of regular files inside O(allowed_directories) only.
    When anything else is found, C(qemu-img) is not run on that image at all, and RV(images[].problems) says which image
    of the chain it is, and why.
  - An image that a VM has open can be described too. What is returned may then be a moment old.
  - The task fails when one of the images could not be described; the others are in the result all the same.
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._attributes.info_module
options:
  images:
    description: The images, described in this order.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Path of the active image.
        type: path
        required: true
      format:
        description:
          - Its format.
          - If omitted, the image must be qcow2. Give V(raw) for raw images. Never omit it for an image that may be raw,
            because its guest can write whatever it wants into the place of a header.
        type: str
        choices: [qcow2, raw]
  allowed_directories:
    description:
      - Absolute paths of the directories that all files of a chain must lie in or below, links resolved.
      - If empty, each image's own directory.
    type: list
    elements: path
    default: []
  max_depth:
    description: The most images a chain may have.
    type: int
    default: 200
  max_virtual_size:
    description: The most bytes an image may show its guest, such as V(2T).
    type: bytes
    default: 64T
  check:
    description:
      - Also run C(qemu-img check) on the active images. It reads all metadata, which takes its time.
      - An image that is open for writing is not checked, and RV(images[].check_skipped) says so.
    type: bool
    default: false
  timeout:
    description: Seconds that each run of C(qemu-img) may take. It may use 4 GiB of memory.
    type: float
    default: 60.0
notes:
  - Only root sees the processes of others, so RV(images[].holders) is empty or incomplete for other users.
seealso:
  - module: blockops.qemu.qemu_img_snapshot
  - module: blockops.qemu.qmp_vm_info
"""

EXAMPLES = r"""
- name: Describe two images
  blockops.qemu.qemu_img_info:
    images:
      - path: /vms/web.qcow2
      - path: /vms/data.raw
        format: raw
  register: disks

- name: Look at an image from outside before anybody opens it
  blockops.qemu.qemu_img_info:
    images:
      - path: /srv/incoming/appliance.qcow2
        format: qcow2
    max_depth: 1
    max_virtual_size: 100G
    check: true
  register: incoming
  failed_when: incoming is failed or not incoming.images[0].check.sound

- name: Describe images whose templates lie elsewhere
  blockops.qemu.qemu_img_info:
    images:
      - path: /vms/web.qcow2
    allowed_directories:
      - /vms
      - /srv/templates
"""

RETURN = r"""
images:
  description: One element for each image, in the order of O(images).
  returned: always
  type: list
  elements: dict
  contains:
    path: {description: Its absolute path., type: str, sample: /vms/web.qcow2}
    error:
      description: Why it could not be described, with C(kind) (a stable word), C(message) and data about it.
      type: dict
      returned: on failure
    problems:
      description: Why C(qemu-img) was kept away from it. Empty when nothing is suspicious.
      type: list
      elements: dict
      contains:
        path: {description: The image of the chain., type: str}
        kind:
          description:
            - A stable word, one of V(Outside), V(Unreadable), V(NotRegular), V(FormatUnknown), V(FormatRefused),
              V(HeaderInvalid), V(TooLarge), V(BackingNotFile), V(DataFile), V(Loop), V(TooDeep).
          type: str
        reason: {description: Why., type: str}
    format: {description: Its format; null when it could not be read., type: str, sample: qcow2}
    virtual_size: {description: Bytes the guest sees., type: int}
    allocated: {description: Bytes its file takes on disk., type: int}
    cluster_size: {description: Bytes of a cluster., type: int}
    compat: {description: Version of the qcow2 format., type: str, sample: '1.1'}
    encrypted: {description: Whether it is encrypted., type: bool}
    dirty: {description: Whether it was not closed properly., type: bool}
    corrupt: {description: Whether it is marked as damaged., type: bool}
    chain:
      description: The images from the active one down to the base, as far as they could be followed.
      type: list
      elements: dict
      contains:
        path: {description: Path of the image., type: str}
        format: {description: Its format., type: str}
        backing_file: {description: The backing file as its header spells it., type: str}
        backing_format: {description: The format its header names for that., type: str}
        virtual_size: {description: Bytes a guest would see., type: int}
        allocated: {description: Bytes its file takes on disk., type: int}
        snapshot:
          description: Name of the external snapshot that lies below this image; null when there is no record beside it.
          type: str
    snapshots:
      description: Its internal snapshots.
      type: list
      elements: dict
      contains:
        id: {description: The id., type: str, sample: '1'}
        name: {description: The name., type: str}
        vm_state_size: {description: Bytes of memory and device state; 0 when only the disk is in it., type: int}
        date: {description: 'When it was taken, UTC.', type: str, sample: '2026-11-23T05:45:00Z'}
    bitmaps:
      description: Its persistent dirty bitmaps.
      type: list
      elements: dict
      contains:
        name: {description: The name., type: str}
        granularity: {description: Bytes that one bit stands for., type: int}
        recording: {description: Whether it records changes., type: bool}
        inconsistent: {description: 'Whether it was not saved, and knows nothing any more.', type: bool}
    in_use: {description: Whether a QEMU (or qemu-img) has it open., type: bool}
    open_for_writing: {description: Whether one has it open for writing., type: bool}
    holders:
      description: The processes that have the file open.
      type: list
      elements: dict
      contains:
        pid: {description: The process., type: int}
        command: {description: Its name., type: str, sample: qemu-system-x86}
    check:
      description: What C(qemu-img check) found; null when it was not run.
      type: dict
      contains:
        corruptions: {description: Places where data is lost or wrong., type: int}
        leaks: {description: Clusters that belong to nothing. They waste space and harm nobody., type: int}
        errors: {description: What could not be checked., type: int}
        sound: {description: Whether there are neither corruptions nor errors., type: bool}
    check_skipped: {description: Why it was not checked although O(check) asks for it., type: str}
error:
  description: What failed, with C(kind) (a stable word), C(message) and data that depends on the kind.
  returned: on failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible.runner import run
from ..module_utils._ansible.specs_image import image_info_request, image_info_spec
from ..module_utils._ops.img_info import describe_images


def main() -> None:
    module = AnsibleModule(**image_info_spec())
    run(module, lambda: describe_images(image_info_request(module.params)))


if __name__ == "__main__":
    main()
