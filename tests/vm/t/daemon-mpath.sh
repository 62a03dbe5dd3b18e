#!/bin/bash
# Persistent reservations of a daemon's node on a device-mapper map of two paths, the daemon without any privilege, through
# the helper or, where it lets it (Linux 6.5), the kernel. run -b OURS:qemu-storage-daemon -b OURS:qemu-pr-helper t/daemon-mpath.sh
# The judge is sg_persist on a third path.
. /vm/lib/lib.sh
lio_init; lio_disk d0 64
mpath_init d0
chmod 666 "$m" "$a" "$b" "$other"
install -d -o nobody -g nogroup /tmp/pr
qemu-pr-helper -k /tmp/pr/s -u nobody -g nogroup >/tmp/helper.log 2>&1 & h=$!
wait_for 60 test -S /tmp/pr/s && chmod 666 /tmp/pr/s
q=/tmp/pr/qmp
setpriv --reuid nobody --regid nogroup --clear-groups --bounding-set=-all --inh-caps=-all qemu-storage-daemon \
    --object pr-manager-helper,id=p,path=/tmp/pr/s \
    --blockdev host_device,node-name=m,filename="$m",pr-manager=p \
    --blockdev host_device,node-name=o,filename="$other",pr-manager=p \
    --chardev socket,id=q,path=$q,server=on,wait=off --monitor q & d=$!
wait_for 60 test -S $q || die "it does not start"
p() { timeout 20 sg_persist -n "$@"; }
keys() { p -k "$other" | grep -c "^ *$1\$"; }
wr() { dd if=/dev/zero of=$1 bs=4k count=8 oflag=direct conv=notrunc status=none; }
out() { # out TEXT ACTION...: goes the expected way
    local t=$1; shift
    check_says "^\{\"route\": \"$route\"\}\$" "$t" pr out m "$@"
}
attentions() { # each path has its own; they go when they are reported
    local i path
    for path in "$a" "$b" "$other"; do for i in 1 2 3; do p -k "$path" >/dev/null 2>&1; done; done
}
sequence() {
    out "register" register new-key=161
    check_says '^2$' "on both paths" keys 0xa1
    out "change the key" register key=161 new-key=162
    check_says '^2$' "on both paths" keys 0xa2
    check_says 'conflict' "a wrong key" pr out m register key=9 new-key=10
    out "reserve" reserve key=162 type=write-exclusive-registrants-only
    check_says 'type: Write Exclusive, registrants only' "sg_persist sees it" p -r "$other"
    check_says '"key": 162, "type": "write-exclusive-registrants-only"' "so does the daemon" pr in m read-reservation
    for i in 1 2 3 4; do wr $m || no "write by either path"; done
    check_rc 1 "write from elsewhere refused" wr "$other"
    check_says '"keys": \[162, 162\].*"total": 2' "keys" pr in m read-keys
    check_says '"registrations": \[.*"key": 162.*"key": 162' "full status: both paths" pr in m read-full-status
    check_says '"route": "helper"' "another initiator, through the helper" pr out o register-and-ignore new-key=177 persist=false
    check_says '"route"' "it preempts" pr out o preempt key=177 victim=162 type=write-exclusive-registrants-only
    check_says '^0$' "both registrations are gone" keys 0xa2
    check_says 'preempted, sense 6/2a/0[35]|conflict' "the map hears of it" pr out m release key=162 type=write-exclusive-registrants-only
    attentions
    out "register and ignore" register-and-ignore new-key=161
    attentions
    out "preempt by the map" preempt key=161 victim=177 type=exclusive-access
    attentions
    check_says '"key": 161, "type": "exclusive-access"' "the map holds it" pr in m read-reservation
    attentions
    check_says 'sense 5/2[04]/00' "REGISTER AND MOVE: not for a map" \
        pr out m register-and-move key=161 new-key=200 target-port=1 initiator=060000006001405000000001000000000000000000000000
    check_says '"route": "helper"' "register without persistence: through the helper, on both paths" \
        pr out m register-and-ignore new-key=163 persist=false
    check_says '^2$' "on both paths" keys 0xa3
    out "release" release key=163 type=exclusive-access
    out "clear" clear key=163
    check_says '^0$' "nothing is left" keys 0xa3
    attentions
}
check "the manager connects" wait_for 60 helper_has
check_says '"keys": \[\]' "no keys" pr in m read-keys
check_says '"route": "helper"' "capabilities" pr in m report-capabilities
route=helper
IFS=. read -r major minor _ < <(uname -r)
[ $((major * 1000 + ${minor%%-*})) -ge 6005 ] && route=kernel
echo "--- $(uname -r): as far as it can, through the $route"
sequence
if [ $route = kernel ]; then
    echo "--- as on older kernels, through the helper"
    # What the daemon asks of the kernel is answered so, and said to be by its sandbox; the helper's own calls are not.
    strace -qqf -o /tmp/strace -p $d -e trace=ioctl -e inject=ioctl:error=EOPNOTSUPP & st=$!
    wait_for 60 grep -q "^TracerPid:.[1-9]" /proc/$d/task/*/status
    route=helper
    sequence
    kill -INT $st; wait $st
    check "the kernel refused each" test "$(grep -c 'IOC_PR_.*INJECTED\|0x70c.*INJECTED' /tmp/strace)" -ge 8
fi
check_says '"action":"preempt".*"status":"0x00"' "the helper's audit lines" cat /tmp/helper.log
kill $d; wait $d; check "the daemon ends" [ $? = 0 ]
kill $h; wait $h; check "the helper ends" [ $? = 0 ]
dmsetup message mpatha 0 fail_if_no_path
multipath -F; kill $mp 2>/dev/null; wait $mp
finish
