#!/bin/bash
# A client that serves a file system of its own (FUSE) and answers neither FLUSH nor GETATTR: its descriptors cannot be
# closed and cannot be asked about. Nobody else may notice.
# run -b OURS:qemu-pr-helper t/hang.sh
. /vm/lib/lib.sh
lio_init; lio_disk d0 8; a=$(lio_path 1 d0)
modprobe fuse
install -d -o nobody -g nogroup /tmp/pr; mkdir -p /tmp/fuse
qemu-pr-helper -k /tmp/pr/s -u nobody -g nogroup --audit=off & h=$!
wait_for 60 test -S /tmp/pr/s
cat >/tmp/fs.py <<'P'
import ctypes, os, struct, sys
sys.path.insert(0, "/vm/lib")
from pr_client import *
f = os.open("/dev/fuse", os.O_RDWR)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"evil", b"/tmp/fuse", b"fuse", 0, b"fd=%d,rootmode=40000,user_id=0,group_id=0" % f) == 0
def attr(ino, mode):
    return struct.pack("<QQQQQQIIIIIIIIII", ino, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
hung = 0
if os.fork() == 0:
    fd = os.open("/tmp/fuse/x", os.O_RDWR)
    clients = [Client("/tmp/pr/s") for _ in range(12)]
    for i, c in enumerate(clients):
        if i % 3:
            c.send(cdb_in(KEYS, 64), fd)
        elif i % 2:
            c.send(cdb_in(KEYS, 64), fd, fd)
        else:
            c.send(cdb_out(REGISTER, 0, 24), fd); c.send(bytes(24))
    print("sent", flush=True)
    os.pause() if hasattr(os, "pause") else __import__("signal").pause()
while True:
    q = os.read(f, 1 << 20)
    _, op, unique, ino = struct.unpack_from("<IIQQ", q)
    say = lambda body, err=0: os.write(f, struct.pack("<IiQ", 16 + len(body), err, unique) + body)
    if op == 26:    # INIT
        say(struct.pack("<IIIIHHIIHHIII", 7, 31, 65536, 0, 8, 8, 65536, 1, 16, 0, 0, 0, 0).ljust(64, b"\0"))
    elif op == 1:   # LOOKUP
        say(struct.pack("<QQQQII", 2, 0, 100, 0, 0, 0) + attr(2, 0o100666))
    elif op == 3 and ino == 1:
        say(struct.pack("<QII", 100, 0, 0) + attr(1, 0o40777))
    elif op == 14:  # OPEN
        say(struct.pack("<QII", 1, 0, 0))
    elif op in (25, 3):     # FLUSH, GETATTR: never answered
        hung += 1
        print("unanswered", op, flush=True)
    elif op not in (2, 36, 18, 29):
        say(b"", -38)
P
python3 /tmp/fs.py >/tmp/fs.out 2>&1 & fs=$!
check "the evil client has sent" wait_for 20 grep -q sent /tmp/fs.out
check "a descriptor of its hangs in closing" wait_for 20 grep -q 'unanswered 25' /tmp/fs.out
for i in 1 2 3 4 5; do
    check_says '^keys$' "another client is served" timeout 20 python3 /vm/lib/pr_client.py /tmp/pr/s $a list
done
cat /tmp/fs.out
check_rc 1 "the helper never asked for attributes" grep -q 'unanswered 3' /tmp/fs.out
mount -t fusectl fusectl /sys/fs/fuse/connections
echo 1 >"$(ls -d /sys/fs/fuse/connections/*/abort)"
check "when the file system ends, all is closed" wait_for 20 sh -c "! ls -l /proc/$h/fd | grep -q /tmp/fuse"
kill -9 $fs; pkill -9 -f /tmp/fs.py
kill $h; wait $h; check "ends with 0" test $? = 0
finish
