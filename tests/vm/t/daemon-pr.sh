#!/bin/bash
# Persistent reservations of the daemon's nodes on real disks, the daemon without any privilege.
# run -b OURS:qemu-storage-daemon -b HELPER:qemu-pr-helper t/daemon-pr.sh [scsi|nvme]
# Before Linux 6.5 everything goes through the helper; from then on the kernel does what it can.
. /vm/lib/lib.sh
kind=${1:-scsi}
if [ "$kind" = nvme ]; then
    configfs
    nvmet_init || { echo "skip this kernel has no NVMe target reservations"; exit 77; }
    a=$(nvme_path 1) b=$(nvme_path 2)
else
    lio_init
    lio_disk d0 64
    a=$(lio_path 1 d0) b=$(lio_path 2 d0)
fi
scsi() { [ "$kind" != scsi ] || "$@"; }
echo "nexus 1: $a, nexus 2: $b, $(uname -r)"
chmod 666 "$a" "$b"
install -d -o nobody -g nogroup /tmp/pr
helper() {
    rm -f /tmp/pr/s
    qemu-pr-helper -k /tmp/pr/s -u nobody -g nogroup >/dev/null 2>&1 & h=$!
    wait_for 60 test -S /tmp/pr/s && chmod 666 /tmp/pr/s
}
helper
IFS=. read -r major minor _ < <(uname -r)
route=helper
[ $((major * 1000 + ${minor%%-*})) -ge 6005 ] && route=kernel
setpriv --reuid nobody --regid nogroup --clear-groups --bounding-set=-all --inh-caps=-all qemu-storage-daemon \
    --object pr-manager-helper,id=m,path=/tmp/pr/s \
    --blockdev host_device,node-name=a,filename="$a",pr-manager=m \
    --blockdev host_device,node-name=b0,filename="$b",pr-manager=m --blockdev raw,node-name=b,file=b0 \
    --blockdev host_device,node-name=ro,filename="$a",pr-manager=m,read-only=on \
    --blockdev host_device,node-name=alone,filename="$a" \
    --chardev socket,id=q,path=/tmp/pr/qmp,server=on,wait=off --monitor q & d=$!
wait_for 60 test -S /tmp/pr/qmp || die "it does not start"
check_says '^CapEff:.0*$' "the daemon has no capability" cat /proc/$d/status
q=/tmp/pr/qmp
p() { timeout 20 sg_persist -n "$@"; }
wr() { dd if=/dev/zero of=$1 bs=4k count=1 oflag=direct conv=notrunc status=none; }
out() { # out TEXT NODE ACTION...: goes the expected way
    local t=$1; shift
    check_says "^\{\"route\": \"$route\"\}\$" "$t" pr out "$@"
}
check "the manager connects" wait_for 60 helper_has
check_says '"route": "helper", "types": \["write-exclusive", .*"exclusive-access-all-registrants"\]' "capabilities" pr in a report-capabilities
check_says '"keys": \[\]' "no keys" pr in a read-keys
out "register 1" a register new-key=161
out "register 2, through raw" b register new-key=178
check_says '"keys": \[161, 178\].*"total": 2' "keys" pr in a read-keys
scsi check_says '0xa1' "sg_persist sees them" p -k "$b"
check_says 'conflict' "register 1 again with a wrong key" pr out a register key=9 new-key=10
out "reserve 1" a reserve key=161 type=write-exclusive
check_says '"holder": \{"key": 161, "type": "write-exclusive"\}' "reservation" pr in b read-reservation
scsi check_says 'type: Write Exclusive$' "sg_persist sees it" p -r "$a"
check_says "RESERVE through the $route failed on node 'b': reservation conflict" "reserve 2" pr out b reserve key=178 type=write-exclusive
check "write 1" wr "$a"
check_rc 1 "write 2 refused" wr "$b"
scsi check_says '"initiator": "(sas|fc|iqn)' "full status names the ports" pr in a read-full-status
check_says 'invalid command operation code, sense 5/20/00' "a read-only node changes nothing" pr out ro release key=161 type=write-exclusive
check_says '"keys": \[161, 178\]' "and reads" pr in ro read-keys
out "release 1" a release key=161 type=write-exclusive
out "reserve 2, exclusive access" b reserve key=178 type=exclusive-access
check_rc 1 "read 1 refused" dd if=$a of=/dev/null bs=4k count=1 iflag=direct status=none
out "preempt 2 by 1" a preempt key=161 victim=178 type=exclusive-access
check_says 'preempted, sense 6/2a/0[35]|conflict' "2 hears of it" pr out b0 reserve key=178 type=exclusive-access
check_says '"keys": \[161\]' "one key left" pr in a read-keys
check_says '"key": 161, "type": "exclusive-access"' "1 holds it" pr in a read-reservation
check_says '"route": "helper"' "register 2 without persistence: the helper" pr out b0 register-and-ignore new-key=179 persist=false
if [ $route = kernel ]; then
    check_says '"route": "kernel"' "without a manager, the kernel" pr out alone release key=161 type=exclusive-access
    out "and back" a reserve key=161 type=exclusive-access
else
    check_says "the node has no pr-manager" "without a manager" pr out alone release key=161 type=exclusive-access
fi
kill $h; wait $h
missed() { qmp $q query-pr-managers | grep -q '"connected": false'; }
check "the helper is missed" wait_for 20 missed
check_says "REPORT CAPABILITIES through the helper failed on node 'a': logical unit communication failure, sense b/08/00 \(Failed to connect to '/tmp/pr/s': " \
    "without the helper" pr in a report-capabilities
helper
check "it is back" wait_for 60 helper_has
check_says '"keys": \[161, 179\]' "keys" pr in a read-keys
out "clear" a clear key=161
pr in b0 read-keys >/dev/null # takes the unit attention
check_says '"keys": \[\]' "nothing is left" pr in b read-keys
kill $d
wait $d
check "the daemon ends" [ $? = 0 ]
finish
