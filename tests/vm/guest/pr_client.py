#!/usr/bin/python3
"""Client of the qemu-pr-helper protocol: a module, and a small command.

DEVICE may be fd:N, a descriptor that is open already.
pr_client.py SOCKET DEVICE list|keys|reservation|capabilities|status
pr_client.py SOCKET DEVICE register|reserve|release|clear|preempt|abort|ignore [KEY [NEWKEY [TYPE]]]
"""
import array, os, socket, struct, sys, time

IN, OUT = 0x5E, 0x5F
KEYS, RESERVATION, CAPABILITIES, STATUS = range(4)
REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, ABORT, IGNORE, MOVE = range(8)
GOOD, CHECK, CONFLICT = 0, 2, 0x18


def cdb_in(action, length):
    return struct.pack(">BB5xHB6x", IN, action, length, 0)


def cdb_out(action, typ, length):
    return struct.pack(">BBB2xIB6x", OUT, action, typ, length, 0)


def param(key=0, new=0, flags=0, more=b""):
    return struct.pack(">QQ4xBxxx", key, new, flags) + more


class Client:
    def __init__(self, path, features=0):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(20)
        while True:
            try:
                self.s.connect(path)
                break
            except BlockingIOError:     # X11: the reference has a backlog of one connection
                time.sleep(.01)
        self.offered = self.read(4)
        if features is not None:
            self.s.sendall(struct.pack(">I", features))

    def read(self, n):
        data = b""
        while len(data) < n:
            part = self.s.recv(n - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def send(self, data, *fds):
        self.s.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])

    def reply(self):
        status, size, sense = struct.unpack(">II96s", self.read(104))
        return status, sense, self.read(size)

    def closed(self):
        """Has the helper closed this connection (without answering)?"""
        try:
            return self.s.recv(1) == b""
        except ConnectionResetError:
            return True

    def pr_in(self, fd, action, length=8192):
        self.send(cdb_in(action, length), fd)
        return self.reply()

    def pr_out(self, fd, action, key=0, new=0, typ=0, flags=0, data=None):
        data = param(key, new, flags) if data is None else data
        self.send(cdb_out(action, typ, len(data)), fd)
        self.send(data)
        return self.reply()

    def keys(self, fd):
        status, _, data = self.pr_in(fd, KEYS)
        assert status == GOOD, status
        n = struct.unpack(">I", data[4:8])[0]
        return sorted(struct.unpack(">%dQ" % (n // 8), data[8:8 + n]))


class Frames(Client):
    """The frames protocol: bincode with fixed-size little-endian integers, answers matched by id."""
    COMMANDS = ("keys reservation capabilities status register ignore reserve release clear preempt move replace").split()
    KINDS = {1: 0, 3: 1, 5: 2, 6: 3, 7: 4, 8: 5}    # SCSI type -> variant

    def __init__(self, path):
        super().__init__(path, 1 << 30)
        self.frame(struct.pack("<HH", 1, 1))
        self.version, self.max_in_flight = struct.unpack("<HH", self.take())
        self.id = 0

    def frame(self, body, *fds):
        self.send(struct.pack("<I", len(body)) + body, *fds)

    def take(self):
        return self.read(struct.unpack("<I", self.read(4))[0])

    def ask(self, fd, what, body=b""):
        self.id += 1
        self.frame(struct.pack("<QI", self.id, self.COMMANDS.index(what)) + body, fd)
        return self.id

    def answer(self):
        """(id, None, body of the data) or (id, (status, sense), None)"""
        m = self.take()
        ident, err = struct.unpack_from("<QI", m)
        if err:
            status, n = struct.unpack_from("<BQ", m, 12)
            return ident, (status, m[21:21 + n]), None
        return ident, None, m[12:]

    def do(self, fd, what, body=b""):
        self.ask(fd, what, body)
        return self.answer()[1:]

    def register(self, fd, key, new, persist=False):
        return self.do(fd, "register", struct.pack("<QQ??Q", key, new, persist, False, 0))

    def reserve(self, fd, key, typ):
        return self.do(fd, "reserve", struct.pack("<QI", key, self.KINDS[typ]))

    def release(self, fd, key, typ):
        return self.do(fd, "release", struct.pack("<QI", key, self.KINDS[typ]))

    def clear(self, fd, key):
        return self.do(fd, "clear", struct.pack("<Q", key))

    def preempt(self, fd, key, victim, typ, abort=False):
        return self.do(fd, "preempt", struct.pack("<QQI?", key, victim, self.KINDS[typ], abort))

    def list_keys(self, fd):
        err, m = self.do(fd, "keys")
        assert err is None and struct.unpack_from("<I", m)[0] == 1, (err, m)
        n = struct.unpack_from("<Q", m, 8)[0]
        return sorted(struct.unpack_from("<%dQ" % n, m, 16))


def sense_key(sense):
    """(key, code, qualifier) of fixed or descriptor sense data."""
    if sense[0] & 0x7F in (0x72, 0x73):
        return sense[1] & 15, sense[2], sense[3]
    return sense[2] & 15, sense[12], sense[13]


def main(path, dev, what, *nums):
    fd = int(dev[3:]) if dev.startswith("fd:") else os.open(dev, os.O_RDWR)
    c = Client(path)
    ins = "keys reservation capabilities status".split()
    outs = "register reserve release clear preempt abort ignore move".split()
    key, new, typ = ([int(n, 0) for n in nums] + [0, 0, 0])[:3]
    if what == "list":
        print("keys", *map(hex, c.keys(fd)))
        return 0
    if what in ins:
        status, sense, data = c.pr_in(fd, ins.index(what))
    else:
        status, sense, data = c.pr_out(fd, outs.index(what), key, new, typ)
    print("status %#x sense %x/%02x/%02x data %s" % (status, *sense_key(sense), data.rstrip(b"\0").hex()))
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except (EOFError, OSError) as e:
        sys.exit("pr_client: %r" % e)
