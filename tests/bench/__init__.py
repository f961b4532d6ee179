# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make bench`: how fast the collection is beside other tools, measured on this machine.

Everything is alternated (A B C A B C), because other load on a machine comes and goes; what counts are medians and the
ratios of neighbours in one round, never a single number.
"""
