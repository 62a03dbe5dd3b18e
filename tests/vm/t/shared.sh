#!/bin/bash
# One helper, started by its socket under a real systemd, serves a real QEMU's pr-manager-helper (its scsi-block disk driven as
# a guest would) and the daemon, started by its own socket, at the same time.
# run -s -m 3G -f ../../systemd:/vm/units -b OURS:qemu-pr-helper -b DAEMON:qemu-storage-daemon -b /usr/bin/qemu-system-x86_64
#     -f /usr/share/qemu:/usr/share/qemu -f /usr/share/seabios:/usr/share/seabios t/shared.sh
. /vm/lib/lib.sh
check "users" systemd-sysusers /vm/units/qemu-storage.sysusers.conf
check "folders" systemd-tmpfiles --create /vm/units/qemu-storage.tmpfiles.conf
install -m 755 /vm/bin/qemu-pr-helper /vm/bin/qemu-storage-daemon /usr/bin
cp /vm/units/*.socket /vm/units/*.service /etc/systemd/system/
lio_init; lio_disk d0 64; a=$(lio_path 1 d0) b=$(lio_path 2 d0)
# QEMU runs as somebody who may use the helper's socket and one disk, the daemon as its own user.
useradd -r -G qemu-pr-helper guest
chown guest "$a"; chown qemu-storage-daemon "$b"
mkdir -p /etc/qemu-storage-daemon
h=/run/qemu-pr-helper.sock q=/run/qemu-storage-daemon-one/qmp.sock
cat >/etc/qemu-storage-daemon/one.conf <<C
OPTIONS=--object pr-manager-helper,id=m,path=$h --blockdev host_device,node-name=b,filename=$b,pr-manager=m --chardev socket,fd=qmp,server=on,wait=off,id=q --monitor q
C
systemctl daemon-reload
check "sockets" systemctl start qemu-pr-helper.socket qemu-storage-daemon-qmp@one.socket
check_rc 3 "no helper runs yet" systemctl is-active -q qemu-pr-helper.service
check "the daemon, started by its socket, has the helper, started by its own" wait_for 60 helper_has
pid=$(systemctl show -P MainPID qemu-pr-helper.service)
cat >/tmp/shared.py <<'P'
import sys
from qmp import Qmp
from virtio_scsi import *
bad = 0
def is_(text, got, want):
    global bad
    bad += got != want
    print("ok  " if got == want else "FAIL", text, "" if got == want else (got, want), flush=True)
disk, helper, monitor = sys.argv[1:]
guest = Guest(disk, helper, ["setpriv", "--reuid", "guest", "--regid", "guest", "--init-groups"])
daemon = Qmp(monitor)
pr_in, pr_out = guest.pr_in, guest.pr_out
out = lambda *a, **k: daemon.pr("out", "b", *a, **k)
read = lambda action: daemon.pr("in", "b", action)
def done(answer):
    return answer if isinstance(answer, str) else "route" in answer
is_("no keys for the guest", guest.keys(), [])
is_("nor for the daemon", read("read-keys")["keys"], [])
is_("guest: register", pr_out(REGISTER, 0, 0xA)[0], GOOD)
is_("daemon: its key", read("read-keys")["keys"], [0xA])
# Without persistence it is the helper that does it, not the kernel.
is_("daemon: register", out("register-and-ignore", new_key=0xB, persist=False), {"route": "helper"})
is_("guest: both keys", guest.keys(), [0xA, 0xB])
is_("guest: reserve", pr_out(RESERVE, 0xA, 0, 1)[0], GOOD)
answer = out("reserve", key=0xB, type="write-exclusive")
is_("daemon: conflict", isinstance(answer, str) and "reservation conflict" in answer, True)
is_("daemon: who holds it", read("read-reservation")["holder"], {"key": 0xA, "type": "write-exclusive"})
is_("guest: capabilities", pr_in(CAPABILITIES, 8)[2][:2], b"\0\x08")
is_("daemon: capabilities", read("report-capabilities")["route"], "helper")
is_("daemon: preempt", done(out("preempt", key=0xB, victim=0xA, type="write-exclusive")), True)
status, sense, _ = pr_in(KEYS)
is_("guest: unit attention", (status, sense_key(sense)[:2]), (CHECK, (6, 0x2A)))
is_("guest: its key is gone", pr_out(RELEASE, 0xA, 0, 1)[0], CONFLICT)
is_("guest: register again", pr_out(REGISTER, 0, 0xC)[0], GOOD)
for turn in range(20):
    # Each sees the other's last change.
    new = 0x100 + turn
    old = 0xC if turn == 0 else new - 1
    is_("guest: change %d" % turn, pr_out(REGISTER, old, new)[0], GOOD)
    is_("daemon: sees it", sorted(read("read-keys")["keys"]), [0xB, new])
is_("daemon: clear", done(out("clear", key=0xB)), True)
pr_in(KEYS)
is_("guest: nothing is left", guest.keys(), [])
guest.qemu.kill()
guest.qemu.wait()
print("%d failed" % bad)
sys.exit(bad != 0)
P
PYTHONPATH=/vm/lib python3 /tmp/shared.py "$a" $h $q
check "QEMU and the daemon" test $? = 0
check "one helper served both" test "$(systemctl show -P MainPID qemu-pr-helper.service)" = "$pid"
peers() { journalctl -q -u qemu-pr-helper -o cat >/tmp/audit; grep -o '"uid":[0-9]*' /tmp/audit | sort -u | wc -l; }
check_says '^[2-9]$' "its audit lines name both users" peers
check_rc 1 "nothing was refused" sh -c 'journalctl -q -u qemu-storage-daemon@one -u qemu-pr-helper -o cat | grep "refused in thread"'
check "stop" systemctl stop qemu-storage-daemon-qmp@one.socket qemu-storage-daemon@one.service qemu-pr-helper.socket qemu-pr-helper.service
check_says 'success' "stopped well" systemctl show -P Result qemu-pr-helper.service
finish
