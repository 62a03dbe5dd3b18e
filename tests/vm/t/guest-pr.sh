#!/bin/bash
# sg_persist inside a guest that a real QEMU boots: a Linux kernel on a scsi-block disk whose reservations go through
# pr-manager-helper to the helper. The second nexus, outside of the guest, is the judge, and acts itself.
# run -m 3G -t 1200 -b HELPER:qemu-pr-helper -b /usr/bin/qemu-system-x86_64 -f /usr/share/qemu:/usr/share/qemu \
#     -f /usr/share/seabios:/usr/share/seabios -f KERNEL:/vm/vmlinux t/guest-pr.sh
. /vm/lib/lib.sh
lio_init; lio_disk d0 64
a=$(lio_path 1 d0) b=$(lio_path 2 d0)
install -d -o nobody -g nogroup /tmp/pr
qemu-pr-helper -k /tmp/pr/s -u nobody -g nogroup & h=$!
wait_for 60 test -S /tmp/pr/s || die "it does not start"

# The guest: an initramfs of busybox, sg_persist and four modules.
r=/tmp/guest; mkdir -p $r/bin $r/dev $r/proc $r/sys $r/modules
cp "$(command -v busybox)" "$(command -v sg_persist)" $r/bin
for f in $(ldd "$(command -v sg_persist)" | grep -o '/[^ ]*'); do mkdir -p "$r${f%/*}"; cp "$f" "$r$f"; done
for m in scsi_common scsi_mod sd_mod virtio_scsi; do
    cp "$(modinfo -n $m)" $r/modules
done
cat >$r/init <<'G'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
cd /modules
for m in scsi_common scsi_mod sd_mod virtio_scsi; do insmod $m.ko; done
until [ -b /dev/sda ]; do usleep 100000; done
stty -echo
echo "ready after $(cut -d' ' -f1 /proc/uptime)"
while read -r line; do
    eval "$line" 2>&1
    echo "status $?"
done
G
chmod 755 $r/init
(cd $r && find . | busybox cpio -o -H newc 2>/dev/null) >/tmp/guest.cpio
qemu-system-x86_64 -M pc -accel tcg -cpu qemu64 -m 128 -nodefaults -no-user-config -display none \
    -no-reboot -chardev socket,id=c,path=/tmp/console,server=on,wait=off -serial chardev:c \
    -kernel /vm/vmlinux -initrd /tmp/guest.cpio -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr \
cryptomgr.notests audit=0 apparmor=0 selinux=0 random.trust_cpu=on no_timer_check tsc=reliable" \
    -object pr-manager-helper,id=pr0,path=/tmp/pr/s \
    -blockdev driver=raw,node-name=d,file.driver=host_device,file.filename=$a,file.pr-manager=pr0 \
    -device virtio-scsi-pci -device scsi-block,drive=d & q=$!
cat >/tmp/guest.py <<'P'
import re, socket, subprocess, sys, time
b, bad = sys.argv[1], 0
def note(text, good, got):
    global bad
    bad += not good
    print("ok  " if good else "FAIL", text, "" if good else got, flush=True)

class Console:
    """A shell in the guest: a line in, its output and its status out."""
    def __init__(self, path):
        while True:
            try:
                self.s = socket.socket(socket.AF_UNIX)
                self.s.connect(path)
                break
            except OSError:
                time.sleep(.1)
        self.s.settimeout(900)
        self.text = ""
    def until(self, pattern):
        while not (found := re.search(pattern, self.text)):
            data = self.s.recv(4096)
            if not data:
                sys.exit("the guest ended: " + self.text[-2000:])
            self.text += data.decode(errors="replace")
        before, self.text = self.text[:found.end()], self.text[found.end():]
        return before, found
    def run(self, line):
        self.s.sendall(line.encode() + b"\n")
        text, found = self.until(r"(?m)^status (\d+)\r?\n")
        return int(found[1]), text

def outside(line):
    p = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    return p.returncode, p.stdout + p.stderr
begun = time.time()
guest = Console("/tmp/console")
_, ready = guest.until(r"ready after ([\d.]+)\r?\n")
print("     the guest is up after %.0f s (%s of its own)" % (time.time() - begun, ready[1]), flush=True)
def inside(line):
    return guest.run(line)
def expect(text, where, line, status, pattern=""):
    got = where(line)
    note(text, got[0] == status and re.search(pattern, got[1]), got)
p = "sg_persist -n "
write = "dd if=/dev/zero of=%s bs=4096 count=1 conv=notrunc%s 2>&1"
expect("guest: capabilities", inside, p + "-c /dev/sda", 0, "Exclusive Access, all registrants: 1")
expect("guest: no keys", inside, p + "-k /dev/sda", 0, "NO registered")
expect("guest: register", inside, p + "-o -G -S 0xa1 /dev/sda", 0)
expect("outside: its key", outside, p + "-k " + b, 0, "0xa1")
expect("outside: register", outside, p + "-o -G -S 0xb2 " + b, 0)
expect("guest: both keys", inside, p + "-k /dev/sda", 0, "(?s)0xa1.*0xb2")
expect("guest: reserve, write exclusive", inside, p + "-o -R -K 0xa1 -T 1 /dev/sda", 0)
expect("outside: the reservation", outside, p + "-r " + b, 0, "(?s)0xa1.*type: Write Exclusive\n")
expect("outside: write refused", outside, write % (b, " oflag=direct"), 1)
expect("guest: write goes", inside, write % ("/dev/sda", ",fsync"), 0)
expect("outside: reserve: conflict", outside, p + "-o -R -K 0xb2 -T 1 " + b, 24)
expect("guest: wrong key: conflict", inside, p + "-o -L -K 0xdead -T 1 /dev/sda", 24)
expect("guest: full status", inside, p + "-s /dev/sda", 0, "(?s)0xa1.*0xb2")
expect("guest: release", inside, p + "-o -L -K 0xa1 -T 1 /dev/sda", 0)
expect("outside: reserve, write exclusive", outside, p + "-o -R -K 0xb2 -T 1 " + b, 0)
expect("guest: write refused", inside, write % ("/dev/sda", ",fsync"), 1)
expect("guest: preempt", inside, p + "-o -P -K 0xa1 -S 0xb2 -T 1 /dev/sda", 0)
expect("outside: unit attention", outside, "sg_turs -v " + b, 6, "Registrations preempted|preempted")
expect("outside: its key is gone", outside, p + "-o -R -K 0xb2 -T 1 " + b, 24)
expect("guest: clear", inside, p + "-o -C -K 0xa1 /dev/sda", 0)
expect("outside: nothing is left", outside, p + "-k " + b, 0, "NO registered")
print("%d failed" % bad)
sys.exit(bad != 0)
P
timeout 1000 python3 /tmp/guest.py "$b"
check "sg_persist in the guest" test $? = 0
kill $q; wait $q
kill $h; wait $h; check "ends with 0" test $? = 0
finish
