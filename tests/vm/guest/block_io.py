#!/usr/bin/env python3
"""Uses a block device hard. All reads and writes are direct.

random DEVICE SEED COUNT    random writes, zeroing, discards and reads, checked against a copy in memory
records DEVICE ACKS STOP [BLOCK]  eight threads write numbered records, every other thread with fsync, until there is a file STOP;
                            prints a line now and then, and at the end the last number of each place as JSON into ACKS
verify DEVICE ACKS [BLOCK]  each place has a whole record, not older than the one that was acknowledged
"""
import fcntl, json, mmap, os, random, struct, sys, threading, zlib

BLKDISCARD, BLKZEROOUT, BLKGETSIZE64 = 0x1277, 0x127f, 0x80081272
THREADS, PLACES = 8, 16


def size_of(fd):
    return struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, b"\0" * 8))[0]


def buffer(data=b"", size=0):
    m = mmap.mmap(-1, max(len(data), size))
    m[:len(data)] = data
    return m


def random_io(dev, seed, count):
    rng, fd = random.Random(int(seed)), os.open(dev, os.O_RDWR | os.O_DIRECT)
    block = int(open("/sys/block/%s/queue/logical_block_size" % os.path.basename(dev)).read())
    size = min(size_of(fd), 24 << 20) // 4096 * 4096
    model = bytearray(size)
    fcntl.ioctl(fd, BLKZEROOUT, struct.pack("QQ", 0, size))
    for turn in range(int(count)):
        length = min(block * rng.randrange(1, rng.choice((2, 16, 512)) * 4096 // block), 1 << 20)
        at = rng.randrange(0, (size - length) // block) * block
        what = rng.random()
        if what < 0.5:
            data = rng.randbytes(64) * (length // 64)
            model[at:at + length] = data
            assert os.pwrite(fd, buffer(data), at) == length
        elif what < 0.6:
            fcntl.ioctl(fd, BLKZEROOUT, struct.pack("QQ", at, length))
            model[at:at + length] = bytes(length)
        elif what < 0.65:
            fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", at, length))
            m = buffer(size=length)     # what a discarded block holds is the device's choice
            assert os.preadv(fd, [m], at) == length
            model[at:at + length] = m[:length]
        elif what < 0.7:
            os.fsync(fd)
        else:
            m = buffer(size=length)
            assert os.preadv(fd, [m], at) == length
            assert m[:length] == model[at:at + length], "turn %d: %d bytes at %d differ" % (turn, length, at)
    m = buffer(size=size)
    for at in range(0, size, 1 << 20):
        n = os.preadv(fd, [memoryview(m)[at:at + (1 << 20)]], at)
        assert m[at:at + n] == model[at:at + n], "differs in the MiB at %d" % at
    print("%s random operations agree with the model" % count)


def record(place, number, block):
    body = struct.pack("<QQ", place, number) + random.Random(place * 1000003 + number).randbytes(64) * 8
    body = body.ljust(block - 4, b"\x5a")
    return body + struct.pack("<I", zlib.crc32(body))


def records(dev, acks, stop, block=4096):
    block = int(block)
    acked, errors = [0] * (THREADS * PLACES), []

    def write(thread):
        fd, turn = os.open(dev, os.O_RDWR | os.O_DIRECT), 0
        try:
            while not os.path.exists(stop):
                place = thread * PLACES + turn % PLACES
                number = acked[place] + 1
                assert os.pwrite(fd, buffer(record(place, number, block)), place * block) == block
                if thread % 2 == 0:
                    os.fsync(fd)
                acked[place] = number
                turn += 1
                if turn % 20 == 0:
                    print("thread %d: %d" % (thread, turn), flush=True)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(THREADS)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    json.dump(acked, open(acks, "w"))
    if errors:
        sys.exit("a thread failed: %r" % errors[0])
    print("%d records acknowledged" % sum(acked))


def verify(dev, acks, block=4096):
    block, acked, fd = int(block), json.load(open(acks)), os.open(dev, os.O_RDONLY)
    assert sum(acked) > 0
    for place, number in enumerate(acked):
        data = os.pread(fd, block, place * block)
        if number == 0 and not any(data):
            continue
        found = struct.unpack_from("<QQ", data)
        assert found[0] == place and data == record(place, found[1], block), "place %d: torn" % place
        assert found[1] >= number, "place %d: acknowledged %d, found %d" % (place, number, found[1])
    print("%d acknowledged records are there" % sum(acked))


if __name__ == "__main__":
    {"random": random_io, "records": records, "verify": verify}[sys.argv[1]](*sys.argv[2:])
