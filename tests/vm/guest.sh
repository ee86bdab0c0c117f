#!/bin/sh
# The kernel matrix' guest, on the host's file system: mounts what BPF programs need, runs the job, and powers off.
# No exit code in /out tells the host that the guest died on the way.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t tmpfs run /run
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug
ip link set lo up

timeout 900 sh /out/job.sh >/out/log 2>&1
code=$?
dmesg -l emerg,alert,crit,err,warn >/out/dmesg
echo "$code" >/out/exit
sync
echo o >/proc/sysrq-trigger
sleep 60
