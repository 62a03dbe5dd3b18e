#!/bin/bash
# PREEMPT AND ABORT, APTPL and unit attentions through the helper, from two iSCSI initiators (on tcm_loop it never ends).
# run -b HELPER:qemu-pr-helper t/abort.sh
. /vm/lib/lib.sh
lio_init; lio_disk d0 64; iscsi_init d0
a=$(iscsi_path 1) b=$(iscsi_path 2)
install -d -o nobody -g nogroup /tmp/pr
qemu-pr-helper -k /tmp/pr/s -u nobody -g nogroup & h=$!
wait_for 60 test -S /tmp/pr/s
c() { python3 /vm/lib/pr_client.py /tmp/pr/s "$@"; }
p() { timeout 20 sg_persist -n "$@"; }
wr() { dd if=/dev/zero of=$1 bs=4k count=1 oflag=direct conv=notrunc status=none; }
check_says 'status 0x0' "register 1" c $a register 0 0xa
check_says 'status 0x0' "register 2" c $b register 0 0xb
check_says '0xa' "sg_persist sees both" p -k $a
check_says 'status 0x0' "reserve 2, exclusive access" c $b reserve 0xb 0 3
check_rc 1 "read from 1 refused" dd if=$a of=/dev/null bs=4k count=1 iflag=direct status=none
check_says 'status 0x0' "preempt and abort 2 by 1" c $a abort 0xa 0xb 3
check_says 'status 0x2 sense 6/2a/0[35]' "unit attention on 2" c $b keys
check_says 'status 0x18' "2's key is gone" c $b reserve 0xb 0 3
check_says 'Exclusive Access$' "sg_persist sees the new reservation" p -r $a
check_rc 1 "write from 2 refused" wr $b
check "write from 1" wr $a
check_says 'status 0x0' "clear" c $a clear 0xa
check "write from 2" wr $b
python3 - $a $b <<'P' | tee /tmp/py
import os, sys
sys.path.insert(0, "/vm/lib")
from pr_client import *
a, b = (os.open(d, os.O_RDWR) for d in sys.argv[1:])
c = Client("/tmp/pr/s")
st, sense, _ = c.pr_out(a, REGISTER, 0, 0xA1, flags=1)
print("ok  " if st == GOOD else "FAIL", "register with APTPL", hex(st))
kept = "".join(open("/var/target/pr/" + f).read() for f in os.listdir("/var/target/pr"))
print("ok  " if "sa_res_key=161" in kept else "FAIL", "kept in /var/target/pr")
if c.offered != bytes(4):
    f = Frames("/tmp/pr/s")
    def say(text, got, want):
        print("ok  " if got == want else "FAIL", "frames:", text, "" if got == want else (got, want))
    say("keys", f.list_keys(a), [0xA1])
    f.do(b, "keys")     # takes a unit attention, if there is one
    say("register", f.register(b, 0, 0xB1)[0], None)
    say("reserve", f.reserve(b, 0xB1, 3)[0], None)
    err, data = f.do(a, "reservation")
    say("reservation", (struct.unpack("<IIBQBI", data)[0], *struct.unpack("<IIBQBI", data)[2:]), (2, 1, 0xB1, 0, 1))
    say("conflict", f.reserve(a, 0xA1, 3)[0], (CONFLICT, b""))
    say("preempt and abort", f.preempt(a, 0xA1, 0xB1, 3, abort=True)[0], None)
    err, _ = f.do(b, "keys")
    say("unit attention", (err[0], sense_key(err[1])[:2]), (CHECK, (6, 0x2A)))
    err, data = f.do(a, "capabilities")
    say("capabilities", (err, struct.unpack_from("<I??", data)), (None, (3, False, True)))
    err, data = f.do(a, "status")
    say("full status", (err, struct.unpack_from("<IIQQ", data)[2:]), (None, (1, 0xA1)))
    ids = [f.ask(fd, "keys") for fd in (a, b) * 6]
    say("a dozen at a time", sorted(f.answer()[0] for _ in ids), ids)
    say("release", f.release(a, 0xA1, 3)[0], None)
P
check_rc 1 "nothing failed there" grep -q FAIL /tmp/py
check_says 'status 0x0' "unregister" c $a register 0xa1 0
check_says 'NO registered' "no keys" p -k $a
kill $h; wait $h; check "ends with 0" test $? = 0
finish
