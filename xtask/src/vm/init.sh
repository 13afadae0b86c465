#!/bin/busybox sh
# First process of the virtual machine: what a distribution would have mounted
# and loaded, then the work, then off. The kernel talks on the first serial
# line, the work on the second.
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t devtmpfs none /dev
mkdir -p /dev/pts
mount -t devpts none /dev/pts
mount -t proc none /proc
mount -t sysfs none /sys
mount -t bpf none /sys/fs/bpf
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs none /run
mount -t tmpfs none /tmp
for module in $(cat /modules/order); do
    insmod "/modules/$module.ko" || echo "vm: module $module is not loaded"
done
ip link set lo up
number=$(sed 's/.*vtep\.number=\([0-9]*\).*/\1/' /proc/cmdline)
stty -F /dev/ttyS1 raw
# Closing the line waits until everything is sent.
(
    /bin/sh "/work-$number.sh"
    echo "vm: exit status $?"
) </dev/null >/dev/ttyS1 2>&1
poweroff -f
