#!/bin/bash
# A real QEMU's scsi-block disk, driven as a guest would: its persistent reservation commands go through pr-manager-helper
# to the helper, which serves a client of the frames protocol on the same socket at the same time.
# run -m 3G -b HELPER:qemu-pr-helper -b /usr/bin/qemu-system-x86_64 -f /usr/share/qemu:/usr/share/qemu \
#     -f /usr/share/seabios:/usr/share/seabios t/qemu.sh
. /vm/lib/lib.sh
lio_init; lio_disk d0 64
a=$(lio_path 1 d0) b=$(lio_path 2 d0)
install -d -o nobody -g nogroup /tmp/pr
qemu-pr-helper -k /tmp/pr/s -u nobody -g nogroup & h=$!
wait_for 60 test -S /tmp/pr/s || die "it does not start"
PYTHONPATH=/vm/lib python3 - $a $b <<'P'
import os, sys
from virtio_scsi import *
a, b = sys.argv[1:]
fb, bad = os.open(b, os.O_RDWR), 0
def is_(text, got, want):
    global bad
    bad += got != want
    print("ok  " if got == want else "FAIL", text, "" if got == want else (got, want), flush=True)
guest = Guest(a, "/tmp/pr/s")
v, pr_in, pr_out = guest.disk, guest.pr_in, guest.pr_out
status, _, data = guest.inquiry
is_("INQUIRY, past the helper", (status, data[8:16]), (GOOD, b"LIO-ORG "))
frames = Frames("/tmp/pr/s")
is_("no keys", pr_in(KEYS)[2][4:8], bytes(4))
is_("register", pr_out(REGISTER, 0, 0xA)[0], GOOD)
is_("frames client: keys", frames.list_keys(fb), [0xA])
is_("frames client: register", frames.register(fb, 0, 0xB)[0], None)
status, _, data = pr_in(KEYS)
is_("keys", (status, struct.unpack(">I", data[4:8])[0]), (GOOD, 16))
is_("reserve", pr_out(RESERVE, 0xA, 0, 1)[0], GOOD)
is_("frames client: conflict", frames.reserve(fb, 0xB, 1)[0][0], CONFLICT)
status, sense, _ = pr_out(RESERVE, 0xBAD, 0, 1)
is_("wrong key: conflict for the guest", status, CONFLICT)
status, sense, _ = pr_out(RELEASE, 0xA, 0, 1, data=bytes(8))
is_("short parameter list: the disk's sense for the guest", (status, sense_key(sense)), (CHECK, (5, 0x1A, 0)))
status, _, data = pr_in(CAPABILITIES, 8)
is_("capabilities", (status, data[:2]), (GOOD, b"\0\x08"))
is_("frames client: preempt", frames.preempt(fb, 0xB, 0xA, 1)[0], None)
status, sense, _ = pr_in(KEYS)
is_("unit attention for the guest", (status, sense_key(sense)[:2]), (CHECK, (6, 0x2A)))
is_("the guest's key is gone", pr_out(RELEASE, 0xA, 0, 1)[0], CONFLICT)
is_("frames client: clear", frames.clear(fb, 0xB)[0], None)
pr_in(KEYS)
is_("keys", pr_in(KEYS)[2][4:8], bytes(4))
guest.qemu.kill()
print("%d failed" % bad)
sys.exit(bad != 0)
P
check "QEMU and the helper" test $? = 0
kill $h; wait $h; check "ends with 0" test $? = 0
finish
