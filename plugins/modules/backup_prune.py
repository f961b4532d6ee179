#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_prune
short_description: Remove the backups that no rule keeps, without ever breaking a chain
version_added: 0.1.0
description:
  - Keeps the backups that the C(keep_*) rules name, and removes the others, for each VM by itself.
  - A backup that a kept one needs stays. With O(merge=true) its data goes into the kept one instead, which becomes
    independent of it. Incremental backups go on afterwards, without ever needing another full backup.
  - A merge makes new images, compares them with the old chain (C(qemu-img compare)) and exchanges the whole backup at
    once. Killed at any moment, it leaves the old or the new one, and the next run cleans up. Nothing that is published
    is ever written to.
  - The newest backup of a VM, protected backups, backups of level C(copy), and what cannot be read or restored are
    kept, each with the reason. They take no place in the counts of the rules, except for the newest.
  - An image that QEMU (or C(qemu-img)) has open, such as that of a VM that was restored with C(mode=instant), is not
    removed or replaced. This is seen for processes of this host, and on shared file systems that pass locks on.
  - Works under the VM's lock, so not at the same time as a backup of the same VM.
  - Runs on the host that has the repository. It does not talk to a VM. Merging needs C(qemu-img).
author:
  - blockops.qemu contributors (@blockops)
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._repository
attributes:
  check_mode:
    support: full
    details:
      - Answers as a run would, and neither locks nor writes anything. Checksums are compared only by a real merge.
  diff_mode:
    support: full
    details:
      - Shows the backups, and what each drive's image builds on, before and after.
  idempotent:
    support: full
options:
  vms:
    description: Names of the VMs whose backups are pruned; all of the repository when empty.
    type: list
    elements: str
    default: []
  keep_last:
    description:
      - Keep this many of the newest backups. V(-1) keeps all.
      - At least one C(keep_*) rule is needed, unless the task only protects backups.
    type: int
    default: 0
  keep_hourly:
    description: Keep the newest backup of each of the last so many hours that have one. V(-1) keeps all hours.
    type: int
    default: 0
  keep_daily:
    description: The same with days.
    type: int
    default: 0
  keep_weekly:
    description: The same with weeks, which begin on Monday (ISO 8601).
    type: int
    default: 0
  keep_monthly:
    description: The same with months.
    type: int
    default: 0
  keep_yearly:
    description: The same with years.
    type: int
    default: 0
  keep_within:
    description:
      - Keep everything that is at most so much older than the newest backup, written as V(2y5m7d3h).
      - The units are years, months, days and hours; C(m) are months. Backups in the future are kept.
    type: str
  keep_tags:
    description: Keep backups with one of these tags. V(a,b) means both.
    type: list
    elements: str
    default: []
  policy:
    description:
      - Whose way of counting. Both count only periods that have a backup.
      - V(restic) counts for each rule by itself, and keeps what any rule keeps. A rule that has counts left keeps the
        oldest backup as well.
      - V(proxmox) goes through the rules in the order above. A period in which an earlier rule has kept something is
        covered, and is not counted again, so the same numbers reach further back.
    type: str
    choices: [restic, proxmox]
    default: restic
  timezone:
    description:
      - The time zone of the calendar, such as V(Europe/Berlin). It decides where days, weeks and months begin.
    type: str
    default: UTC
  keep_newest:
    description: Keep the newest backup that can be restored, whatever the rules say.
    type: bool
    default: true
  protect:
    description: Ids of backups that are kept from now on, until they are named in O(unprotect).
    type: list
    elements: str
    default: []
  unprotect:
    description: Ids of backups whose protection ends.
    type: list
    elements: str
    default: []
  merge:
    description:
      - Merge backups that only others need into those.
      - A backup on which several kept ones build is kept, because its data would have to be stored several times.
      - Costs the reading of the whole chain and, where the oldest is a full backup, the writing of a new one.
    type: bool
    default: false
  verify:
    description: Compare the checksums of all images that a merge reads, before it does.
    type: bool
    default: true
  max_parallel:
    description: How many VMs are worked on at a time.
    type: int
    default: 2
  lock_timeout:
    description: Seconds to wait for whoever else works on the backups of a VM.
    type: float
    default: 30.0
