#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_verify
short_description: Prove that backups can be restored
version_added: 0.1.0
description:
  - Looks at everything that restoring a point needs. All images along every chain are there, and their headers name
    exactly what the manifests name. That is always looked at.
  - Reads the files and compares their checksums, lets C(qemu-img check) look at the structure of the images, and
    boots the point in an isolated QEMU to see that it lives (the restore drill).
  - Writes the result into the record C(verified.json) beside the manifest. The record is bound by checksum to the
    manifests that the point needs, and M(blockops.qemu.backup_info) shows it. Nothing else is written there.
  - A drill boots throw-away overlays; the images of the backup are their read-only backing files. Overlays, sockets and
    console are in a private directory. The QEMU of a drill has no network, and a name and uuid of its own. It is
    always ended and the directory removed, also when the module is killed.
  - One backup that fails does not stop the others. The task fails at the end and names those that failed.
  - Takes no lock. A backup that is pruned or replaced meanwhile is an error of its own, and is not recorded.
author:
  - blockops.qemu contributors (@blockops)
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._repository
attributes:
  check_mode:
    support: full
    details:
      - Says which backups would be verified, and looks at chains and headers. Reads no files and boots nothing, so it
        cannot foresee what these would find.
  diff_mode:
    support: full
    details:
      - Shows the outcomes in the record of each backup before and after.
  idempotent:
    support: partial
    details:
      - With O(max_age) or with O(point=unverified), what is verified is left alone. Otherwise every run verifies again,
        and writes a new record.
options:
  vm:
    description: Names of the VMs whose backups are verified. All of the repository if empty.
    type: list
    elements: str
    default: []
  point:
    description:
      - Which backups of each VM.
      - V(latest) is the newest, even if it cannot be restored, because that is what has to be found.
      - V(all) is every backup, V(unverified) every backup that has not passed all of O(checks) as it is now (or
        not within O(max_age)).
      - C(before:TIME) is the newest whose point in time lies strictly before TIME, which is written as V(2026-11-23),
        V(2026-11-23T06:00Z) or V(2026-11-23T06:00:00+01:00), in UTC unless it says otherwise, and which has a complete
        chain.
      - Anything else is the id of a backup, and needs exactly one name in O(vm).
    type: str
    default: latest
  checks:
    description:
      - What to do besides looking at the chain and the headers.
      - V(checksums) reads every file that the point needs and compares its SHA-256 with the manifest, saved files too.
        A file is read once per run, however many points need it.
      - V(images) lets C(qemu-img check) look at the structure of every image.
      - V(drill) boots the point, as O(drill) says.
      - They are done in this order. What comes after a check that failed is not done.
    type: list
    elements: str
    choices: [checksums, images, drill]
    default: [checksums, images]
  drill:
    description:
      - How a point is booted, and what proves that it lives.
      - Of O(drill.agent), O(drill.console) and O(drill.check) all that are given have to hold, in this order.
    type: dict
    suboptions:
      qemu:
        description: The QEMU, as a path or a name.
        type: str
        default: qemu-system-x86_64
      machine:
        description: The machine type, with its properties.
        type: str
        default: q35
      accel:
        description: The accelerators to try.
        type: str
        default: kvm:tcg
      cpu:
        description: The processor model. QEMU's own default if not set.
        type: str
      cpus:
        description: How many processors.
        type: int
        default: 1
      memory:
        description: Memory of the VM, in bytes or with a unit such as V(2G).
        type: bytes
        default: 1G
      interface:
        description:
          - What the drives are attached to, in the order of the manifest, with the serial numbers it records.
          - V(ide) is for machines with a controller for it, such as C(pc), and at most four drives.
        type: str
        choices: [virtio-blk, virtio-scsi, sata, ide, nvme]
        default: virtio-blk
      arguments:
        description:
          - More arguments of QEMU, such as V(-kernel) or a read-only firmware.
          - C({drive:NAME}) stands for the path of a drive's overlay, C({directory}) for the drill's directory, which
            is also the working directory, so other paths should be absolute.
          - What would connect the drill with anything outside of it is refused. That is networks, sockets, monitors,
            devices of the host, and disks that are neither an overlay nor read-only.
        type: list
        elements: str
        default: []
      command:
        description:
          - The whole command line, program first, instead of all the options above. It must name at least one
            C({drive:NAME}), and follows the rules of O(drill.arguments).
          - Name, uuid, console, agent channel and QMP socket are added to it.
        type: list
        elements: str
        default: []
      agent:
        description:
          - The guest agent has to answer. The module adds its channel.
          - Default is V(true) if neither O(drill.console) nor O(drill.check) is given.
        type: bool
      console:
        description: A Python regular expression that has to be found in what the guest prints on its first serial port.
        type: str
      check:
        description:
          - A program with arguments that has to end with status 0. It is run on this host, without a shell, when the
            other conditions hold.
          - It finds its way by the environment variables E(BLOCKOPS_AGENT_SOCKET), E(BLOCKOPS_QMP_SOCKET),
            E(BLOCKOPS_CONSOLE), E(BLOCKOPS_VM), E(BLOCKOPS_BACKUP) and E(BLOCKOPS_DRILL_DIRECTORY), which is also its
            working directory.
        type: list
        elements: str
        default: []
      timeout:
        description: Seconds until everything must have been seen.
        type: float
        default: 300.0
  work_directory:
    description:
      - Where drills make their private directories, with room for what the guests write while they boot.
      - What killed runs left there is removed first.
    type: path
    default: /var/tmp
  max_age:
    description:
      - Leave a backup alone that passed all of O(checks), as it is now, less than so long ago.
      - Seconds, or a number with C(s), C(m), C(h), C(d) or C(w).
    type: str
  record:
    description: Whether to write the record. Without it a read-only repository can be verified, and nothing is changed.
    type: bool
    default: true
  max_parallel:
    description: How many backups are verified, and so how many drills run, at the same time.
    type: int
    default: 2
