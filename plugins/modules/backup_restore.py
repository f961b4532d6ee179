#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_restore
short_description: Restore drives of a backup into new files
version_added: 0.1.0
description:
  - Turns the drives of one point in time back into disk images.
  - Everything is checked before anything is written. All images along every chain must be there, have headers that
    name exactly what the manifests name, and have the right checksums; the destinations must be free, and the space
    sufficient.
  - Never overwrites an image and never writes to a backup. A destination that is there already and has the right
    content is left as it is; one with another content is an error.
  - All drives are restored, or none. A file appears under its name when it is complete and on disk. What a killed run
    leaves are hidden directories next to the destinations, which the next run removes.
  - Runs on the host that has the repository and the destination. It needs C(qemu-img), and does not talk to a VM.
author:
  - blockops.qemu contributors (@blockops)
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._repository
attributes:
  check_mode:
    support: full
    details:
      - Checks everything that a real run checks, checksums included, and compares destinations that are there already.
  diff_mode:
    support: full
    details:
      - Lists what is at each destination before and after.
  idempotent:
    support: full
    details:
      - A destination counts as restored when C(qemu-img compare) finds the content of the point in it. Once a VM has
        written to the file, running again is an error.
options:
  vm:
    description: The name of the VM whose backup is restored.
    type: str
    required: true
  point:
    description:
      - Which backup.
      - V(latest) is the newest backup that can be restored by itself and has all O(drives).
      - C(before:TIME) is the newest such backup whose point in time lies strictly before TIME, which is written as
        V(2026-11-23), V(2026-11-23T06:00Z) or V(2026-11-23T06:00:00+01:00), in UTC unless it says otherwise.
      - Anything else is the id of a backup.
    type: str
    default: latest
  dest:
    description:
      - Restore all drives of the backup into this existing directory, as C(DRIVE.qcow2) or C(DRIVE.raw).
      - DRIVE is the drive's name, percent-encoded where it has other characters than letters, digits, C(_), C(-) and
        C(.).
      - Mutually exclusive with O(drives).
    type: path
  drives:
    description:
      - Restore only these drives, into these files.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The drive's name, as M(blockops.qemu.backup_info) lists it.
        type: str
        required: true
      dest:
        description: Absolute path of the file to make. Its directory must exist.
        type: path
        required: true
      format:
        description: The format of the file, if not O(format).
        type: str
        choices: [qcow2, raw]
      base:
        description:
          - For a drive that was backed up without the data below it (C(standalone) is false), the image it belongs on.
          - It is read, not changed, and must not be in use.
        type: path
      base_format:
        description: The format of O(drives[].base).
        type: str
        choices: [qcow2, raw]
        default: qcow2
  format:
    description: The format of the restored files.
    type: str
    choices: [qcow2, raw]
    default: qcow2
  mode:
    description:
      - V(full) makes independent, sparse copies.
      - V(instant) makes empty overlays on the images in the repository, which takes a moment whatever their size (apart
        from O(verify), which reads them). A VM can boot from them and reads through to the backup, so the repository
        must stay where it is, the user QEMU runs as must be able to read it, and the backup must not be pruned.
      - C(block-stream) of the running VM (or C(qemu-img rebase -b "") of the stopped one) makes an overlay
        independent.
    type: str
    choices: [full, instant]
    default: full
  verify:
    description:
      - Compare the checksum of every file along every needed chain before anything is written.
      - Costs one read of these files. Without it, damage inside a file goes unnoticed.
      - Only drives that are going to be written are verified.
    type: bool
    default: true
  preallocation:
    description:
      - Preallocation of the restored files, as QEMU names it. V(off) keeps them sparse.
    type: str
    choices: ['off', metadata, falloc, full]
    default: 'off'
  owner:
    description: User (name or number) the restored images belong to. The user the module runs as, if not set.
    type: str
  group:
    description: Group (name or number) of the restored images.
    type: str
  file_mode:
    description: Permissions of the restored images, octal and quoted.
    type: str
    default: '0600'
  definition:
    description:
      - Whether to put back the files that were saved with the backup, such as the start-up definition and firmware
        variables.
      - V(original) puts them where they came from, V(directory) into O(definition_dest).
      - They keep their mode, and, when the module runs as root, their owner.
    type: str
    choices: [none, directory, original]
    default: none
  definition_dest:
    description: The existing directory for O(definition=directory).
    type: path
  overwrite_definition:
    description:
      - Replace saved files that exist with another content, and keep the present file as C(NAME.before-restore).
      - Without it, such a file is an error.
    type: bool
    default: false
seealso:
  - module: blockops.qemu.backup_info
"""

EXAMPLES = r"""
- name: Restore all drives of the newest backup
  blockops.qemu.backup_restore:
    repository: /srv/backup
    vm: web1
    dest: /var/lib/vms/web1.restored

- name: Restore one drive as it was before the incident, as a raw file for another hypervisor
  blockops.qemu.backup_restore:
    repository: /srv/backup
    vm: web1
    point: before:2026-11-23T06:00:00Z
    drives:
      - name: disk1
        dest: /var/lib/vms/web1-data.raw
        format: raw
    owner: qemu
    group: qemu

- name: Have a VM back within a second, and copy later
  blockops.qemu.backup_restore:
    repository: /srv/backup
    vm: web1
    dest: /var/lib/vms/web1.instant
    mode: instant

- name: Put the start-up definition back as well
  blockops.qemu.backup_restore:
    repository: /srv/backup
    vm: web1
    dest: /var/lib/vms/web1
    definition: original
    overwrite_definition: true
"""

RETURN = r"""
backup:
  description: The id of the backup that was restored.
  returned: success
  type: str
  sample: 20261123T054500Z-1f3c9a2e
level:
  description: The level of that backup.
  returned: success
  type: str
verified:
  description: Whether the checksum of every file that was needed was compared. V(false) when nothing had to be written.
  returned: success
  type: bool
seconds:
  description: How long it took.
  returned: success
  type: float
drives:
  description: The restored drives.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The drive.
      type: str
    path:
      description: The file.
      type: str
    format:
      description: Its format.
      type: str
    changed:
      description: Whether it was written (or would be); V(false) if it was there with the right content.
      type: bool
    bytes:
      description: The length of the file; V(null) in check mode when it is not there.
      type: int
    allocated:
      description: The bytes it takes on its file system; V(null) in check mode when it is not there.
      type: int
    needed:
      description: The bytes that were found to be needed at most; 0 if nothing had to be written.
      type: int
    virtual_size:
      description: Bytes the guest sees.
      type: int
    backup:
      description: The backup it was restored from.
      type: str
    chain:
      description: The ids of the backups whose images were needed, this one first.
      type: list
      elements: str
definition:
  description: The saved files that were put back.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: Where it is now.
      type: str
    from:
      description: Where it was when it was saved.
      type: str
    changed:
      description: Whether it was written (or would be).
      type: bool
error:
  description: What failed, with C(kind) (a stable word), C(message) and data that depends on the kind.
  returned: on failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible.runner import run
from ..module_utils._ansible.specs_repository import restore_request, restore_spec
from ..module_utils._ops.restore import restore


def main() -> None:
    module = AnsibleModule(**restore_spec())
    run(module, lambda: restore(restore_request(module.params), check_mode=module.check_mode))


if __name__ == "__main__":
    main()
