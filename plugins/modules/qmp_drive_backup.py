#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qmp_drive_backup
short_description: Back up running VMs into a repository
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Tells the QEMU process of each VM, over QMP, to copy its drives as of one instant into a repository, and publishes
    the copy there as a backup once it is complete, on disk and checked. The VM goes on running.
  - All drives of a VM share one point in time. If one drive fails, none is published and nothing is lost; the next
    backup is as small as it would have been.
  - Changes since the last backup are tracked by dirty bitmaps in the images, named after the backup they follow. When
    tracking was lost (QEMU was killed, the image was replaced), the drive gets a full backup, and the result says why.
  - Whatever an earlier run left behind, killed at any moment, is adopted or cleaned up first.
  - QEMU needs no permission on the repository. This module opens the files and passes them to QEMU.
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._ownership
  - blockops.qemu._vms
attributes:
  check_mode:
    support: full
    details: Reports the level each drive would get, why, and how much would be copied at most.
  diff_mode:
    support: full
  idempotent:
    support: partial
    details:
      - With O(max_age) nothing is done while a published backup is younger. Without it each run makes a backup.
      - O(state=cancelled) and O(state=recovered) are idempotent.
options:
  vms:
    required: true
  repository:
    description:
      - The repository's directory on this host. It is made with the first backup; the directory above it must exist,
        so that a file system which is not mounted is noticed.
    type: path
    required: true
  state:
    description:
      - V(present) makes a backup, or finishes one that is under way.
      - V(cancelled) ends a backup that is under way and removes what there is of it. The tracking of changes is kept.
        Only a copy with O(sync=none), which has no other end, is published by it.
      - V(recovered) adopts or cleans up what earlier runs left behind, and starts nothing.
    type: str
    choices: [present, cancelled, recovered]
    default: present
  level:
    description:
      - V(auto) is V(incremental) where that is possible and V(full) elsewhere, decided for each drive.
      - V(full) copies everything and starts a new chain.
      - V(incremental) copies what has changed since the newest backup, V(differential) since the newest full one.
        A drive for which that is not possible gets a full copy; see O(on_lost_bitmap).
      - V(copy) copies everything and stays outside of every chain; tracking goes on as if it had not been made.
    type: str
    choices: [auto, full, incremental, differential, copy]
    default: auto
  max_age:
    description:
      - Do nothing while the newest backup that has all the drives is younger than this. Seconds, or a number with
        C(m), C(h), C(d) or C(w).
      - A backup that an earlier run had started and this one publishes counts as well. When its point in time is
        older, another backup follows.
    type: str
  drives:
    description: Names of the drives to back up, for VMs that do not name their own in O(vms).
    type: list
    elements: str
  exclude_drives:
    description: Names of drives to leave out, for VMs that do not name their own in O(vms).
    type: list
    elements: str
  definition:
    description:
      - Files saved with the backup, such as the VM's start-up definition and its firmware variables, for VMs that do
        not name their own in O(vms).
    type: list
    elements: path
  compress:
    description:
      - Compress the images with zstd while copying. This costs QEMU about one core at 140 MB/s.
    type: bool
    default: false
  bandwidth:
    description:
      - Bytes per second for all jobs of this task together; shared evenly by those that run. Default is no limit.
    type: int
  quiesce:
    description:
      - Whether the guest's file systems are frozen by the guest agent at the point in time. Everything is prepared
        before; the frozen window holds a single QMP transaction, and is returned as RV(vms[].freeze_ms).
      - V(required) fails without a backup when the guest cannot be frozen. V(try) goes on, with a warning, and the
        backup says V(crash) as its consistency. V(off) does not try.
    type: str
    choices: [required, try, "off"]
    default: try
  freeze_timeout:
    description: Seconds the guest may be frozen at most. It is thawed then, also when this module is killed.
    type: float
    default: 10.0
  on_lost_bitmap:
    description: What to do for a drive that has backups but cannot continue from them. Take a full, or fail.
    type: str
    choices: [full, fail]
    default: full
  sync:
    description:
      - For experts. QEMU's own sync mode; the result is published as a level V(copy) outside of every chain.
      - V(full) copies all data, as O(level=copy) does.
      - V(top) copies only the active image, without its backing chain. It can be restored only onto the same base.
      - V(none) saves nothing but the old data of what the guest overwrites, until O(state=cancelled).
      - V(incremental) and V(bitmap) copy what is marked in O(bitmap), a bitmap of your own.
        V(incremental) clears it when the copy succeeded, V(bitmap) as O(bitmap_mode) says.
    type: str
    choices: [full, top, none, incremental, bitmap]
  bitmap:
    description: Name of a dirty bitmap of your own on the active image, for O(sync=incremental) and O(sync=bitmap).
    type: str
  bitmap_mode:
    description:
      - When O(bitmap) is cleared, with O(sync=bitmap). V(on-success) when the copy succeeded, V(never) never,
        V(always) of what was copied even if the copy failed.
    type: str
    choices: [on-success, never, always]
  verify:
    description:
      - Check each image with C(qemu-img check) and record its SHA-256 before it is published.
    type: bool
    default: true
  wait:
    description:
      - With V(false) the task ends as soon as the jobs run. They go on inside QEMU; a later run of this module adopts
        and publishes them.
    type: bool
    default: true
  job_timeout:
    description:
      - Seconds to wait for the jobs. When they are over, the VM fails with the progress, and its jobs go on; a later
        run adopts them. Default is to wait as long as it takes.
    type: float
  tags:
    description: Words recorded with the backup.
    type: list
    elements: str
    default: []
