#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qmp_vm_info
short_description: Find running VMs and describe them
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Finds the VMs of a hypervisor by the QMP sockets of their QEMU processes and describes each, with its state,
    drives, image chains, dirty bitmaps, jobs, guest agent, and what deserves attention, such as a drive that a cold
    start would boot from an older image.
  - A socket that is dead, busy, not permitted or not QMP is reported with an C(error) for that VM, within O(timeout).
    It never makes this module fail or hang.
  - Its result RV(vms) can be given as O(vms) to the other modules as it is.
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._vms
attributes:
  check_mode:
    support: full
    details: It only reads.
  diff_mode:
    support: none
    details: It changes nothing.
  idempotent:
    support: full
options:
  vms:
    description:
      - VMs to describe by name and socket. Their entries come first in the result, in this order.
    default: []
  sockets:
    description: Patterns (as the shell knows them) of QMP sockets, such as V(/run/vms/*.qmp).
    type: list
    elements: str
    default: []
  probe_agent:
    description: Ask the guest agent whether it answers, and whether the guest is frozen.
    type: bool
    default: true
  doctor:
    description:
      - Look for what is wrong with the chains of the VMs, and say in RV(vms[].findings) what mends it.
      - The headers of the images, and of all other files in their directories, are read, and the processes that have
        them open are looked up. So the task needs root, or the user that QEMU runs as.
    type: bool
    default: false
  repository:
    description:
      - A repository of M(blockops.qemu.qmp_drive_backup). With O(doctor) bitmaps of backups that are no longer in it
        are found as well.
    type: path
seealso:
  - module: blockops.qemu.qmp_block_commit
  - module: blockops.qemu.qmp_dirty_bitmap
  - module: blockops.qemu.qmp_snapshot
  - module: blockops.qemu.qmp_drive_backup
  - plugin: blockops.qemu.select
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Describe every VM of this hypervisor
  blockops.qemu.qmp_vm_info:
    sockets: [/run/vms/*.qmp]
  register: hypervisor

- name: Show the VMs with a drive that cannot be tracked over a restart
  ansible.builtin.debug:
    msg: "{{ hypervisor.vms | blockops.qemu.select('[?drives[?backup.tracking==`transient`]].name') }}"

- name: Describe one VM whose agent socket is known
  blockops.qemu.qmp_vm_info:
    vms:
      - name: web
        socket: /run/vms/web.qmp
        agent_socket: /run/vms/web.qga

- name: Look for what is wrong with the chains
  blockops.qemu.qmp_vm_info:
    sockets: [/run/vms/*.qmp]
    doctor: true
    repository: /srv/backup
  register: examined

- name: Fail if data is in danger
  ansible.builtin.assert:
    that: examined.vms | blockops.qemu.select('[].findings[?severity==`danger`][]') == []
"""

RETURN = r"""
vms:
  description:
    - One element for each VM. First those of O(vms), then those found by O(sockets), by path. A VM that answers on
      several sockets that match is there once.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: The name that was given, else the one QEMU was started with, else that of the socket.
      type: str
      returned: always, null when QEMU did not answer and no name was given
    socket: {description: Its QMP socket., type: str, returned: always}
    changed: {description: Always V(false)., type: bool, returned: always}
    error:
      description: Why nothing is known of it, with C(kind), such as V(SocketDead), and C(message).
      type: dict
      returned: when QEMU did not answer
    agent_socket: {description: Socket of the guest agent; null when there is none., type: str, returned: success}
    uuid: {description: UUID; null when QEMU was started without one., type: str, returned: success}
    qemu_version: {description: Version of the QEMU process., type: str, returned: success}
    status: {description: "QEMU's run state, such as V(running) or V(paused).", type: str, returned: success}
    running: {description: Whether the guest's processors run., type: bool, returned: success}
    process: {description: "C(pid), C(uid) and C(gid) of the QEMU process.", type: dict, returned: success}
    agent:
      description: C(reachable); C(version) and C(frozen) when it is, C(reason) when not.
      type: dict
      returned: success
    drives:
      description: The drives in QEMU's order.
      type: list
      elements: dict
      returned: success
      contains:
        name: {description: The drive's name in all modules., type: str, returned: always}
        qdev: {description: The device's id or path in QEMU., type: str, returned: always}
        removable: {description: Whether the medium can be removed., type: bool, returned: always}
        backup:
          description:
            - C(possible), C(default) (whether it is backed up without being named), C(tracking) of its changes
              (V(persistent), V(transient) until QEMU ends, V(none)), and C(reason) when something is missing.
          type: dict
          returned: always
        filters: {description: Filter nodes above the active image., type: list, elements: str, returned: always}
        chain:
          description:
            - The images, active one first, each with C(node), C(file), C(format), C(protocol), C(virtual_size),
              C(allocated) bytes and C(read_only). Empty for a drive without medium.
          type: list
          elements: dict
          returned: always
        bitmaps:
          description:
            - Dirty bitmaps of all images, each with C(name), C(node), C(state) (V(recording), V(disabled), V(busy),
              V(inconsistent)), C(count) of dirty bytes, C(granularity), C(persistent), C(ours), and for those that
              track a backup C(repository) and C(backup).
          type: list
          elements: dict
          returned: always
        node: {description: Node of the active image., type: str, returned: with a medium}
        format: {description: Format of the active image., type: str, returned: with a medium}
        virtual_size: {description: Bytes the guest sees., type: int, returned: with a medium}
        read_only: {description: Whether the guest cannot write., type: bool, returned: with a medium}
        encrypted: {description: Whether the image is encrypted., type: bool, returned: with a medium}
        data_file: {description: External data file of the image., type: str, returned: with a medium}
    jobs:
      description:
        - Block jobs, each with C(id), C(type), C(status), C(done) and C(total) bytes, C(error), C(io_status), C(ours).
      type: list
      elements: dict
      returned: success
    leftovers:
      description:
        - Nodes, jobs and bitmaps of a backup that is under way or was killed; the next backup takes care of them.
      type: list
      elements: str
      returned: success
    boot_drift:
      description:
        - Drives whose active image is not the one that the command line of the QEMU process names. Started again with
          the same command line, the VM would boot the old image, without what was written since. Null when the command
          line cannot be read; drives from a file of C(-readconfig) are not known.
      type: list
      elements: dict
      returned: success
      contains:
        drive: {description: The drive's name., type: str, returned: always}
        old: {description: The image the drive was started with., type: str, returned: always}
        new: {description: The image it runs on., type: str, returned: always}
    warnings: {description: What deserves attention., type: list, elements: str, returned: success}
    findings:
      description: What is wrong with the chains of the VM, the gravest first. Empty when nothing is.
      type: list
      elements: dict
      returned: with O(doctor)
      contains:
        kind:
          description:
            - A stable word.
            - Of images, V(MissingImage), V(ReplacedImage), V(WrongBacking), V(BackingFormatMissing), V(OpenElsewhere),
              V(BootDrift), V(DeepChain), V(LowSpace), V(FilesNotVisible).
            - Of overlays in no chain, V(OrphanedOverlay), V(OverlayOfActive), V(ForeignOverlay), V(DiscardedBranch),
              V(EmptiedOverlay).
            - Of bitmaps, V(InconsistentBitmap), V(ForeignBitmap), V(BitmapOfNoBackup), V(RepositoryUnreadable).
            - Of runs and jobs, V(InterruptedRun), V(RevertInterrupted), V(BackupLeftover), V(StalledJob),
              V(UndismissedJob), V(TaskRunning).
          type: str
          returned: always
        severity:
          description:
            - V(danger) if data can be lost, or a cold start fails or shows other data, V(waste) if it costs space or
              time, V(note) otherwise.
          type: str
          returned: always
        drive: {description: The drive; null if it is about the VM., type: str, returned: always}
        object: {description: "The file, node, bitmap or job.", type: str, returned: always}
        bytes:
          description: Bytes that the file occupies, or that are free (V(LowSpace)); null otherwise.
          type: int
          returned: always
        what: {description: What is wrong., type: str, returned: always}
        fix: {description: What mends it., type: str, returned: always}
error:
  description: Why nothing was tried on any VM, with C(kind) (a stable word), C(message) and data about it.
  returned: when the options cannot be meant
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible import runner
from ..module_utils._ansible.dependencies import require_qemu_qmp
from ..module_utils._ansible.specs import vm_info_spec
from ..module_utils._ops.vm_info import VmInfo, entries_for, without_twins


def main() -> None:
    module = AnsibleModule(argument_spec=vm_info_spec(), supports_check_mode=True)
    require_qemu_qmp(module)
    runner.run_vms(
        module,
        lambda: VmInfo(*(module.params[name] for name in ("timeout", "probe_agent", "doctor", "repository"))),
        entries=entries_for(module.params["vms"], module.params["sockets"]),
        arrange=without_twins,
        failing=False,
    )


if __name__ == "__main__":
    main()
