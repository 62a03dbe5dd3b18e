#!/bin/bash
# VDUSE exports on the kernel's vDPA bus.
# run -b DAEMON:qemu-storage-daemon [-b /usr/bin/qemu-storage-daemon:reference] -b /usr/bin/qemu-img -b VDPA-DRIVER:vdpa-driver
#     t/vduse.sh [PART...]
. /vm/lib/lib.sh
io="python3 /vm/lib/block_io.py"
qmp() { # qmp NAME [KEY=VALUE...]: fails with an error's text
    local answer; answer=$(timeout 90 python3 /vm/lib/qmp.py /tmp/qmp.sock "$@") && echo "$answer" && [[ $answer != '"'* ]]
}
uname -r

missing() { # before the module is there
    check_says "failed to create vduse device" "$1: without the module" \
        $1 --blockdev null-co,node-name=f,size=1048576 --export vduse-blk,id=e,node-name=f,name=none
}

image() { # image FORMAT SIZE: /tmp/vduse.FORMAT
    img=/tmp/vduse.$1
    rm -f $img
    qemu-img create -q -f $1 $img $2
    node=(--blockdev file,node-name=file,filename=$img,discard=unmap --blockdev $1,node-name=f,file=file,discard=unmap)
}
start() { # start PROGRAM EXPORT-OPTIONS [MORE...]: serves $img as vduse0
    local q=$1 e=$2; shift 2
    rm -f /tmp/qmp.sock
    $q --chardev socket,id=m,path=/tmp/qmp.sock,server=on,wait=off --monitor chardev=m "$@" "${node[@]}" \
        --export vduse-blk,id=e,node-name=f,name=vduse0,$e 2>>/tmp/daemon.log &
    qp=$!
    wait_for 60 test -S /tmp/qmp.sock && wait_for 10 qmp query-block-exports
}
attach() { # the disk as $d
    local old; old=$(ls /sys/block)
    new() { ls /sys/block | grep -vxF "$old"; }
    vdpa dev add name vduse0 mgmtdev vduse && wait_for 60 new && d=/dev/$(new) && b=/sys/block/${d#/dev/}
}
detach() { vdpa dev del vduse0; }
del() { qmp block-export-del id=e; }
gone() { ! test -e /dev/vduse/vduse0; }
says() { grep -aq "$@"; }

basic() { # basic PROGRAM FORMAT EXPORT-OPTIONS [MORE...]
    local q=$1 f=$2 t="$1 $2" o=$3; shift 3
    echo "--- $t $o $*"
    image $f 64M
    check "$t: starts" start $q writable=on,num-queues=2,queue-size=64,serial=VD123,$o "$@"
    check "$t: the device is there" test -c /dev/vduse/vduse0
    check "$t: the disk appears" attach || { kill $qp; return; }
    check_says '^67108864$' "$t: its size" blockdev --getsize64 $d
    check_says '^VD123$' "$t: its serial" cat $b/serial
    check_says '^2$' "$t: its queues" sh -c "ls $b/mq | wc -l"
    check_says '^64$' "$t: their size" cat $b/mq/0/nr_tags
    disk_rw "$t" $d
    check "$t: discard" blkdiscard -l 1M $d
    check "$t: random operations" $io random $d $RANDOM 300
    check "$t: resize" qmp block_resize node-name=f size=100663296
    check "$t: the disk grows" wait_for 60 sh -c "blockdev --getsize64 $d | grep -qx 100663296"
    check "$t: write beyond the old end" sh -c "echo end | dd of=$d bs=1M seek=95 conv=sync,fsync status=none"
    check_says ' of 95 MiB' "$t: all of it" sh -c "dd if=$d bs=1M skip=95 count=1 status=none | head -c 3 | grep -q end && echo ' of 95 MiB'"
}
ends() { # ends TEXT
    check "$1: vdpa dev del" detach
    check "$1: safe removal" del
    check "$1: the device is gone" wait_for 5 gone
    check "$1: quit" qmp quit
    wait $qp; check "$1: ends with 0" test $? = 0
}

t_reference() {
    basic reference raw logical-block-size=512
    check "reference: vdpa dev del" detach
    kill $qp; wait $qp; check "reference: ends with 0" test $? = 0
}
t_raw() {
    basic qemu-storage-daemon raw logical-block-size=4096
    check_says 4096 "block size" cat $b/queue/logical_block_size
    check_says 'still in use' "safe removal of a device in use" del
    check_says 'wr_operations|wr-operations' "statistics" qmp query-block-exports
    ends raw
    check "its record is gone" sh -c '! ls /run/qemu-storage-daemon/vduse-*'
}
t_qcow2() {
    basic qemu-storage-daemon qcow2 iothread.0=i,iothread.1=j,writethrough=on \
        --object iothread,id=i --object iothread,id=j,poll-max-ns=32768
    check_says '"refused": \[\]' "the sandbox refused nothing" qmp x-query-sandbox
    ends qcow2
    check "the image is whole" qemu-img check -q $img
}
t_readonly() {
    echo "--- read-only"
    image raw 8M
    dd if=/dev/urandom of=$img bs=1M count=8 conv=notrunc status=none
    check "starts" start qemu-storage-daemon "" && check "the disk appears" attach || return
    check_says '^1$' "it is read-only" blockdev --getro $d
    check "it reads right" cmp $d $img
    check_rc 1 "it cannot be written" dd if=/dev/zero of=$d bs=4k count=1 oflag=direct
    ends read-only
}
t_remove() {
    echo "--- hard removal under a driver, and what is left"
    image raw 16M
    check "starts" start qemu-storage-daemon writable=on && check "the disk appears" attach || return
    check "hard removal" qmp block-export-del id=e mode=hard
    check "it is said that the device stays" wait_for 5 says 'stays on the vDPA bus' /tmp/daemon.log
    check "it stays" test -c /dev/vduse/vduse0
    dd if=$d of=/tmp/waits bs=4k count=1 iflag=direct status=none & local waits=$!
    check_says 'other num-queues' "not with other options" qmp block-export-add \
        type=vduse-blk id=e node-name=f name=vduse0 writable=true num-queues=3
    check "the device is taken up again" qmp block-export-add \
        type=vduse-blk id=e node-name=f name=vduse0 writable=true
    check "a request that waited is done" wait $waits
    mv /run/qemu-storage-daemon/vduse-blk-vduse0 /tmp/record
    kill -9 $qp; wait $qp 2>/dev/null
    check_says 'no record' "not without a record" sh -c "timeout 5 qemu-storage-daemon ${node[*]} \
        --export vduse-blk,id=e,node-name=f,name=vduse0,writable=on"
    check "vdpa dev del" detach
    check "a device that nobody uses is made anew" start qemu-storage-daemon num-queues=2
    check "the disk appears" attach
    check_says '^2$' "with other options" sh -c "ls $b/mq | wc -l"
    ends anew
}
t_vhost() { # vhost_vdpa, by which a virtual machine gets the device, with a driver in a program
    local f n v=/dev/vhost-vdpa-0
    type vdpa-driver >/dev/null 2>&1 || { echo "vhost_vdpa: left out, there is no vdpa-driver"; return; }
    modprobe -r virtio_vdpa && modprobe vhost_vdpa || { echo "vhost_vdpa: left out, this kernel has none"; return; }
    for f in raw qcow2; do
        echo "--- vhost_vdpa, $f"
        image $f 8M
        check "$f: starts" start qemu-storage-daemon writable=on && check "$f: the device is added" \
            vdpa dev add name vduse0 mgmtdev vduse && check "$f: a program gets it" wait_for 60 test -c $v || return
        check_says '^8388608$' "$f: random operations" timeout 120 vdpa-driver $v $RANDOM
        for n in 1 2 3; do # a virtual machine that is killed
            timeout -s KILL 0.$n vdpa-driver $v $RANDOM >/dev/null 2>&1
        done
        check_says '^8388608$' "$f: the next one finds the device reset" timeout 120 vdpa-driver $v $RANDOM
        check "$f: the daemon is alive" qmp query-block-exports
        ends "$f"
        [ $f = raw ] || check "$f: the image is whole" qemu-img check -q $img
    done
    modprobe -r vhost_vdpa; modprobe virtio_vdpa
}
waits() { # how many requests wait
    qmp query-block-exports | grep -q "\"waiting-operations\": $1"
}
t_errors() { # the policy for requests that fail, on a file system that runs full
    echo "--- without space"
    mkdir -p /tmp/small; mount -t tmpfs -o size=4M none /tmp/small
    local policy w
    for policy in enospc stop; do
        rm -f /tmp/small/*; truncate -s 16M /tmp/small/disk; dd if=/dev/zero of=/tmp/small/filler bs=1M count=3 status=none
        node=(--blockdev file,node-name=f,filename=/tmp/small/disk)
        check "$policy: starts" start qemu-storage-daemon writable=on,x-on-error=$policy && check "$policy: the disk appears" attach || return
        dd if=/dev/urandom of=/tmp/data bs=1M count=2 status=none
        dd if=/tmp/data of=$d bs=256k oflag=direct status=none & w=$!
        check "$policy: a write waits" wait_for 60 waits '[1-9]'
        rm /tmp/small/filler
        check "$policy: resume" qmp x-block-export-resume id=e
        wait $w; check "$policy: the writer saw no error" test $? = 0
        check "$policy: none waits" wait_for 60 waits 0
        check "$policy: what was written is there" cmp -n 2097152 /tmp/data $d
        ends "$policy"
    done
    rm -f /tmp/small/*; truncate -s 16M /tmp/small/disk; dd if=/dev/zero of=/tmp/small/filler bs=1M count=3 status=none
    check "report: starts" start qemu-storage-daemon writable=on,x-on-error=report && check "report: the disk appears" attach || return
    check_rc 1 "report: the writer sees the error" dd if=/tmp/data of=$d bs=256k oflag=direct status=none
    ends report
    umount /tmp/small
}
t_kills() { # numbered records with fsync and without, while the daemon is killed, which is no power failure
    local f n
    for f in ${KILL_FORMATS:-raw qcow2}; do
        echo "--- kills, $f"
        : >/tmp/rounds
        image $f 16M
        check "$f: starts" start qemu-storage-daemon writable=on,num-queues=2 && check "$f: the disk appears" attach || return
        rm -f /tmp/stop
        $io records $d /tmp/acks /tmp/stop >>/tmp/rounds & local w=$!
        for n in $(seq ${KILLS:-4}); do
            : >/tmp/rounds
            wait_for 60 test -s /tmp/rounds || no "$f: nothing goes on after kill $n"
            kill -9 $qp; wait $qp 2>/dev/null
            start qemu-storage-daemon writable=on,num-queues=2 || no "$f: the device is not taken up after kill $n"
        done
        : >/tmp/rounds
        check "$f: it goes on" wait_for 60 test -s /tmp/rounds
        : >/tmp/stop
        wait $w; check "$f: the writer saw no error" test $? = 0
        tail -1 /tmp/rounds
        check "$f: acknowledged records are there" $io verify $d /tmp/acks
        kill -9 $qp; wait $qp 2>/dev/null
        start qemu-storage-daemon writable=on,num-queues=2
        check "$f: also in the image" sh -c "qemu-img convert -U -O raw ${img} /tmp/copy && $io verify /tmp/copy /tmp/acks"
        ends "$f after kills"
    done
}

parts=${*:-reference raw qcow2 readonly remove errors vhost kills}
for q in qemu-storage-daemon reference; do type $q >/dev/null 2>&1 && missing $q; done
modprobe -a vduse virtio_vdpa virtio_blk || { echo "skip: this kernel has no VDUSE"; exit 77; }
for part in $parts; do
    [ $part != reference ] || type reference >/dev/null 2>&1 || continue
    t_$part
done
[ $bad = 0 ] || tail -30 /tmp/daemon.log
finish
