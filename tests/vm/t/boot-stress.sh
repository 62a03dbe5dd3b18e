#!/bin/bash
# boot-stress.sh SIZE: in a guest that booted from the disk under test, its root file system and one on a second disk under load,
# every file with its checksum, until the host makes the first disk SIZE bytes long
. /vm/lib/lib.sh
. /vm/lib/stress.sh
size=$1 disk=vda
check_says "/dev/${disk}1 on / type ext4" "the root file system is on the disk under test" mount
packages() { # what came with the system is what it was, read from the disk
    local p
    for p in e2fsprogs util-linux procps kmod; do
        (cd / && grep -v 'usr/share/\(doc\|man\|locale\)' /var/lib/dpkg/info/$p.md5sums | md5sum --quiet -c) || return 1
    done
}
small() { [ $(($(cat /sys/block/$disk/size) * 512)) -lt "$size" ]; }
mkdir -p /stress/c # where a worker will be
check "mkfs and mount of the second disk" sh -c "mkfs.ext4 -q /dev/vdb && mount /dev/vdb /stress/c"
echo "ready"
stress /stress small
small || ok "the guest learnt of the new size: $(($(cat /sys/block/$disk/size) >> 11)) MiB"
check "the partition grows" sh -c "echo ', +' | sfdisk -q -N 1 --force --no-reread /dev/$disk && partx -u /dev/$disk"
check "the file system grows" resize2fs /dev/${disk}1
mkdir -p /stress/d
check "the new room is used" sh -c "head -c 64M /dev/urandom >/stress/d/f1 && sha256sum </stress/d/f1 >/stress/d/s1 && sync"
check "trim" fstrim /
echo 3 >/proc/sys/vm/drop_caches
check "every file has its checksum" stress_all /stress
check "fsck of the second disk" sh -c "umount /stress/c && fsck.ext4 -fn /dev/vdb"
check "the system's own files" packages
check "no errors of the disk, still" sh -c "! dmesg | grep -iE 'I/O error|blk_update|EXT4-fs error|timed out'"
finish
