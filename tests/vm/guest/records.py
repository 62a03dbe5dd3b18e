#!/usr/bin/env python3
"""records.py TARGET DISK SIZE [FIRST]: writes numbered records with checksums to TARGET, one after the other, each with fsync, and says
`acked N` when N is on stable storage, until the disk DISK has SIZE bytes, which the host makes it have. Ends with `records N`.

As a module: record(n) is what record n is; wrong(file, first, count) is the first record that is not what it was.
"""
import errno, hashlib, os, sys

LEN = 4096


def record(number):
    seed = hashlib.sha256(b"%d" % number).digest()
    return (b"record %20d " % number + seed * (LEN // len(seed)))[:LEN]


def wrong(file, first, count):
    for number in range(first, first + count):
        file.seek(number * LEN)
        if file.read(LEN) != record(number):
            return number
    return None


def main():
    target, disk, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    number = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    fd = os.open(target, os.O_RDWR | os.O_CREAT)
    while int(open("/sys/block/%s/size" % disk).read()) * 512 < size:
        try:
            assert os.pwrite(fd, record(number), number * LEN) == LEN
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            break   # the end of the disk
        os.fsync(fd) if number % 2 else os.fdatasync(fd)
        print("acked %d" % number, flush=True)
        number += 1
    os.close(fd)
    with open("/proc/sys/vm/drop_caches", "w") as drop:
        drop.write("3")
    with open(target, "rb") as file:
        bad = wrong(file, 0, number)
    print("records %d" % number if bad is None else "record %d is wrong" % bad, flush=True)
    return bad is not None


if __name__ == "__main__":
    sys.exit(main())
