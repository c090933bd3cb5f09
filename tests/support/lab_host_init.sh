#!/bin/bash
# PID 1 of one lab host (netlab.py). It runs in new pid, mount, uts and ipc namespaces and a network namespace that is
# already configured; it builds a copy-on-write root over the machine's own, starts sshd, says READY on stdout, and from
# then on only reaps orphans, as bash does by itself.
set -eu
name=$1 disk=$2 etc=$3 serves=$4
shift 4 # what is left: folders that the host must see and would not

hostname "$name"
mount --make-rprivate /
mkdir -p "$disk/upper" "$disk/work" "$disk/root"
rm -rf "$disk/work/work"
mount -t overlay overlay -o "lowerdir=/,upperdir=$disk/upper,workdir=$disk/work" "$disk/root"
cd "$disk/root"
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o nosuid,nodev,noexec sysfs sys
mount --rbind /dev dev
mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs run
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs tmp
mkdir -p run/sshd run/lock
index=0
for folder in "$@"; do
    index=$((index + 1))
    other=$disk/others/$index
    mkdir -p "$other/upper" "$other/work" "${folder#/}"
    rm -rf "$other/work/work"
    # copy-on-write like the root; a file system that cannot be below an overlay is shared as it is
    mount -t overlay overlay -o "lowerdir=$folder,upperdir=$other/upper,workdir=$other/work" "${folder#/}" 2>/dev/null ||
        mount --rbind "$folder" "${folder#/}"
done
echo "$name" > etc/hostname
cp "$etc/hosts" etc/hosts
rm -rf root/.ssh var/lib/herder
install -d -m 700 root/.ssh
install -m 600 "$etc/authorized_keys" "$etc/ssh_config" "$etc/known_hosts" "$etc/id_ed25519" root/.ssh/
mv root/.ssh/ssh_config root/.ssh/config
if [ "$serves" = yes ]; then
    install -m 644 "$etc/$name.sshd_config" etc/ssh/lab_sshd_config
    install -m 600 "$etc/$name.host_key" etc/ssh/lab_host_key
fi
pivot_root . mnt
umount -l /mnt
cd /
[ "$serves" = no ] || /usr/sbin/sshd -f /etc/ssh/lab_sshd_config -E /run/sshd.log
echo READY
exec >/dev/null
while :; do sleep infinity & wait; done