seealso:
  - module: blockops.qemu.qmp_vm_info
  - module: blockops.qemu.backup_info
  - module: blockops.qemu.backup_restore
"""

EXAMPLES = r"""
- name: Back up all VMs of this hypervisor, incrementally where possible
  blockops.qemu.qmp_drive_backup:
    repository: /srv/backup
    vms: "{{ hypervisor.vms }}"
    max_age: 20h

- name: Take a full backup of one VM with frozen file systems, and save its start-up definition
  blockops.qemu.qmp_drive_backup:
    repository: /srv/backup
    level: full
    quiesce: required
    vms:
      - name: web
        socket: /run/vms/web.qmp
        agent_socket: /run/vms/web.qga
        definition: [/etc/vms/web.conf]

- name: Start a backup and do not wait for it
  blockops.qemu.qmp_drive_backup:
    repository: /srv/backup
    vms: "{{ hypervisor.vms }}"
    wait: false
"""

RETURN = r"""
vms:
  description: One element for each VM, in the order of O(vms).
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the VM.
      type: str
      returned: always
    socket:
      description: Its QMP socket.
      type: str
      returned: always
    uuid:
      description: Its UUID; null when QEMU was started without one.
      type: str
      returned: when QEMU answered
    changed:
      description: Whether anything was (or would be) changed for this VM.
      type: bool
      returned: always
    error:
      description: What failed, with C(kind) (a stable word), C(message) and data that depends on the kind.
      type: dict
      returned: on failure
    status:
      description: One of V(published), V(running), V(unchanged), V(planned), V(cancelled), V(recovered).
      type: str
      returned: success
    reason:
      description: Why nothing was done.
      type: str
      returned: when there is no repository to cancel or recover in
    backup:
      description: Id of the backup that was made, runs, would be adopted, or is young enough.
      type: str
      returned: when there is a backup
    path:
      description: Directory of the backup, there once it is published.
      type: str
      returned: when there is a backup
    level:
      description: V(full) when every drive is; V(incremental), V(differential) or V(copy).
      type: str
      returned: when there is a backup or a plan
    point:
      description: The point in time (UTC).
      type: str
      returned: when there is a backup
    consistency:
      description: V(filesystem) when the guest was frozen at the point in time, else V(crash).
      type: str
      returned: when there is a backup
    freeze_ms:
      description: Milliseconds from freeze to thaw; null when nothing was frozen.
      type: float
      returned: when there is a backup
    transaction_ms:
      description: Milliseconds of the transaction that is the point in time.
      type: float
      returned: when this run started the backup
    bytes:
      description: Bytes copied from the VM; 0 while the jobs run.
      type: int
      returned: when there is a backup
    bytes_bound:
      description: Bytes of data that would be copied at most, areas of zeros not counted.
      type: int
      returned: when there is a plan
    seconds:
      description: Seconds this VM took.
      type: float
      returned: with status published
    adopted:
      description: Whether this run adopts a backup that an earlier one started.
      type: bool
      returned: when there is a backup
    jobs:
      description: Ids of the jobs inside QEMU.
      type: list
      elements: str
      returned: with status running
    commands:
      description: The QMP transaction that is (or would be) the point in time of all drives.
      type: list
      elements: dict
      returned: when this run started the backup, and in check mode
    recovered:
      description: What was found of earlier runs and cleaned up.
      type: list
      elements: str
      returned: success
    skipped:
      description: Drives that are not in the backup, with C(name) and C(reason).
      type: list
      elements: dict
      returned: when there is a backup or a plan
    drives:
      description:
        - The drives of the backup, with C(name), C(level), C(reason) (why a full was taken although an incremental was
          asked for), C(parent), C(virtual_size), C(size) of the file, C(copied) bytes, C(sha256), C(file), C(path), and
          C(standalone) (whether it can be restored without a base of yours).
        - Of a plan C(name), C(level), C(sync), C(reason), C(parent), C(node), C(source), C(virtual_size) and
          C(bytes_bound).
      type: list
      elements: dict
      returned: when there is a backup or a plan
error:
  description: Why nothing was tried on any VM, with C(kind) (a stable word), C(message) and data about it.
  returned: when the options cannot be meant
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible import runner
from ..module_utils._ansible.backup import backup_options, backup_spec
from ..module_utils._ansible.dependencies import require_qemu_qmp
from ..module_utils._ops.drive_backup import DriveBackup


def main() -> None:
    module = AnsibleModule(argument_spec=backup_spec(), supports_check_mode=True)
    require_qemu_qmp(module)
    runner.run_vms(module, lambda: DriveBackup(backup_options(module)))


if __name__ == "__main__":
    main()
