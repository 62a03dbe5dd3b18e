#!/usr/bin/python3
"""One QMP command: qmp.py SOCKET NAME [KEY=VALUE...], values as JSON, or words. Prints what it returns, or its error."""
import json, socket, sys


class Qmp:
    def __init__(self, path):
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(60)
        s.connect(path)
        self.f = s.makefile("rw")
        self.f.readline()
        self.command("qmp_capabilities")

    def command(self, name, /, **arguments):
        """What it returns; the error's text."""
        print(json.dumps({"execute": name, "arguments": arguments}), file=self.f, flush=True)
        while "event" in (answer := json.loads(self.f.readline())):
            pass
        return answer.get("return", answer.get("error", {}).get("desc"))

    def pr(self, way, node, action, **arguments):
        return self.command("x-block-pr-" + way, **{"node-name": node, "action": action},
                            **{k.replace("_", "-"): v for k, v in arguments.items()})


def value(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    path, name, *pairs = sys.argv[1:]
    arguments = {k: value(v) for k, v in (pair.split("=", 1) for pair in pairs)}
    print(json.dumps(Qmp(path).command(name, **arguments), sort_keys=True))
