#!/bin/bash
# disk-stress.sh DEVICE SECONDS: a file system under load, every file with its checksum, until the time is over
. /vm/lib/lib.sh
. /vm/lib/stress.sh
dev=$1 seconds=$2
wait_for 60 test -b $dev
ring_layout $dev
check "mkfs" mkfs.ext4 -q $dev
mkdir -p /mnt/t
check "mount" mount -o discard $dev /mnt/t
end=$(($(date +%s) + seconds))
time_left() { [ "$(date +%s)" -lt $end ]; }
stress /mnt/t time_left
check "trim" fstrim /mnt/t
check "umount, fsck" sh -c "umount /mnt/t && fsck.ext4 -fn $dev"
finish
