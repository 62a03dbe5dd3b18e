#!/bin/bash
# migrate.sh SIZE: in a guest that booted from the disk under test: records with fsync, and its root file system under load, while the
# host migrates it, until the host makes the disk SIZE bytes long
. /vm/lib/lib.sh
. /vm/lib/stress.sh
size=$1
small() { [ $(($(cat /sys/block/vda/size) * 512)) -lt "$size" ]; }
# What lies in memory is to be the same as well: most of it was read from the disk.
mkdir /tmp/ram && mount -t tmpfs ram /tmp/ram && cp -r /usr/lib/x86_64-linux-gnu/*.so.* /tmp/ram/
(cd /tmp/ram && sha256sum * >/tmp/ram.sums)
echo "ready"
python3 /vm/lib/records.py /records vda "$size" & records=$!
stress /stress small
check "every record is there" wait $records
check "memory that was read from the disk is what it was" sh -c "cd /tmp/ram && sha256sum --quiet -c /tmp/ram.sums"
finish
