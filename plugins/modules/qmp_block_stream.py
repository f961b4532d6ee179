#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qmp_block_stream
short_description: Make images of running VMs independent of those below them
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Copies what is in the images below into an image of a running VM's chain, while the guest goes on. Those below
    leave the chain and are not changed.
  - Without O(base) and O(bottom) all of them do, and the image needs no other one. A VM that was restored instantly
    becomes independent of its backup that way.
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
  top:
    description:
      - The image that takes up the data, by its file, its node name, or the name of a snapshot (which is the image
        below that snapshot's overlay). Default is the active image.
    type: str
  base:
    description: The image that stays below it, named as O(top). Default is none.
    type: str
  bottom:
    description:
      - The lowest image that is copied, named as O(top), instead of O(base). The one below it stays.
      - If it is in no chain any more, all is done.
    type: str
  drives:
    description: Names of the drives to work on. Default is every drive that holds an image.
    type: list
    elements: str
  exclude_drives:
    description: Names of drives to leave out.
    type: list
    elements: str
  delete:
    description:
      - Whether the files of images that have left the chain are deleted.
      - Only overlays that this collection made go, and only if nothing else is based on them or has them open. All
        others stay and are named in RV(vms[].kept).
      - Set to V(true) in a later run it also deletes what an earlier run left.
    type: bool
    default: false
  on_error:
    description:
      - What QEMU does when reading or writing an image fails while it merges.
      - V(report) ends the job, and the chain is what it was. V(ignore) tries again and again.
      - V(stop) pauses the job at any error, V(enospc) when a file system is full; other errors end it. The task fails
        and the job stays. Mend the cause and run the task again, which resumes it.
      - A job of an earlier run goes on under the policy it was started with.
    type: str
    choices: [report, stop, ignore, enospc]
    default: report
  bandwidth:
    description: Bytes per second that merging may copy, for each VM. Default is no limit.
    type: int
  definition:
    description:
      - Files that say how a VM is started (script, unit, environment file). In those the path of each drive's image is
        replaced when the active image changes. The file as it was is kept beside it, with C(.before-snapshot) added.
      - Without it RV(vms[].boot_drift) and a warning tell what a cold start would get wrong.
      - An entry of O(vms) may have its own.
    type: list
    elements: path
  job_timeout:
    description:
      - Seconds that one merge may take. Default is no limit.
      - After that the task fails, and the job goes on. Run again to follow it further.
    type: float
notes:
  - All merges of a VM are planned, and what would not work is refused, before anything is started. Whether other images
    are based on one that would change is looked up in the directories of the VM's images; on shared storage other hosts
    can have some that are not seen.
  - Tracking bitmaps of the merged images go on in the image that stays, so the next backup by
    M(blockops.qemu.qmp_drive_backup) is an incremental one.
  - A job that a killed run has left is adopted, also one that is paused, and followed to its end.
  - A VM with other block jobs, such as a backup, is refused and not touched.
seealso:
  - module: blockops.qemu.qmp_block_commit
  - module: blockops.qemu.backup_restore
  - module: blockops.qemu.qmp_snapshot
"""

EXAMPLES = r"""
- name: Make a VM that was restored instantly independent of its backup
  blockops.qemu.qmp_block_stream:
    bandwidth: 52428800
    vms:
      - socket: /run/vms/web.qmp

- name: Leave the template, which other VMs use, as the only image below
  blockops.qemu.qmp_block_stream:
    base: /srv/templates/debian.qcow2
    delete: true
    vms: "{{ hypervisor.vms }}"
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
      description: V(merged), or V(unchanged) when the chains are what they should be. In check mode what it would be.
      type: str
      returned: when the chains could be read
    drives:
      description: The chains, drive by drive. In check mode as they would be.
      type: list
      elements: dict
      returned: when the chains could be read
      contains:
        name: {description: Name of the drive., type: str, returned: always}
        before:
          description: Files of the chain before, the active image first.
          type: list
          elements: str
          returned: always
        after: {description: Files of the chain after it., type: list, elements: str, returned: always}
        bytes: {description: Bytes that all its steps copy at most., type: int, returned: always}
        steps:
          description: The jobs, in their order.
          type: list
          elements: dict
          returned: always
          contains:
            how: {description: V(commit) or V(stream)., type: str, returned: always}
            target: {description: The image that stays and takes up the data., type: str, returned: always}
            dropped:
              description: The images that leave the chain, the topmost first.
              type: list
              elements: str
              returned: always
            bytes: {description: Bytes that it copies at most., type: int, returned: always}
            space_needed: {description: Bytes that the target may grow by., type: int, returned: always}
            space_free:
              description: Bytes free on its file system when it was planned; null when it is no file.
              type: int
              returned: always
    skipped:
      description: Drives that were left out, with C(name) and C(reason).
      type: list
      elements: dict
      returned: when the chains could be read
    recovered:
      description: What a killed run had left and was (or would be) cleaned up.
      type: list
      elements: str
      returned: when the chains could be read
    deleted:
      description: Files that were (or would be) deleted.
      type: list
      elements: str
      returned: when the chains could be read
    kept:
      description: Files that have left the chain and stay where they are.
      type: list
      elements: str
      returned: when the chains could be read
    boot_drift:
      description:
        - Drives whose active image is not the one QEMU was started with, with C(drive), C(old) and C(new). Null if the
          command line of QEMU cannot be read.
      type: list
      elements: dict
      returned: when the chains could be read
    definition:
      description:
        - Definition files that were (or would be) rewritten, with C(path) and C(backup), the copy of the old one.
      type: list
      elements: dict
      returned: when the chains could be read
    commands:
      description: QMP commands that were sent and may have changed something; in check mode the decisive ones.
      type: list
      elements: dict
      returned: when the chains could be read
    seconds: {description: Seconds it took., type: float, returned: when the chains could be read}
error:
  description: Why nothing was tried on any VM, with C(kind) (a stable word), C(message) and data about it.
  returned: when the options cannot be meant
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible import runner
from ..module_utils._ansible.dependencies import require_qemu_qmp
from ..module_utils._ansible.specs_chain import stream_options, stream_spec
from ..module_utils._ops.chain import ChainVms


def main() -> None:
    module = AnsibleModule(argument_spec=stream_spec(), supports_check_mode=True)
    require_qemu_qmp(module)
    runner.run_vms(module, lambda: ChainVms(stream_options(module)))


if __name__ == "__main__":
    main()
