#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qmp_snapshot
short_description: Snapshots of running VMs
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Makes sure that running VMs have, or do not have, a snapshot of a given name, or brings them back to it.
  - An external snapshot puts a new image (an overlay) on top of each drive's chain, in one transaction for all drives
    of a VM, and for all VMs of the task with O(group). The image below no longer changes; it is the snapshot.
    Removing the snapshot merges the two images again. Going back to it puts a fresh overlay on the snapshot, without
    ending the QEMU process.
  - An internal snapshot is kept inside the qcow2 image of each drive.
  - A memory snapshot is an internal one together with the memory and the devices of the running VM.
  - Backups go on across snapshots. An overlay gets the dirty bitmaps that M(blockops.qemu.qmp_drive_backup) needs in
    the transaction of the snapshot, so the next incremental backup is an incremental one.
  - Beside each overlay lies a small file C(OVERLAY.snapshot.json) that says which snapshot it follows. The collection
    deletes only overlays that have one.
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._vms
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: partial
    details:
      - With O(state=reverted) a second run goes back again if anything has been written since the first, and a running
        guest writes all the time.
options:
  vms:
    description:
      - The VMs to work on.
    required: true
  name:
    description:
      - Name of the snapshot. It becomes a part of file names.
      - 1 to 63 letters, digits, V(_), V(.) and V(-), beginning with a letter or digit.
      - Required unless O(state=recovered).
    type: str
  state:
    description:
      - V(present) takes the snapshot, unless all the drives have one of this name.
      - V(absent) removes it and keeps what was written since. An external one is merged, see O(merge).
      - V(reverted) brings the VM back to the snapshot and throws away what was written since. The snapshot stays.
      - Snapshots taken later than the one gone back to are lost with the images they are in.
      - V(recovered) cleans up what killed runs have left, and does nothing else. Every other state does that first.
        M(blockops.qemu.qmp_vm_info) with C(doctor) says what there is, and what else is wrong.
    type: str
    choices: [present, absent, reverted, recovered]
    default: present
  type:
    description:
      - The kind of snapshot.
      - If not given, V(external) is taken, and the kind that exists is removed or gone back to.
      - V(internal) and V(memory) need qcow2 images.
      - A running VM cannot be brought back to an V(internal) snapshot; use M(blockops.qemu.qemu_img_snapshot) when it
        is switched off, or the role P(blockops.qemu.vm_rollback#role), which does all of that.
    type: str
    choices: [external, internal, memory]
  drives:
    description:
      - Names of the drives to take. Default is all that the guest can write to and that can have such a snapshot.
      - RV(vms[].skipped) says which were left out, and why. A drive named here that cannot have one is an error.
    type: list
    elements: str
  exclude_drives:
    description: Names of drives to leave out.
    type: list
    elements: str
  overlay_directory:
    description:
      - Directory for the overlays. QEMU must be allowed to look into it; it need not be allowed to write there.
      - Default is the directory of the image below. For drives that are no files (LVM, iSCSI) it has to be given.
    type: path
  overlay_name:
    description:
      - File name of an overlay. C({drive}), C({name}) and C({vm}) stand for the names of drive, snapshot and VM.
      - After a revert a number is added, because the file of the discarded branch has the plain name.
    type: str
    default: "{vm}-{drive}.{name}.qcow2"
  quiesce:
    description:
      - Whether the guest's file systems are frozen for the instant of the snapshot, by the guest agent.
      - V(required) fails, before anything happened, if that is not possible. V(try) warns and takes a crash consistent
        snapshot. V(off) does not ask the agent.
      - Not used for memory snapshots, which need no frozen file systems.
    type: str
    choices: [required, try, "off"]
    default: try
  freeze_timeout:
    description: Seconds a guest may stay frozen at most.
    type: float
    default: 10.0
  group:
    description:
      - Take the snapshots of all VMs of this task at one instant. No snapshot is taken before all guests are frozen,
        and no guest is thawed before its snapshot is taken. RV(vms[].group_spread_ms) says how far apart they are.
      - If anything fails on one VM before the instant, no VM gets a snapshot.
      - A guest agent that does not answer keeps the other guests waiting. After O(freeze_timeout) all are thawed, and
        no VM gets a snapshot, with O(quiesce=try) as well.
      - O(max_parallel) does not apply then.
    type: bool
    default: false
  merge:
    description:
      - How O(state=absent) drops an external snapshot.
      - V(commit) copies what was written since the snapshot into the image below, and deletes the overlay.
      - V(stream) copies the image below into the overlay, and deletes the image below if this collection made it.
      - V(auto) chooses the one that copies fewer bytes. It streams only if the image below is one that this collection
        made, because otherwise a file would be left behind that nothing uses.
    type: str
    choices: [auto, commit, stream]
    default: auto
  bandwidth:
    description:
      - Bytes per second that merging may copy, for each VM. Default is no limit.
      - Merging the active image ends only when it has caught up with the guest, so this has to be more than the guest
        writes.
    type: int
  allow_reset:
    description:
      - Going back to an external snapshot resets the guest, as its reset button would, and to a memory snapshot throws
        its present memory away. That has to be allowed here.
    type: bool
    default: false
  discarded:
    description:
      - What becomes of the overlays that hold what was written since an external snapshot, when going back to it.
      - V(keep) leaves their files where they are, and RV(vms[].kept) names them. V(delete) removes those that this
        collection made and that nothing else is based on.
    type: str
    choices: [keep, delete]
    default: keep
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
      - Seconds that merging one drive, or saving the memory, may take. Default is no limit.
      - After that the task fails, and the job goes on. Run again to follow it further.
    type: float
notes:
  - While the memory of a guest is written or read, the guest stands still, and QEMU answers no other monitor.
    RV(vms[].transaction_ms) says for how long. With O(group) only the beginnings are at one instant then.
  - QEMU refuses to go back inside an image that has dirty bitmaps. Those of this collection are removed, so the next
    backup after going back to a memory snapshot is a full one. With those of other tools going back is refused.
  - QEMU takes a name of digits only for an id, so internal and memory snapshots cannot have such names.
  - Keep snapshots for hours or days. They are no backups, because they live on the same storage as what they protect.
  - A VM with running block jobs, such as a backup, is refused and not touched.
seealso:
  - module: blockops.qemu.qemu_img_snapshot
  - module: blockops.qemu.qmp_drive_backup
  - module: blockops.qemu.qmp_vm_info
"""

EXAMPLES = r"""
- name: Snapshot all VMs of this hypervisor before tonight's upgrade, at one instant
  blockops.qemu.qmp_snapshot:
    name: pre-patch
    quiesce: required
    group: true
    vms: "{{ hypervisor.vms }}"

- name: The upgrade was good, merge the snapshots
  blockops.qemu.qmp_snapshot:
    name: pre-patch
    state: absent
    vms: "{{ hypervisor.vms }}"

- name: The upgrade was not good, go back while QEMU runs on
  blockops.qemu.qmp_snapshot:
    name: pre-patch
    state: reverted
    allow_reset: true
    discarded: delete
    vms:
      - socket: /run/vms/web.qmp
        definition: [/etc/vms/web.sh]

- name: Clean up after tasks that were killed
  blockops.qemu.qmp_snapshot:
    state: recovered
    vms: "{{ hypervisor.vms }}"

- name: Keep the running state of a VM, with its memory
  blockops.qemu.qmp_snapshot:
    name: before-debugging
    type: memory
    vms:
      - socket: /run/vms/db.qmp
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
    snapshot: {description: Name of the snapshot; null with O(state=recovered)., type: str, returned: success}
    type: {description: Its kind; null when there was nothing to remove., type: str, returned: success}
    status:
      description:
        - V(taken), V(present) (it was there already), V(removed), V(absent) (it was not there), V(reverted), or
          V(current) (nothing had been written since). With O(state=recovered), V(recovered) or V(unchanged).
        - In check mode what it would be.
      type: str
      returned: success
    drives:
      description: What was (or would be) done, drive by drive.
      type: list
      elements: dict
      returned: success
      contains:
        name: {description: Name of the drive., type: str, returned: always}
        image: {description: The image that is the snapshot., type: str, returned: always}
        overlay: {description: The image on top of it; null for internal snapshots., type: str, returned: always}
        node: {description: Node name of the drive's active image., type: str, returned: always}
        merge:
          description: V(commit) or V(stream), the way an external snapshot was dropped; null otherwise.
          type: str
          returned: always
        bytes:
          description:
            - Bytes that merging copies at most with O(state=absent); bytes that were written since, and are lost, with
              O(state=reverted); null otherwise.
          type: int
          returned: always
        bitmaps:
          description: Dirty bitmaps that go on in the new overlay.
          type: list
          elements: str
          returned: always
    skipped:
      description: Drives that were left out, with C(name) and C(reason).
      type: list
      elements: dict
      returned: success
    consistency:
      description: V(filesystem) if the guest was frozen, V(memory), or V(crash); null if no snapshot was taken.
      type: str
      returned: success
    point: {description: When the snapshot was taken (UTC)., type: str, returned: success}
    freeze_ms: {description: Milliseconds the guest was frozen; null if it was not., type: float, returned: success}
    transaction_ms:
      description:
        - Milliseconds of the snapshot's transaction. With O(state=reverted), and for a memory snapshot, for how many
          milliseconds the guest stood still.
      type: float
      returned: success
    group_spread_ms:
      description: Milliseconds within which all VMs of the group have their snapshots; null without O(group).
      type: float
      returned: success
    recovered:
      description: What a killed run had left and was (or would be) cleaned up.
      type: list
      elements: str
      returned: success
    deleted: {description: Files that were (or would be) deleted., type: list, elements: str, returned: success}
    kept:
      description: Files that nothing uses any more and that were left where they are.
      type: list
      elements: str
      returned: success
    boot_drift:
      description:
        - Drives whose active image is not the one QEMU was started with, with C(drive), C(old) and C(new). Null if the
          command line of QEMU cannot be read.
      type: list
      elements: dict
      returned: success
    definition:
      description:
        - Definition files that were (or would be) rewritten, with C(path) and C(backup), the copy of the old one.
      type: list
      elements: dict
      returned: success
    commands:
      description: QMP commands that were sent and may have changed something; in check mode the decisive ones.
      type: list
      elements: dict
      returned: success
    seconds: {description: Seconds it took., type: float, returned: success}
error:
  description: Why nothing was tried on any VM, with C(kind) (a stable word), C(message) and data about it.
  returned: when the options cannot be meant
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible import runner
from ..module_utils._ansible.dependencies import require_qemu_qmp
from ..module_utils._ansible.specs_snapshot import snapshot_options, snapshot_spec
from ..module_utils._ops.snapshot import SnapshotVms


def main() -> None:
    module = AnsibleModule(argument_spec=snapshot_spec(), supports_check_mode=True)
    require_qemu_qmp(module)
    options = snapshot_options(module)
    members = len(module.params["vms"])
    runner.run_vms(module, lambda: SnapshotVms(options, members), together=options.group)


if __name__ == "__main__":
    main()
