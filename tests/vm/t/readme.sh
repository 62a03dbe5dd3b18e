#!/bin/bash
# The README's section about the helper, its commands as they stand there, under a real systemd: by root with the stand-ins of
# make and sudo, then by the user who joined the group.
# run -s -f ../../systemd:/vm/tree/systemd -f ../../README.md:/vm/tree/README.md -b OURS:qemu-pr-helper
#     -b DAEMON:qemu-storage-daemon t/readme.sh
. /vm/lib/lib.sh
lio_init; lio_disk d0 64
a=$(lio_path 1 d0) b=$(lio_path 2 d0)
check "the disk of the README" test "$b" = /dev/sdb
cd /vm/tree || die "it does not start"
mkdir -p target/release
cp /vm/bin/qemu-pr-helper /vm/bin/qemu-storage-daemon target/release
block() { # block N: the commands of the section's Nth block
    awk -v n="$1" '/^## /{ours = /Persistent reservations/} ours && /^```sh/{i++; on = i == n; next} /^```/{on = 0} on' README.md
}
make() { [ "$*" = build ]; }
sudo() { "$@"; }
export -f make sudo
useradd -m tester
block 1 >/tmp/one
check "there are commands" test "$(wc -l </tmp/one)" -ge 5
check "the commands that set it up" env USER=tester bash -e /tmp/one
check "the socket is there" test -S /run/qemu-pr-helper.sock
chown tester /dev/sdb
block 2 >/tmp/two
mkdir /tmp/work; chown tester /tmp/work; ln -s /vm/tree/target /tmp/work/target
cd /tmp/work || die "it does not start"
setpriv --reuid tester --regid tester --init-groups --bounding-set=-all bash -e /tmp/two &
q=/tmp/work/qmp.sock
check "the daemon runs, as the user" wait_for 30 test -S $q
check "and has the helper" wait_for 60 helper_has
check_says '"keys": \[\]' "no keys" pr in disk read-keys
check_says '"route": "helper"' "a key, by the helper" pr out disk register-and-ignore new-key=161 persist=false
check_says '0xa1' "sg_persist sees it from the other path" sg_persist -n -k "$a"
check_says '"uid":'"$(id -u tester)"'.*"action":"register-and-ignore"' "and the journal who did it" \
    journalctl -q -u qemu-pr-helper -o cat
qmp $q quit >/dev/null
wait
finish
