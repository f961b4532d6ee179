#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: (c) 2026, blockops.qemu contributors
# /init of the lab's guest: modules, disks, agent. Everything but the disks lives in memory.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mkdir -p /dev/virtio-ports /mnt /tmp
load() { for module in "$1"/*.ko; do insmod "$module" 2>/dev/null; done; }
load /modules/core
# controllers other than virtio-blk cost boot time: only where there is one (the PIIX3's own IDE only with lab.ide)
for device in /sys/bus/pci/devices/*; do
    case "$(cat "$device/vendor"):$(cat "$device/device"):$(cat "$device/class")" in
        0x1af4:0x1004:* | 0x1af4:0x1048:* | *:*:0x0106*) storage=1 ;;
    esac
done
grep -q lab.ide /proc/cmdline && storage=1
[ -n "$storage" ] && load /modules/storage
for port in /sys/class/virtio-ports/*; do
    [ -e "$port/name" ] && ln -s "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
done
# every ext4 disk appears under its serial number, or its name when it has none
for block in /sys/block/vd* /sys/block/sd* /sys/block/nvme*; do
    [ -e "$block" ] || continue
    name=${block##*/}
    serial=$(cat "$block/serial" "$block/device/serial" 2>/dev/null | head -n 1 | tr -d ' ')
    point=/mnt/${serial:-$name}
    mkdir -p "$point"
    mount -t ext4 -o noatime "/dev/$name" "$point" 2>/dev/null || rmdir "$point"
done
exec /bin/busybox init
