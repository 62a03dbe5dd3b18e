#!/bin/bash
# Our units under a real systemd: users, socket activation, readiness, watchdog, a helper that dies under its client.
# run -s -f ../../systemd:/vm/units -b OURS:qemu-pr-helper t/units.sh
. /vm/lib/lib.sh
check "systemd is process 1" test "$(cat /proc/1/comm)" = systemd
check "users" systemd-sysusers /vm/units/qemu-storage.sysusers.conf
check "folders" systemd-tmpfiles --create /vm/units/qemu-storage.tmpfiles.conf
check "state folder" test "$(stat -c %U:%a /var/lib/qemu-storage-daemon)" = qemu-storage-daemon:750
install -m 755 /vm/bin/qemu-pr-helper /usr/bin/qemu-pr-helper
cp /vm/units/*.socket /vm/units/*.service /etc/systemd/system/
mkdir -p /etc/systemd/system/qemu-pr-helper.service.d
printf '[Service]\nWatchdogSec=4\n' >/etc/systemd/system/qemu-pr-helper.service.d/test.conf
systemctl daemon-reload
lio_init; lio_disk d0 64; a=$(lio_path 1 d0) b=$(lio_path 2 d0)
s=/run/qemu-pr-helper.sock
check "socket" systemctl start qemu-pr-helper.socket
check "its owner and mode" test "$(stat -c %U:%G:%a $s)" = root:qemu-pr-helper:660
check_rc 3 "nothing runs yet" systemctl is-active -q qemu-pr-helper.service
echo "--- owner and mode by a drop-in"
mkdir -p /etc/systemd/system/qemu-pr-helper.socket.d
printf '[Socket]\nSocketUser=nobody\nSocketGroup=disk\nSocketMode=0640\n' >/etc/systemd/system/qemu-pr-helper.socket.d/own.conf
systemctl daemon-reload
check "another socket" systemctl restart qemu-pr-helper.socket
check "owner and mode of the drop-in" test "$(stat -c %U:%G:%a $s)" = nobody:disk:640
rm -r /etc/systemd/system/qemu-pr-helper.socket.d
systemctl daemon-reload
check "and back" systemctl restart qemu-pr-helper.socket

c() { python3 /vm/lib/pr_client.py $s "$@"; }
check_says 'status 0x0' "register: the first client starts it" c $a register 0 0xa
check "it runs" systemctl is-active -q qemu-pr-helper.service
pid() { systemctl show -P MainPID qemu-pr-helper.service; }
check "as its user" test "$(stat -c %U /proc/$(pid))" = qemu-pr-helper
grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp)' /proc/$(pid)/status
check_says '^CapEff:.0000000000020000$' "with one capability" cat /proc/$(pid)/status
check_says 'serving' "status" systemctl show -P StatusText qemu-pr-helper.service
check_says 'notify' "type" systemctl show -P Type qemu-pr-helper.service
usermod -aG qemu-pr-helper nobody
check_says 'status 0x0' "a member of the group may connect, with a descriptor of a disk that it was given" \
    setpriv --reuid nobody --regid nogroup --init-groups sh -c "exec python3 /vm/lib/pr_client.py $s fd:5 keys" 5<>$a
check_says "PermissionError" "others may not connect" setpriv --reuid daemon --regid daemon --clear-groups python3 /vm/lib/pr_client.py $s fd:5 keys 5<>$a
check_says '"action":"register".*"status":"0x00"' "audit line in the journal" journalctl -q -u qemu-pr-helper -o cat

echo "--- the socket outlives the helper"
check "stop the helper alone" systemctl stop qemu-pr-helper.service
check "its socket stays" test "$(stat -c %U:%G:%a $s)" = root:qemu-pr-helper:660
check_says '^keys 0xa$' "the next client starts the next helper" c $a list

echo "--- killed under its client"
python3 - $s $a <<'P'
import os, signal, subprocess, sys
sys.path.insert(0, "/vm/lib")
from pr_client import *
fd = os.open(sys.argv[2], os.O_RDWR)
c = Client(sys.argv[1])
assert c.keys(fd) == [0xA]
pid = lambda: int(subprocess.check_output(["systemctl", "show", "-P", "MainPID", "qemu-pr-helper.service"]))
old = pid()
os.kill(old, signal.SIGKILL)
try:
    c.keys(fd)
    print("FAIL a killed helper answers")
except (EOFError, OSError):
    print("ok   the client sees the end of the connection")
c = Client(sys.argv[1])
print("ok   it connects again:", c.keys(fd) == [0xA], pid() != old)
P
echo "--- watchdog"
old=$(pid); [ "$old" != 0 ] || die "it does not start"
kill -STOP $old
check_says '^keys 0xa$' "a stopped helper is replaced while a client waits" timeout 60 python3 /vm/lib/pr_client.py $s $a list
check "by another process" test "$(pid)" != $old
check_says 'watchdog' "because of the watchdog" journalctl -q -u qemu-pr-helper --grep -i watchdog

echo "--- rule on units"
mkdir -p /etc/systemd/system/qemu-pr-helper.service.d
printf '[Service]\nExecStart=\nExecStart=/usr/bin/qemu-pr-helper --allow unit=good*,device=%s --deny action=clear\n' $a \
    >/etc/systemd/system/qemu-pr-helper.service.d/rule.conf
systemctl daemon-reload
check "restart" systemctl restart qemu-pr-helper.service
check_says 'status 0x2 sense 5/20/02' "another unit: access denied" c $a keys
as() { systemd-run -q --wait --pipe -u "$1" python3 /vm/lib/pr_client.py $s "${@:2}"; }
check_says 'status 0x0' "the unit that the rule names" as good-one $a keys
# As a user's own manager makes them, to which all names are free.
as_user() { systemd-run -q --wait --pipe -u "other.service" -p Delegate=yes sh -c "
    cg=/sys/fs/cgroup/system.slice/other.service; mkdir \$cg/good-one.service
    echo \$\$ >\$cg/good-one.service/cgroup.procs; exec python3 /vm/lib/pr_client.py $s $a keys"; }
check_says 'status 0x2 sense 5/20/02' "a cgroup of that name within another unit" as_user
check_says 'status 0x2 sense 5/20/02' "another device" as good-two $b keys
check_says 'status 0x2 sense 5/20/02' "an action that is denied" as good-three $a clear 0xa
check_says '"unit":"good-three.service".*"denied":true' "audit line" journalctl -q -u qemu-pr-helper -o cat

check "stop" systemctl stop qemu-pr-helper.socket qemu-pr-helper.service
check_says 'success' "stopped well" systemctl show -P Result qemu-pr-helper.service
check_rc 1 "socket is gone" test -e $s
check_says 'exposure level.* (0\.|1\.[0-4])' "exposure" systemd-analyze security --no-pager qemu-pr-helper.service
journalctl -q -b -p err --no-pager | tail -5
finish