seealso:
  - module: blockops.qemu.backup_info
  - module: blockops.qemu.backup_restore
  - module: blockops.qemu.qmp_drive_backup
"""

EXAMPLES = r"""
- name: Keep two weeks of days, two months of weeks and a year of months
  blockops.qemu.backup_prune:
    repository: /srv/backup
    keep_daily: 14
    keep_weekly: 8
    keep_monthly: 12

- name: Keep the last thirty incremental backups, and never take another full one
  blockops.qemu.backup_prune:
    repository: /srv/backup
    vms: [web1]
    keep_last: 30
    merge: true

- name: Count as Proxmox does, by the calendar of Berlin
  blockops.qemu.backup_prune:
    repository: /srv/backup
    keep_last: 3
    keep_daily: 13
    keep_yearly: 9
    policy: proxmox
    timezone: Europe/Berlin

- name: Keep one backup for good
  blockops.qemu.backup_prune:
    repository: /srv/backup
    protect: [20261123T054500Z-1f3c9a2e]
"""

RETURN = r"""
repository:
  description: The absolute path of the repository.
  returned: success
  type: str
vms:
  description: The VMs that were worked on, by name or in the order of O(vms).
  returned: success or failure of a VM
  type: list
  elements: dict
  contains:
    name:
      description: The VM.
      type: str
    changed:
      description: Whether something of it was changed (or would be).
      type: bool
    backups:
      description: Every backup of the VM as it was planned, unreadable ones first, then the newest first.
      type: list
      elements: dict
      contains:
        id:
          description: The backup.
          type: str
        action:
          description:
            - V(keep), V(remove), or V(merge) if its data goes into the backups that build on it, and then it is
              removed.
          type: str
        reasons:
          description: Why.
          type: list
          elements: str
        point:
          description: Its point in time; V(null) when its manifest cannot be read.
          type: str
        level:
          description: Its level as it was; V(null) when its manifest cannot be read.
          type: str
        freed:
          description: Bytes its old images give back, by being removed or replaced.
          type: int
    removed:
      description:
        - Ids of the backups that are gone (or would be), merged ones among them. After a failure, those that were.
      type: list
      elements: str
    merged:
      description: The kept backups that took data over.
      type: list
      elements: dict
      contains:
        backup:
          description: The backup.
          type: str
        drives:
          description: Its drives that were changed.
          type: list
          elements: dict
          contains:
            name:
              description: The drive.
              type: str
            absorbed:
              description: The backups whose data it took, the newest first.
              type: list
              elements: str
            parent:
              description: What the drive's image builds on now; V(null) if it stands alone.
              type: str
    protected:
      description: Ids of the backups that are protected now.
      type: list
      elements: str
    recovered:
      description: What a killed run had left, and was (or would be) put right first.
      type: list
      elements: str
    orphans:
      description: What lies in the VM's directory and belongs to no backup.
      type: list
      elements: dict
      contains:
        path:
          description: What.
          type: str
        reason:
          description: What it seems to be.
          type: str
        removed:
          description: Whether it is removed; only an unfinished backup that nobody has touched for a day is.
          type: bool
        size:
          description: The bytes it takes.
          type: int
    freed:
      description: Bytes on the file system that removed and replaced images took.
      type: int
    needed:
      description: Bytes that the new images of all merges take at most.
      type: int
    written:
      description: Bytes that the new images take; V(null) in check mode.
      type: int
    error:
      description: What failed for this VM, with C(kind) (a stable word), C(message) and data that depends on the kind.
      returned: on failure of the VM
      type: dict
error:
  description: What failed, with C(kind) (a stable word), C(message) and data that depends on the kind.
  returned: on failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible.runner import run
from ..module_utils._ansible.specs_prune import prune_request, prune_spec
from ..module_utils._ops.prune import prune


def main() -> None:
    module = AnsibleModule(**prune_spec())
    run(module, lambda: prune(prune_request(module.params), check_mode=module.check_mode))


if __name__ == "__main__":
    main()
