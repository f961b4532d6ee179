# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the collection uses of ansible-core, which ships no types of its own."""

import typing as t

def missing_required_lib(library: str, reason: str | None = None, url: str | None = None) -> str: ...

class AnsibleModule:
    params: dict[str, t.Any]
    check_mode: bool
    tmpdir: str
    _diff: bool
    _verbosity: int
    def __init__(
        self,
        argument_spec: t.Mapping[str, t.Any],
        *,
        mutually_exclusive: t.Sequence[t.Sequence[str]] | None = None,
        required_together: t.Sequence[t.Sequence[str]] | None = None,
        required_one_of: t.Sequence[t.Sequence[str]] | None = None,
        required_if: t.Sequence[t.Sequence[t.Any]] | None = None,
        required_by: t.Mapping[str, str | t.Sequence[str]] | None = None,
        supports_check_mode: bool = False,
        add_file_common_args: bool = False,
    ) -> None: ...
    def exit_json(self, **result: t.Any) -> t.NoReturn: ...
    def fail_json(self, msg: str, **result: t.Any) -> t.NoReturn: ...
    def warn(self, warning: str) -> None: ...
    def deprecate(
        self, msg: str, version: str | None = None, date: str | None = None, collection_name: str | None = None
    ) -> None: ...
    def debug(self, msg: str) -> None: ...
    def get_bin_path(self, arg: str, required: bool = False, opt_dirs: t.Sequence[str] | None = None) -> str: ...
