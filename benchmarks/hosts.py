"""Several machines on one: a network namespace, a small disk and a command each, joined by a bridge; for chaos.py.

Needs Linux and root, and says what else it lacks: `tc` to slow lines, `iptables` for firewalls and loss, the right to
mount for disks. The bridge has a namespace of its own, too, so that nothing of this machine's network is touched.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from wardround.processes import environment

RATE = "20mbit"
AGAIN = 3.0  # seconds until what ended by itself is started again


class Lost(Exception):  # noqa: N818  # what the walk is for
    """The walk cannot go on, or something is not as it would be without faults."""


@dataclass
class Host:
    """A machine of the federation: a namespace, a disk, and one command that is kept running."""

    name: str
    space: str
    address: str
    folder: Path
    log: Path
    command: list[str] = field(default_factory=list)
    process: "subprocess.Popen[bytes] | None" = None
    start_at: float = 0.0  # monotonic
    ended: list[str] = field(default_factory=list)  # last words of what ended by itself

    def tend(self) -> None:
        """Start the command where it does not run and its time has come."""
        if self.process is not None and self.process.poll():
            self.ended.append(self.log.read_text(errors="replace").strip().rpartition("\n")[2][:300])
            self.process, self.start_at = None, time.monotonic() + AGAIN
        if self.process is None and time.monotonic() >= self.start_at:
            env = environment(self.folder) | {
                "OMP_NUM_THREADS": "1",
                "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/ml.db",
            }
            inside = ["ip", "netns", "exec", self.space, *self.command]
            with self.log.open("ab") as out:
                self.process = subprocess.Popen(inside, env=env, stdout=out, stderr=out, start_new_session=True)

    def kill(self, pause: float) -> None:
        """Kill the command alone: its children are Linux's to end."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process, self.start_at = None, time.monotonic() + pause

    def kill_below(self, program: str) -> bool:
        """Kill the command's child of a name; return whether there was one."""
        for pid in run("ip", "netns", "pids", self.space).split():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(int(pid))
                if any(word.endswith(program) for word in process.cmdline()):
                    process.kill()
                    return True
        return False

    def link(self, state: str) -> None:
        """Take the line down, or up."""
        run("ip", "-n", self.space, "link", "set", "eth0", state)

    def sent(self) -> int:
        """Return the bytes that went out since the start."""
        found = json.loads(run("ip", "-n", self.space, "-s", "-j", "link", "show", "eth0"))
        return int(found[0]["stats64"]["tx"]["bytes"])


def cannot() -> str:
    """Return why this machine cannot be a network of several, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        return "network namespaces need Linux, root and iproute2"
    probe = f"chaos-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    run("ip", "netns", "del", probe)
    return ""


@contextlib.contextmanager
def host(home: Path, number: int, name: str) -> Iterator[Host]:
    """Give a host with a disk of its own, where that can be mounted; all that runs in it ends on leaving."""
    folder = home / name
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={'1g' if number == 0 else '256m'}", "none", folder], check=False
    ).returncode
    made = Host(name, f"chaos-{os.getpid()}-{name}", f"10.77.0.{number + 1}", folder, home / f"{name}.log")
    try:
        run("ip", "netns", "add", made.space)
        yield made
    finally:
        if made.process is not None:
            made.process.kill()
        for pid in run("ip", "netns", "pids", made.space).split():
            with contextlib.suppress(psutil.Error):
                psutil.Process(int(pid)).kill()
        run("ip", "netns", "del", made.space)
        if mounted:
            time.sleep(0.5)
            run("umount", "-l", folder)


@contextlib.contextmanager
def network(hosts: list[Host]) -> Iterator[dict[str, str]]:
    """Join the hosts by a bridge in a namespace of its own; give what this machine cannot do, and why."""
    switch = f"chaos-{os.getpid()}-switch"
    run("ip", "netns", "add", switch)
    try:
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, each in enumerate(hosts):
            port = f"port{number}"
            peer = ["type", "veth", "peer", "name", port, "netns", switch]
            run("ip", "-n", each.space, "link", "add", "eth0", *peer)
            run("ip", "-n", each.space, "address", "add", f"{each.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", each.space, "link", "set", device, "up")
            run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        yield harden(hosts, switch)
    finally:
        run("ip", "netns", "del", switch)


def harden(hosts: list[Host], switch: str) -> dict[str, str]:
    """Slow the sites' lines and close them to whatever calls in; return what cannot be done here, and why."""
    missing = {}
    if not shutil.which("tc"):
        missing["rate"] = "there is no tc"
    if not shutil.which("iptables"):
        missing["loss"] = missing["firewall"] = "there is no iptables"
    if not hosts[0].folder.is_mount():
        missing["server disk"] = missing["site disk"] = "tmpfs may not be mounted here"
    for number, site in enumerate(hosts):
        if number and "rate" not in missing:
            for space, device in ((site.space, "eth0"), (switch, f"port{number}")):
                shaped = ["root", "tbf", "rate", RATE, "burst", "32kbit", "latency", "400ms"]
                run("ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", device, *shaped)
        if number and "firewall" not in missing:
            for rule in ("-A INPUT -i lo -j ACCEPT", "-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
                         "-P INPUT DROP", "-P FORWARD DROP"):  # fmt: skip
                run("ip", "netns", "exec", site.space, "iptables", *rule.split())
    for what, why in missing.items():
        print(f"without {what}: {why}")
    return missing


def run(*command: str | Path | int) -> str:
    """Return what a command prints. Raises Lost where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Lost(f"{' '.join(map(str, command))}: {done.stderr.strip()[-2000:]}")
    return done.stdout
