# A file system under load, every file with its checksum.  . /vm/lib/stress.sh, after lib.sh
stress_worker() { # stress_worker FOLDER COMMAND...: writes, checks, renames and removes files of its own while the command succeeds
    local d=$1 i=0 bad=0 k; shift
    mkdir -p $d; cd $d || return 1
    while "$@"; do
        i=$((i + 1))
        head -c $((RANDOM * 40)) /dev/urandom >f$((i % 20)).new || return 1
        sha256sum <f$((i % 20)).new >s$((i % 20)) || return 1
        mv f$((i % 20)).new f$((i % 20))
        [ $((i % 5)) != 0 ] || sync -f .
        [ $((i % 10)) != 0 ] || echo 1 >/proc/sys/vm/drop_caches
        k=$((RANDOM % 20))
        if [ -f f$k ] && [ "$(sha256sum <f$k)" != "$(cat s$k)" ]; then echo "${d##*/}: f$k differs"; bad=1; fi
        [ $((i % 17)) != 0 ] || rm -f f$(((i + 3) % 20)) s$(((i + 3) % 20))
    done
    echo "${d##*/}: $i files"
    return $bad
}
stress() { # stress FOLDER COMMAND...: three workers while the command succeeds, then all again, read from the disk
    local d=$1 n pids=; shift
    for n in a b c; do stress_worker $d/$n "$@" & pids="$pids $!"; done
    for n in $pids; do check "worker" wait $n; done
    check "no errors of the disk" sh -c "! dmesg | grep -iE 'I/O error|blk_update|EXT4-fs error|timed out'"
    sync; echo 3 >/proc/sys/vm/drop_caches
    check "every file has its checksum, read from the disk" stress_all $d
}
stress_all() { # stress_all FOLDER
    local f n=0
    for f in $1/*/f*; do
        [ -f "$f" ] && [ "$f" = "${f%.new}" ] || continue
        [ "$(sha256sum <$f)" = "$(cat "${f%/*}/s${f##*/f}")" ] || { echo "$f"; return 1; }
        n=$((n + 1))
    done
    [ $n -gt 0 ]
}
