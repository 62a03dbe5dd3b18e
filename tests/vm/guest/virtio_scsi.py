#!/usr/bin/python3
"""A driver of QEMU's virtio-scsi without a guest: registers and memory through qtest, on the microvm machine.

What a guest's kernel would do for one SCSI command at a time; so a real QEMU's SCSI disks can be asked where booting a
guest takes too long. [virtio 1.2 §4.2 MMIO, §5.6 SCSI host device]
"""
import os, socket, struct, subprocess, time
from pr_client import *

DESC, AVAIL, USED, BUF = 0x10000, 0x11000, 0x12000, 0x20000
SIZE = 8


class Guest:
    """A QEMU with the SCSI disk `device`, whose reservations go to the helper at `helper`; `run` goes in front of it."""
    def __init__(self, device, helper, run=(), **more):
        path = "/tmp/qt"
        self.qemu = subprocess.Popen([
            *run, "qemu-system-x86_64", "-M", "microvm", "-S", "-m", "64", "-nodefaults", "-no-user-config",
            "-display", "none", "-global", "virtio-mmio.force-legacy=false",
            "-qtest", "unix:%s,server=on,wait=off" % path, "-qtest-log", "none",
            "-object", "pr-manager-helper,id=pr0,path=" + helper, "-device", "virtio-scsi-device",
            "-blockdev", "driver=raw,node-name=d,file.driver=host_device,file.filename=%s,file.pr-manager=pr0" % device,
            "-device", "scsi-block,drive=d"], **more)
        while True:
            try:
                self.disk = VirtioScsi(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):     # not there, or not yet listening
                assert self.qemu.poll() is None
                time.sleep(.1)
        self.inquiry = self.disk.command(b"\x12\0\0\0\x24\0", size=36)
        while self.disk.command(bytes(6))[0] == CHECK:  # power-on attentions of QEMU and of the disk
            pass

    def pr_in(self, action, length=8192):
        return self.disk.command(cdb_in(action, length)[:10], size=length)

    def pr_out(self, action, key=0, new=0, typ=0, data=None):
        data = param(key, new) if data is None else data
        return self.disk.command(cdb_out(action, typ, len(data))[:10], out=data)

    def keys(self):
        status, sense, data = self.pr_in(KEYS)
        size = struct.unpack(">I", data[4:8])[0] if status == GOOD else 0
        return [k for (k,) in struct.iter_unpack(">Q", data[8:8 + size])] if status == GOOD else (status, sense_key(sense))


class VirtioScsi:
    def __init__(self, path):
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(60)
        s.connect(path)
        self.f = s.makefile("rw", buffering=1)
        self.base = next(b for b in range(0xFEB00000, 0xFEB00000 + 24 * 0x200, 0x200) if self.reg(8, b) == 8)
        self.avail = 0
        for status in (0, 1, 3):
            self.set(0x70, status)
        for select, bits in ((0, 0), (1, 1)):   # VIRTIO_F_VERSION_1 alone
            self.set(0x24, select)
            self.set(0x20, bits)
        self.set(0x70, 11)
        assert self.reg(0x70) == 11
        self.set(0x30, 2)                       # the first request queue
        self.set(0x38, SIZE)
        for reg, addr in ((0x80, DESC), (0x90, AVAIL), (0xA0, USED)):
            self.set(reg, addr)
            self.set(reg + 4, 0)
        self.set(0x44, 1)
        self.set(0x70, 15)

    def cmd(self, text):
        self.f.write(text + "\n")
        while True:
            line = self.f.readline()
            if not line:
                raise EOFError
            if not line.startswith("IRQ"):
                assert line.startswith("OK"), line
                return line.split()[1:]

    def reg(self, off, base=None):
        return int(self.cmd("readl %#x" % ((base or self.base) + off))[0], 16)

    def set(self, off, value):
        self.cmd("writel %#x %#x" % (self.base + off, value))

    def write(self, addr, data):
        if data:
            self.cmd("write %#x %#x 0x%s" % (addr, len(data), data.hex()))

    def read(self, addr, size):
        return bytes.fromhex(self.cmd("read %#x %#x" % (addr, size))[0][2:])

    def command(self, cdb, out=b"", size=0):
        """(status, sense, data) of a command for target 0, unit 0."""
        request = struct.pack("<8sQBBB32s", bytes([1, 0, 0x40, 0]), 1, 0, 0, 0, cdb)
        at_response, at_data = BUF + 0x1000, BUF + 0x2000
        chain = [(BUF, len(request), 0)]
        self.write(BUF, request)
        if out:
            self.write(at_data, out)
            chain.append((at_data, len(out), 0))
        chain.append((at_response, 108, 2))
        if size:
            chain.append((at_data, size, 2))
        for i, (addr, length, flags) in enumerate(chain):
            more = i + 1 < len(chain)
            self.write(DESC + 16 * i, struct.pack("<QIHH", addr, length, flags | more, i + 1 if more else 0))
        self.write(AVAIL + 4 + 2 * (self.avail % SIZE), struct.pack("<H", 0))
        self.avail += 1
        self.write(AVAIL + 2, struct.pack("<H", self.avail & 0xFFFF))
        self.set(0x50, 2)
        end = time.time() + 60
        while struct.unpack("<H", self.read(USED + 2, 2))[0] != self.avail & 0xFFFF:
            assert time.time() < end, "no answer"
            time.sleep(.01)
        sense_len, residual, _, status, response = struct.unpack("<IIHBB", self.read(at_response, 12))
        assert response == 0, response
        sense = self.read(at_response + 12, sense_len) if sense_len else b""
        return status, sense, self.read(at_data, size - residual) if size > residual else b""
