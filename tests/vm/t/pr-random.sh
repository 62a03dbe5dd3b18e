#!/bin/bash
# The same random commands through ours and through the reference, each on a disk of its own: same status, sense, data.
# run -b OURS:qemu-pr-helper -b REFERENCE:reference-pr-helper t/pr-random.sh [SEED [COUNT]]
. /vm/lib/lib.sh
lio_init
lio_disk d0 8; lio_disk d1 8
a0=$(lio_path 1 d0) b0=$(lio_path 2 d0) a1=$(lio_path 3 d1) b1=$(lio_path 4 d1)
install -d -o nobody -g nogroup /tmp/pr
qemu-pr-helper -k /tmp/pr/ours -u nobody -g nogroup --audit=off & ours=$!
reference-pr-helper -k /tmp/pr/reference -u nobody -g nogroup & reference=$!
wait_for 60 test -S /tmp/pr/ours -a -S /tmp/pr/reference || die "it does not start"
PYTHONPATH=/vm/lib python3 - "${1:-1}" "${2:-600}" $a0 $b0 $a1 $b1 <<'P'
import os, random, sys
from pr_client import *
seed, count = int(sys.argv[1]), int(sys.argv[2])
disks = [sys.argv[3:5], sys.argv[5:7]]
fds = [[(os.open(d, os.O_RDWR), os.open(d, os.O_RDONLY)) for d in pair] for pair in disks]
clients = [[Client("/tmp/pr/" + n) for _ in pair] for n, pair in zip(("ours", "reference"), disks)]
r = random.Random(seed)

def plain(action, data):
    """READ FULL STATUS names the nexuses, which differ; everything else must be the same byte for byte."""
    if action != STATUS or len(data) < 8:
        return data
    out, at = [data[:8]], 8
    while at + 24 <= len(data):
        out.append(data[at:at + 18])
        at += 24 + struct.unpack(">I", data[at + 20:at + 24])[0]
    return b"".join(out) + bytes([len(data) - 8 & 255])

kinds, bad = {}, 0
for i in range(count):
    nexus, ro = r.randrange(2), r.random() < .05
    keys = [0, 0xA, 0xB, 0xC0FFEE << 32]
    if r.random() < .4:
        action = r.choice([0, 1, 2, 3, 3, 0])
        length = r.choice([8192, 8192, 8192, 8, 24, 7, 0])
        what = ("in", action, length)
        ask = lambda c, fd: c.pr_in(fd, action, length)
    else:
        # No unknown actions: ours does not ask the disk. Not PREEMPT AND ABORT: on tcm_loop it never ends (a kernel fault).
        action = r.choice([0, 0, 0, 1, 1, 2, 3, 4, 6, 6, 7, 8])
        key, new = r.choice(keys), r.choice(keys)
        typ = r.choice([1, 1, 3, 5, 6, 7, 8, 0, 2, 0x11])
        flags = r.choice([0, 0, 0, 0, 1, 4])
        data = param(key, new, flags)
        if r.random() < .08:
            data = data[:r.choice([0, 8, 23])] or b""
        what = ("out", action, hex(key), hex(new), typ, flags, len(data))
        ask = lambda c, fd: c.pr_out(fd, action, typ=typ, data=data)
    got = []
    for side in (0, 1):
        status, sense, data_in = ask(clients[side][nexus], fds[side][nexus][ro])
        got.append((status, sense, plain(what[1], data_in) if what[0] == "in" else data_in))
    kinds[(what[0], got[0][0])] = kinds.get((what[0], got[0][0]), 0) + 1
    if got[0] != got[1]:
        bad += 1
        print("FAIL %d nexus %d ro %d %r\n     ours      %r\n     reference %r" % (i, nexus, ro, what, *got), flush=True)
print("     seed %d, answers: %s" % (seed, ", ".join("%s %#x: %d" % (*k, v) for k, v in sorted(kinds.items()))))
print("%d of %d differ" % (bad, count))
sys.exit(bad != 0)
P
check "same answers" test $? = 0
kill $ours $reference; wait $ours; check "ours ends with 0" test $? = 0
finish
