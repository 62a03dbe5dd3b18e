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
q=/run/qemu-storage-daemon-one/qmp.sock
check_says '"capabilities": \[\].*"mode": "default".*"no-new-privileges": true.*"refused": \[\].*"system-calls": true' \
    "the first client starts it, in its sandbox" qmp $q x-query-sandbox
check "it runs" systemctl is-active -q qemu-storage-daemon@one.service
pid=$(systemctl show -P MainPID qemu-storage-daemon@one.service)
check "as its user" test "$(stat -c %U /proc/$pid)" = qemu-storage-daemon
check_says '^CapEff:.0*$' "without capabilities" cat /proc/$pid/status
check "it has the helper, which its connection started" wait_for 30 helper_has
check "the helper runs" systemctl is-active -q qemu-pr-helper.service
check_says '"route": "(helper|kernel)"' "a reservation" pr out a register new-key=161
check_says '"keys": \[161\]' "is there" pr in a read-keys
check "stop the daemon alone" systemctl stop qemu-storage-daemon@one.service
check "its socket stays" test -S $q
check_says '"keys": \[161\]' "the next client starts the next daemon" pr in a read-keys
check "stop" systemctl stop qemu-storage-daemon-qmp@one.socket qemu-storage-daemon@one.service
check_says 'success' "stopped well" systemctl show -P Result qemu-storage-daemon@one.service
check_rc 1 "nothing was refused" sh -c 'journalctl -q -u qemu-storage-daemon@one -o cat | grep "refused in thread"'
check_says 'exposure level.* (0\.|1\.[0-4])' "exposure" systemd-analyze security --no-pager qemu-storage-daemon@one.service
journalctl -q -u qemu-storage-daemon@one -o cat --no-pager | tail -8
finish
