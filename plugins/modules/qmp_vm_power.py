#!/usr/bin/python
# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: qmp_vm_power
short_description: Stop VMs, or wait until they run
version_added: 0.1.0
author:
  - blockops.qemu contributors (@blockops)
description:
  - Stops VMs through their QMP sockets as an operator would, power button first, and waits until the QEMU process has
    ended, so that its images can be touched.
  - Or waits until VMs that something else has started really run, and their guest agents answer.
  - It cannot start a VM, because it does not know how yours are started.
extends_documentation_fragment:
  - blockops.qemu._attributes
  - blockops.qemu._vms
attributes:
  check_mode:
    support: full
    details: With O(state=running) it looks once and does not wait.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  vms:
    description:
      - The VMs to stop or to wait for.
    required: true
  state:
    description:
      - V(stopped) presses the power button (C(system_powerdown)), waits until QEMU has ended, and after
        O(powerdown_timeout) tells QEMU to C(quit), which closes the images properly but is a power cut to the guest.
      - A VM counts as stopped when nobody listens on its socket, also when there is no such socket; RV(vms[].reason)
        says so.
      - V(running) waits until QMP answers with the run state C(running). It changes nothing; a paused VM stays paused.
    type: str
    choices: [stopped, running]
    required: true
  powerdown_timeout:
    description:
      - Seconds the guest has for shutting down. With V(0) the power button is not pressed.
      - A guest whose processors do not run cannot shut down and is not waited for.
    type: float
    default: 120.0
  quit:
    description:
      - Whether to tell QEMU to C(quit) when the guest has not shut down in time. With V(false) that is an error.
    type: bool
    default: true
  running_timeout:
    description: Seconds to wait with O(state=running), for QEMU and the guest agent together.
    type: float
    default: 120.0
  wait_agent:
    description: With O(state=running), wait until the guest agent answers as well.
    type: bool
    default: false
notes:
  - A VM that its service manager restarts by itself does not stay stopped. Stop the service instead.
seealso:
  - module: blockops.qemu.qmp_vm_info
  - module: blockops.qemu.backup_restore
"""

EXAMPLES = r"""
- name: Shut a VM down, and switch it off after five minutes
  blockops.qemu.qmp_vm_power:
    state: stopped
    powerdown_timeout: 300
    vms:
      - socket: /run/vms/web.qmp

- name: Wait until the guests of this hypervisor have booted
  blockops.qemu.qmp_vm_power:
    state: running
    wait_agent: true
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
    changed: {description: Whether it was (or would be) stopped., type: bool, returned: always}
    error:
      description: What failed, with C(kind) (a stable word), C(message) and data that depends on the kind.
      type: dict
      returned: on failure
    status:
      description: V(stopped), or the run state of QEMU, such as V(running). In check mode what was found.
      type: str
      returned: success
    ended:
      description: How it was stopped. V(powerdown) by the guest itself, V(quit) by QEMU; null when it was not running.
      type: str
      returned: "success, with O(state=stopped)"
    reason: {description: Why the VM counts as stopped., type: str, returned: when nobody listens on the socket}
    agent:
      description: Whether the guest agent answered; null when it was not asked.
      type: bool
      returned: success, with O(state=running)
    seconds: {description: Seconds it took., type: float, returned: success}
error:
  description: Why nothing was tried on any VM, with C(kind) (a stable word), C(message) and data about it.
  returned: when the options cannot be meant
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._ansible import runner
from ..module_utils._ansible.dependencies import require_qemu_qmp
from ..module_utils._ansible.specs import vms_spec
from ..module_utils._ops.vm_power import PowerOptions, VmPower

OPTIONS = ("state", "powerdown_timeout", "quit", "running_timeout", "wait_agent", "timeout")


def main() -> None:
    spec = vms_spec()
    spec["vms"]["required"] = True
    spec.update(
        state={"type": "str", "choices": ["stopped", "running"], "required": True},
        powerdown_timeout={"type": "float", "default": 120.0},
        quit={"type": "bool", "default": True},
        running_timeout={"type": "float", "default": 120.0},
        wait_agent={"type": "bool", "default": False},
    )
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    require_qemu_qmp(module)
    options = PowerOptions(check_mode=module.check_mode, **{name: module.params[name] for name in OPTIONS})
    runner.run_vms(module, lambda: VmPower(options))


if __name__ == "__main__":
    main()
