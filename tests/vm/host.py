"""For the host's side of tests with a VM: a daemon with its monitor, a VM in the background, images.

A host's script makes one Host and uses it in a `with`; what it started ends with it, its files are removed. check() prints
`ok` lines as the guests' scripts do, and finish() gives the script's status.
"""
import json, os, shutil, signal, socket, subprocess, sys, tempfile, threading, time

HERE = os.path.dirname(os.path.realpath(__file__))


class Failed(Exception):
    """A command of a monitor that was refused."""


class Qmp:
    """A monitor's client, of the daemon or of QEMU."""
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(120)
        self.socket.connect(path)
        self.lines = self.socket.makefile("r")
        self.events = []
        json.loads(self.lines.readline())
        self("qmp_capabilities")

    def _read(self):
        line = self.lines.readline()
        if not line:
            raise Failed("the monitor is gone")
        return json.loads(line)

    def __call__(self, command, **arguments):
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._read()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise Failed("%s: %s" % (command, answer["error"]["desc"]))
            self.events.append(answer)

    def event(self, name, **data):
        """Waits for an event with these members."""
        def fits(event):
            return event["event"] == name and all(event.get("data", {}).get(k) == v for k, v in data.items())
        while True:
            for i, event in enumerate(self.events):
                if fits(event):
                    return self.events.pop(i).get("data", {})
            self.events.append(self._read())


class Vm:
    """A VM that `run` drives, its output relayed and looked at."""
    def __init__(self, host, arguments, name, quiet):
        self.errors = host.path(name + ".err")
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen([HERE + "/run", *arguments], stdout=subprocess.PIPE, stderr=errors, text=True)
        self.quiet = quiet
        self.seen, self.news = [], threading.Condition()
        self.over = False
        self.thread = threading.Thread(target=self._relay, daemon=True)
        self.thread.start()

    def _relay(self):
        for line in self.process.stdout:
            if not (self.quiet and line.startswith(self.quiet)):
                sys.stdout.write(line)
                sys.stdout.flush()
            with self.news:
                self.seen.append(line.rstrip("\n"))
                self.news.notify_all()
        with self.news:
            self.over = True
            self.news.notify_all()

    def wait_line(self, start, seconds=300):
        """Waits for a line that starts so; false if the VM ends without."""
        def there():
            return any(line.startswith(start) for line in self.seen)
        with self.news:
            self.news.wait_for(lambda: self.over or there(), seconds)
            return there()

    def lines(self):
        with self.news:
            return list(self.seen)

    def wait(self, told=False):
        """Waits for its end, and shows its console if it was not told to end and is not content."""
        status = self.process.wait()
        self.thread.join()
        if status and not told:
            sys.stdout.write(open(self.errors, errors="replace").read())
        return status


class Host:
    def __init__(self, daemon):
        self.program = shutil.which(daemon) or sys.exit("no " + daemon)
        self.daemons, self.vms, self.bad = [], [], 0

    def __enter__(self):
        self.dir = tempfile.mkdtemp(prefix="vm-host.")
        return self

    def __exit__(self, *_):
        for vm in self.vms:
            if vm.process.poll() is None:
                vm.process.send_signal(signal.SIGINT)   # it ends its QEMU
                vm.process.wait()
        for process in self.daemons:
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(self.dir)

    def path(self, name):
        return os.path.join(self.dir, name)

    def image(self, name, size=None, fmt="qcow2", backing=None):
        path = self.path(name)
        more = ["-b", backing, "-F", "raw"] if backing else []
        subprocess.run(["qemu-img", "create", "-q", "-f", fmt, *more, path, *([size] if size else [])], check=True)
        return path

    def daemon(self, *arguments, name="qsd", patience=10):
        """Starts a daemon with a monitor; tried again while the image of one that was killed is not free."""
        end = time.monotonic() + patience
        while True:
            pid, log = self.path(name + ".pid"), self.path(name + ".log")
            if os.path.exists(pid):
                os.unlink(pid)
            with open(log, "ab") as to:
                process = subprocess.Popen(
                    [self.program, "--chardev", "socket,id=c,server=on,wait=off,path=" + self.path(name + ".qmp"),
                     "--monitor", "c", "--pidfile", pid, *arguments], stderr=to)
            while process.poll() is None and not (os.path.exists(pid) and os.path.getsize(pid)):
                time.sleep(0.01)
            if process.poll() is None:
                self.daemons.append(process)
                return process
            if time.monotonic() > end:
                sys.exit("the daemon does not start:\n" + open(log).read())

    def qmp(self, name="qsd"):
        return Qmp(self.path(name + ".qmp"))

    def vm(self, *arguments, name="vm", quiet=None):
        """A VM; lines that start with `quiet` are kept and not shown."""
        vm = Vm(self, arguments, name, quiet)
        self.vms.append(vm)
        return vm

    def stop(self, process, name="qsd"):
        """Ends a daemon as a service manager does, and shows what it said."""
        process.terminate()
        self.check("the daemon ends on SIGTERM", process.wait() == 0)
        said = open(self.path(name + ".log")).read()
        if said:
            print("the daemon said:\n" + said, end="")

    def check(self, text, good):
        print(("ok   " if good else "FAIL ") + text, flush=True)
        self.bad += not good
        return good

    def sound(self, image, fmt="qcow2", leaks=False):
        """The image is sound; clusters may be leaked if its daemon was killed."""
        p = subprocess.run(["qemu-img", "check", "-f", fmt, image], capture_output=True, text=True)
        good = p.returncode == 0 or leaks and p.returncode == 3
        self.check("qemu-img check " + os.path.basename(image), good) or print(p.stdout + p.stderr)

    def file_system(self, image, fmt="qcow2", offset=1 << 20):
        """The ext4 in the image's first partition is sound, once its journal is replayed."""
        raw = self.path("fsck.raw")
        subprocess.run(["qemu-img", "convert", *(["-f", fmt] if fmt else []), "-O", "raw", image, raw], check=True)
        disk = "%s?offset=%d" % (raw, offset)
        subprocess.run(["/sbin/e2fsck", "-fp", disk], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        p = subprocess.run(["/sbin/e2fsck", "-fn", disk], capture_output=True, text=True)
        os.unlink(raw)
        self.check("fsck of the guest's file system, on the host", p.returncode == 0) or print(p.stdout + p.stderr)

    def finish(self):
        print("%d failed on the host" % self.bad)
        sys.exit(1 if self.bad else 0)


def shared_memory(size="1G"):
    """QEMU's arguments for memory that a back-end can map."""
    return "-object memory-backend-memfd,id=mem,size=%s,share=on -machine memory-backend=mem" % size


def vhost_disk(socket_path, more=""):
    """QEMU's arguments for a disk that a vhost-user-blk export is, as the one that the firmware boots from. RINGS=packed: with
    packed rings, which the firmware has not."""
    packed = ",packed=on" if os.environ.get("RINGS") == "packed" else ""
    return ("-chardev socket,id=v,path=%s,reconnect-ms=100 -device vhost-user-blk-pci,chardev=v,num-queues=2,bootindex=1%s"
            % (socket_path, packed)) + more
