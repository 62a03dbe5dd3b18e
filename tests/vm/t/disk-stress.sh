#!/bin/bash
# disk-stress.sh DEVICE SECONDS: a file system under load, every file with its checksum, until the time is over
. /vm/lib/lib.sh
dev=$1 seconds=$2
wait_for 10 test -b $dev
check "mkfs" mkfs.ext4 -q $dev
mkdir -p /mnt/t
check "mount" mount -o discard $dev /mnt/t
end=$(($(date +%s) + seconds)) round=0
work() { # work NAME: writes, checks, renames and removes files of its own
    local n=$1 i=0 bad=0
    mkdir -p /mnt/t/$n; cd /mnt/t/$n || return 1
    while [ "$(date +%s)" -lt $end ]; do
        i=$((i + 1))
        head -c $((RANDOM * 40)) /dev/urandom >f$((i % 20)).new || return 1
        sha256sum <f$((i % 20)).new >s$((i % 20)) || return 1
        mv f$((i % 20)).new f$((i % 20))
        [ $((i % 5)) != 0 ] || sync -f .
        [ $((i % 10)) != 0 ] || echo 1 >/proc/sys/vm/drop_caches
        local k=$((RANDOM % 20))
        if [ -f f$k ] && [ "$(sha256sum <f$k)" != "$(cat s$k)" ]; then echo "$n: f$k differs"; bad=1; fi
        [ $((i % 17)) != 0 ] || rm -f f$(((i + 3) % 20)) s$(((i + 3) % 20))
    done
    echo "$n: $i files"
    return $bad
}
pids=
for n in a b c; do work $n & pids="$pids $!"; done
for p in $pids; do check "worker" wait $p; done
check "no errors of the disk" sh -c "! dmesg | grep -iE 'I/O error|blk_update|EXT4-fs error|timed out'"
sync; echo 3 >/proc/sys/vm/drop_caches
all() { local f; for f in /mnt/t/*/f*; do [ -f "$f" ] || continue; [ "$(sha256sum <$f)" = "$(cat "${f%/*}/s${f##*/f}")" ] || { echo "$f"; return 1; }; done; }
check "every file has its checksum, read from the disk" all
check "trim" fstrim /mnt/t
check "umount, fsck" sh -c "umount /mnt/t && fsck.ext4 -fn $dev"
finish
