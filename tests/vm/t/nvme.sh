#!/bin/bash
# The helper on NVMe namespaces: SCSI commands in, IOC_PR_* and Reservation Report out.
# VM_KERNEL=trixie-backports:linux-image-cloud-amd64 run -k nvme_core.multipath=N -b OURS:qemu-pr-helper t/nvme.sh
. /vm/lib/lib.sh
configfs
nvmet_init || { echo "skip this kernel has no NVMe target reservations"; exit 77; }
a=$(nvme_path 1) b=$(nvme_path 2); echo "$a $b"
install -d -o nobody -g nogroup /tmp/pr
qemu-pr-helper -k /tmp/pr/s -u nobody -g nogroup --audit=off & h=$!
wait_for 60 test -S /tmp/pr/s
wr() { dd if=/dev/zero of=$1 bs=4k count=1 oflag=direct conv=notrunc status=none; }
c() { python3 /vm/lib/pr_client.py /tmp/pr/s "$@"; }
c $a capabilities
check_says '^keys$' "no keys" c $a list
check_says 'status 0x0' "register 1" c $a register 0 0xa
check_says 'status 0x0' "register 2" c $b register 0 0xb
check_says '^keys 0xa 0xb$' "keys" c $b list
check_says 'status 0x18' "register 1 again with a wrong key: conflict" c $a register 0xdead 0xc
check_says 'status 0x0' "reserve 1, write exclusive" c $a reserve 0xa 0 1
check_says 'status 0x0 .*00000010000000000000000a00000000000?1$' "reservation" c $b reservation
check_says 'status 0x18' "reserve 2: conflict" c $b reserve 0xb 0 1
check "write 1" wr $a
check_rc 1 "write 2 refused" wr $b
check_says 'status 0x0' "preempt 1 by 2" c $b preempt 0xb 0xa 1
check_says '^keys 0xb$' "one key left" c $b list
check "write 2" wr $b
check_rc 1 "write 1 refused" wr $a
check_says 'status 0x0' "release 2" c $b release 0xb 0 1
check_says 'status 0x0' "register 1, whatever its key is" c $a ignore 0 0xc
check_says 'status 0x2 sense 5/24/00' "full status: no TransportID for NVMe" c $a status
python3 - $a <<'P'
import os, sys
sys.path.insert(0, "/vm/lib")
from pr_client import *
c, fd = Client("/tmp/pr/s"), os.open(sys.argv[1], os.O_RDWR)
ro = os.open(sys.argv[1], os.O_RDONLY)
for text, got, want in [
    ("REGISTER AND MOVE", c.pr_out(fd, MOVE, 0xc, 1)[:2], (CHECK, (5, 0x24, 0))),
    ("ALL_TG_PT", c.pr_out(fd, REGISTER, 0xc, 1, flags=4)[:2], (CHECK, (5, 0x26, 0))),
    ("short list", c.pr_out(fd, REGISTER, data=bytes(8))[:2], (CHECK, (5, 0x1A, 0))),
    ("no such type", c.pr_out(fd, RESERVE, 0xc, typ=2)[:2], (CHECK, (5, 0x24, 0))),
    ("read-only descriptor", c.pr_out(ro, CLEAR, 0xc)[:2], (CHECK, (5, 0x20, 0))),
]:
    got = (got[0], sense_key(got[1]))
    print("ok  " if got == want else "FAIL", text, got)
f = Frames("/tmp/pr/s")
print("ok   frames: keys", f.list_keys(fd))
P
check_says 'status 0x0' "clear" c $a clear 0xc
check_says '^keys$' "no keys" c $a list
check_says 'status 0x0' "register, then unregister" c $a register 0 0xd
check_says '^keys 0xd$' "keys" c $b list
check_says 'status 0x0' "ignore, again" c $a ignore 0 0xe
check_says '^keys 0xe$' "keys" c $b list
check_says 'status 0x0' "unregister" c $a register 0xe 0
check_says '^keys$' "no keys" c $a list
check_says 'status 0x0' "register" c $a register 0 0xf
check_says 'status 0x0' "unregister, whatever the key is" c $a ignore 0 0
check_says '^keys$' "no keys" c $a list
kill $h; wait $h; check "ends with 0" test $? = 0
finish
