#!/bin/bash
# The daemon's units under a real systemd, with the helper's: both are started by their sockets, both in their sandboxes.
# run -s -f ../../systemd:/vm/units -b OURS:qemu-pr-helper -b DAEMON:qemu-storage-daemon t/daemon-unit.sh
. /vm/lib/lib.sh
check "systemd is process 1" test "$(cat /proc/1/comm)" = systemd
check "users" systemd-sysusers /vm/units/qemu-storage.sysusers.conf
check "folders" systemd-tmpfiles --create /vm/units/qemu-storage.tmpfiles.conf
install -m 755 /vm/bin/qemu-pr-helper /vm/bin/qemu-storage-daemon /usr/bin
cp /vm/units/*.socket /vm/units/*.service /etc/systemd/system/
lio_init; lio_disk d0 64; a=$(lio_path 1 d0)
chown qemu-storage-daemon "$a"
mkdir -p /etc/qemu-storage-daemon
cat >/etc/qemu-storage-daemon/one.conf <<C
OPTIONS=--object pr-manager-helper,id=m,path=/run/qemu-pr-helper.sock --blockdev host_device,node-name=a,filename=$a,pr-manager=m --chardev socket,fd=qmp,server=on,wait=off,id=q --monitor q
C
systemctl daemon-reload
check "sockets" systemctl start qemu-pr-helper.socket qemu-storage-daemon-qmp@one.socket
check_rc 3 "the daemon does not run yet" systemctl is-active -q qemu-storage-daemon@one.service
cat >/tmp/q.py <<'P'
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(60)
s.connect("/run/qemu-storage-daemon-one/qmp.sock")
f = s.makefile("rw")
f.readline()
for line in ['{"execute": "qmp_capabilities"}'] + sys.argv[1:]:
    print(line, file=f, flush=True)
    while "event" in (answer := json.loads(f.readline())):
        pass
print(json.dumps(answer))
P
q() { timeout 90 python3 /tmp/q.py "$@"; }
check_says '"mode": "default".*"system-calls": true.*"no-new-privileges": true, "capabilities": \[\], "refused": \[\]' \
    "the first client starts it, in its sandbox" q '{"execute": "x-query-sandbox"}'
check "it runs" systemctl is-active -q qemu-storage-daemon@one.service
pid=$(systemctl show -P MainPID qemu-storage-daemon@one.service)
check "as its user" test "$(stat -c %U /proc/$pid)" = qemu-storage-daemon
check_says '^CapEff:.0*$' "without capabilities" cat /proc/$pid/status
connected() { q '{"execute": "query-pr-managers"}' | grep -q '"connected": true'; }
check "it has the helper, which its connection started" wait_for 30 connected
check "the helper runs" systemctl is-active -q qemu-pr-helper.service
check_says '"route": "(helper|kernel)"' "a reservation" \
    q '{"execute": "x-block-pr-out", "arguments": {"node-name": "a", "action": "register", "new-key": 161}}'
check_says '"keys": \[161\]' "is there" q '{"execute": "x-block-pr-in", "arguments": {"node-name": "a", "action": "read-keys"}}'
check "stop" systemctl stop qemu-storage-daemon-qmp@one.socket qemu-storage-daemon@one.service
check_says 'success' "stopped well" systemctl show -P Result qemu-storage-daemon@one.service
check_rc 1 "nothing was refused" sh -c 'journalctl -q -u qemu-storage-daemon@one -o cat | grep "refused in thread"'
check_says 'exposure level.* (0\.|1\.[0-4])' "exposure" systemd-analyze security --no-pager qemu-storage-daemon@one.service
journalctl -q -u qemu-storage-daemon@one -o cat --no-pager | tail -8
finish