seealso:
  - module: blockops.qemu.backup_info
  - module: blockops.qemu.backup_restore
"""

EXAMPLES = r"""
- name: Read the newest backup of every VM and compare the checksums, at most once a day
  blockops.qemu.backup_verify:
    repository: /srv/backup
    max_age: 20h

- name: Boot the newest backup of every VM once a week, and wait for its guest agent
  blockops.qemu.backup_verify:
    repository: /srv/backup
    checks: [checksums, images, drill]
    drill:
      memory: 2G
    max_age: 7d

- name: See that the database starts in the copy
  blockops.qemu.backup_verify:
    repository: /srv/backup
    vm: [db]
    checks: [drill]
    drill:
      command:
        - qemu-system-x86_64
        - -M
        - q35,accel=kvm
        - -m
        - 4G
        - -drive
        - file={drive:vda},format=qcow2,if=virtio
      agent: true
      check: [/usr/local/sbin/ask-the-database]
      timeout: 600

- name: Verify all that was never verified, on a copy of the repository that cannot be written to
  blockops.qemu.backup_verify:
    repository: /mnt/offsite
    point: unverified
    record: false
"""

RETURN = r"""
repository:
  description: Absolute path of the repository.
  returned: when it could be read
  type: str
  sample: /srv/backup
backups:
  description: The selected backups, VM by VM, oldest first.
  returned: when the repository could be read
  type: list
  elements: dict
  contains:
    vm:
      description: The VM.
      type: str
    backup:
      description: The id of the backup; V(null) when the VM has none.
      type: str
    point:
      description: Its point in time.
      type: str
    level:
      description: Its level.
      type: str
    changed:
      description: Whether a record was written, or would be.
      type: bool
    outcome:
      description: V(passed) or V(failed). V(null) in check mode, and when nothing could be found out.
      type: str
    due:
      description: Why it was to be verified; V(null) when it was left alone.
      type: str
    checks:
      description: What is known of the backup as it is now, from this run and earlier ones.
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
          description: How long it took; of a drill that passed, from the start of QEMU until all conditions held.
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
    images:
      description: How many images the point needs.
      type: int
    without_checksum:
      description: Files that could not be compared, because their backup was made without checksums.
      type: list
      elements: str
    seconds:
      description: How long this run took for the backup.
      type: float
    seconds_to_boot:
      description: Of the newest drill, if it passed; V(null) otherwise.
      type: float
    record:
      description: The path of the record; V(null) when there is none.
      type: str
    error:
      description: What failed, with C(kind), C(message) and data that depends on the kind, such as C(console).
      type: dict
error:
  description: What failed, with C(kind) (a stable word), C(message) and data that depends on the kind.
  returned: on failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible.runner import run
from ..module_utils._ansible.specs_verify import verify_request, verify_spec
from ..module_utils._ops.verify import verify


def main() -> None:
    module = AnsibleModule(**verify_spec())
    run(module, lambda: verify(verify_request(module.params), check_mode=module.check_mode))


if __name__ == "__main__":
    main()
