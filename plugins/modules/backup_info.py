#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_info
short_description: List the backups in a repository
version_added: 0.1.0
description:
  - Lists the VMs and backups of a repository, newest first, and says of each whether it can be restored.
  - A backup is RV(vms[].backups[].complete) when every image of every chain it needs is there, is a regular file, and
    has the length its manifest records. Contents are not read; M(blockops.qemu.backup_restore) compares checksums.
  - Nothing is written, no lock is taken, and no image is opened.
author:
  - blockops.qemu contributors (@blockops)
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._attributes.info_module
  - blockops.qemu._repository
options:
  vm:
    description:
      - Names of the VMs to list. All of the repository if empty.
      - A VM without backups gives an empty entry.
    type: list
    elements: str
    default: []
  point:
    description:
      - Also select one backup and return it as RV(point). Needs exactly one name in O(vm).
      - V(latest) is the newest backup that can be restored by itself.
      - C(before:TIME) is the newest such backup whose point in time lies strictly before TIME, which is written as
        V(2026-11-23), V(2026-11-23T06:00Z) or V(2026-11-23T06:00:00+01:00), in UTC unless it says otherwise.
      - Anything else is the id of a backup.
    type: str
  drives:
    description:
      - With O(point=latest) and C(before:TIME), pass over backups that do not have all of these drives.
    type: list
    elements: str
    default: []
seealso:
  - module: blockops.qemu.backup_restore
  - module: blockops.qemu.backup_verify
"""

EXAMPLES = r"""
- name: List everything
  blockops.qemu.backup_info:
    repository: /srv/backup
  register: catalogue

- name: Fail when a backup cannot be restored
  ansible.builtin.assert:
    that: item.backups | rejectattr('complete') | length == 0 and item.broken | length == 0
  loop: "{{ catalogue.vms }}"
  loop_control:
    label: "{{ item.name }}"

- name: Find the last backup before the incident
  blockops.qemu.backup_info:
    repository: /srv/backup
    vm:
      - web1
    point: before:2026-11-23T06:00:00Z
  register: before
"""

RETURN = r"""
repository:
  description: Absolute path of the repository.
  returned: success
  type: str
  sample: /srv/backup
repository_id:
  description: The repository's id.
  returned: success
  type: str
  sample: 5e11ab1e
