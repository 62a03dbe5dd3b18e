#!/bin/bash
# records.sh DEVICE SIZE: records with checksums and fsync, one after the other, until the host makes the disk SIZE bytes long
. /vm/lib/lib.sh
wait_for 60 test -b $1
ring_layout $1
echo "cache: $(cat /sys/block/${1##*/}/queue/write_cache)"
python3 /vm/lib/records.py $1 ${1##*/} $2 & # its lines go to the host at once
check "every record is there, read by the guest" wait $!
check "no errors of the disk" sh -c "! dmesg | grep -iE 'I/O error|blk_update|timed out'"
finish
