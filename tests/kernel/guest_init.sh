#!/bin/sh
# PID 1 of the test machine (vm.py), twice: first from the initramfs, to put the root together, then
# from RAM on top of that root, to run the command and to power off. busybox alone does both.
#
# In the initramfs: /bin/busybox, /init (this file), /modules (names) and the modules beside it.
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
B=/bin/busybox
RAM=/run/mace # what must be there when nothing else is

first() {
    $B mkdir -p /proc /sys /dev /host /top /root
    $B mount -t proc proc /proc
    $B mount -t sysfs sysfs /sys
    $B mount -t devtmpfs devtmpfs /dev
    while read -r module; do
        $B insmod "/$module" || echo "mace-guest: cannot load $module"
    done </modules

    # The host's files below, what the guest writes above in RAM.
    $B mount -t virtiofs -o ro host /host
    $B mount -t tmpfs -o mode=755 tmpfs /top
    $B mkdir /top/upper /top/work
    $B mount -t overlay -o lowerdir=/host,upperdir=/top/upper,workdir=/top/work overlay /root ||
        { echo "mace-guest: no root" && $B poweroff -f; }
    for place in proc sys dev; do
        $B mkdir -p "/root/$place"
        $B mount --move "/$place" "/root/$place"
    done
    # The host's /run is full of sockets that nobody answers here.
    $B mount -t tmpfs -o mode=755 tmpfs /root/run
    $B mkdir /root$RAM
    $B cp $B /init /root$RAM/
    exec $B switch_root -c /dev/console /root $RAM/busybox sh $RAM/init second
}

second() {
    B=$RAM/busybox
    $B mkdir -p /dev/pts /dev/shm /run/exchange
    $B mount -t devpts devpts /dev/pts
    $B mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    $B mount -t tracefs tracefs /sys/kernel/tracing
    $B mount -t debugfs debugfs /sys/kernel/debug
    $B mount -t cgroup2 cgroup2 /sys/fs/cgroup
    $B mount -t virtiofs exchange /run/exchange || echo "mace-guest: no exchange"
    $B hostname mace-guest
    $B ip link set lo up
    # The directory that modprobe asks; the cache that it shows has been mapped by depmod.
    modules=$($B cat /run/exchange/modules_dir)
    $B mkdir -p "/lib/modules/$($B uname -r)"
    $B mount -o bind "$modules" "/lib/modules/$($B uname -r)"

    # In a session of its own; orphans come to us, and a shell reaps them. Not by busybox, whose shell
    # would take its own ip and ps before the host's.
    $B setsid /bin/sh /run/exchange/command.sh >/run/exchange/output.txt 2>&1 </dev/null
    status=$?
    # A line of its own, whatever the kernel was saying. The kernel's last words, such as of a
    # namespace that is being torn down, come before the machine is off.
    $B sync
    printf '\nmace-guest: exit status %s\n' $status
    $B poweroff -f
}

if [ "${1:-}" = second ]; then second; else first; fi