vms:
  description: One entry per VM.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The VM's name.
      type: str
      sample: web1
    uuid:
      description: The uuid of its newest backup; V(null) when QEMU had none.
      type: str
    directory:
      description: Where its backups lie.
      type: str
      sample: /srv/backup/web1
    backups:
      description: Its backups, newest first.
      type: list
      elements: dict
      contains: &backup
        id:
          description: The id, which is also the name of the directory.
          type: str
          sample: 20261123T054500Z-1f3c9a2e
        path:
          description: The directory.
          type: str
        sequence:
          description: The place in the order of this VM's backups.
          type: int
        level:
          description: V(full), V(incremental), V(differential) or V(copy).
          type: str
        sync:
          description: QEMU's word for how the data was chosen.
          type: str
        consistency:
          description: V(filesystem) when the guest agent had frozen the file systems, otherwise V(crash).
          type: str
        point:
          description: The point in time, UTC.
          type: str
          sample: '2026-11-23T05:45:01.000000Z'
        started:
          description: When the run began.
          type: str
        finished:
          description: When the run ended.
          type: str
        freeze_ms:
          description: Milliseconds between freeze and thaw; V(null) when nothing was frozen.
          type: float
        size:
          description: Bytes of all its images.
          type: int
        copied:
          description: Bytes that were copied from the VM.
          type: int
        virtual_size:
          description: Bytes the guest sees, all drives together.
          type: int
        complete:
          description: Whether every chain it needs is there.
          type: bool
        incomplete_reason:
          description: What is missing; V(null) when nothing is.
          type: str
        checksums:
          description: Whether every image of this backup has a checksum to verify.
          type: bool
        verified:
          description: What M(blockops.qemu.backup_verify) found out about it; V(null) when it never looked at it.
          type: dict
          contains:
            outcome:
              description: V(passed) or V(failed), over all checks.
              type: str
            current:
              description: Whether that is about what lies there now, and not about a backup that was replaced since.
              type: bool
            finished:
              description: When the newest check ended.
              type: str
            checks:
              description: The newest result of each check.
              type: list
              elements: dict
              contains:
                name:
                  description: V(chain), V(checksums), V(images) or V(drill).
                  type: str
                outcome:
                  description: V(passed) or V(failed).
                  type: str
                started:
                  description: When it began.
                  type: str
                finished:
                  description: When it ended.
                  type: str
                seconds:
                  description: Seconds it took; of a drill that passed, from QEMU's start until all conditions held.
                  type: float
                bytes:
                  description: How many bytes were compared.
                  type: int
                kind:
                  description: The kind of error; V(null) if it passed.
                  type: str
                message:
                  description: The error; V(null) if it passed.
                  type: str
                conditions:
                  description: The conditions of a drill that held.
                  type: list
                  elements: str
                host:
                  description: The host it was done on.
                  type: str
                collection:
                  description: The version of this collection that did it.
                  type: str
        drives:
          description: Its drives.
          type: list
          elements: dict
          contains:
            name:
              description: The drive's name in QEMU.
              type: str
              sample: disk0
            path:
              description: The image.
              type: str
            level:
              description: The level of this drive.
              type: str
            reason:
              description: Why this drive got a full although an incremental was asked for; V(null) if it did not.
              type: str
            parent:
              description: The backup this image builds on; V(null) for a standalone image.
              type: str
            standalone:
              description: Whether the image needs nothing below its chain. V(false) only after an expert's sync.
              type: bool
            virtual_size:
              description: Bytes the guest sees.
              type: int
            size:
              description: Bytes of the image file.
              type: int
            copied:
              description: Bytes that were copied from the VM.
              type: int
            sha256:
              description: The checksum of the image file; V(null) when the backup was made without.
              type: str
            chain:
              description: The ids of the backups that restoring this drive needs, this one first. Empty when broken.
              type: list
              elements: str
            complete:
              description: Whether the chain is there.
              type: bool
            incomplete_reason:
              description: What is missing; V(null) when nothing is.
              type: str
            source:
              description: Where it came from, for information only.
              type: dict
              contains:
                file:
                  description: The active image at that time.
                  type: str
                format:
                  description: Its format.
                  type: str
                serial:
                  description: The drive's serial number.
                  type: str
        skipped:
          description: Drives of the VM that are not in this backup.
          type: list
          elements: dict
          contains:
            name:
              description: The drive.
              type: str
            reason:
              description: Why.
              type: str
        definition:
          description: Files that were saved with the backup.
          type: list
          elements: dict
          contains:
            path:
              description: Where the file came from.
              type: str
            file:
              description: Where it lies in the backup.
              type: str
            mode:
              description: Its mode, octal.
              type: str
            uid:
              description: Its owner.
              type: int
            gid:
              description: Its group.
              type: int
            size:
              description: Its length in bytes.
              type: int
            sha256:
              description: Its checksum.
              type: str
        tags:
          description: The tags it was given.
          type: list
          elements: str
        warnings:
          description: What the run that made it warned of.
          type: list
          elements: str
        qemu_version:
          description: The version of QEMU it was made with.
          type: str
        collection:
          description: The version of this collection it was made with.
          type: str
    broken:
      description: Directories that should be backups, but whose manifest was refused.
      type: list
      elements: dict
      contains:
        id:
          description: The directory's name.
          type: str
        kind:
          description: The kind of error, such as V(ManifestInvalid) or V(FormatUnsupported).
          type: str
        reason:
          description: The error.
          type: str
    partials:
      description: Backups that are being made, or were left unfinished; the next backup of the VM goes on or cleans up.
      type: list
      elements: dict
      contains:
        id:
          description: The id it will have.
          type: str
        path:
          description: The directory.
          type: str
point:
  description: The backup O(point) means; V(null) when it was not given.
  returned: success
  type: dict
  contains: *backup
error:
  description: What failed, with C(kind) (a stable word), C(message) and data that depends on the kind.
  returned: on failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible.runner import run
from ..module_utils._ansible.specs_repository import info_query, info_spec
from ..module_utils._ops.catalogue import catalogue


def main() -> None:
    module = AnsibleModule(**info_spec())
    run(module, lambda: catalogue(info_query(module.params)))


if __name__ == "__main__":
    main()
