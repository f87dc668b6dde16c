"""A federation on a real network that is broken again and again: what was injected, and what was lost.

    python benchmarks/chaos.py [--rounds 20] [--seed 1] [--sites 3] [--short] [--out FILE.json]

Each site and the coordinator have a network namespace of their own, joined by a bridge. A site's firewall lets in
only answers to what it asked, its line carries 20 Mbit/s each way, and its folder is a small disk. States cross as
int8 steps, so that a site has the most to lose. Over the
command's own processes (TLS, keys) goes a seeded random walk: a fault in each round, every kind before one comes again.
What ends is started again, as systemd would. At the end every round must be committed once, with every site's
update, and every state have the bits of the same federation in one process; else it exits with 1.

Needs Linux and root: it says so and does nothing elsewhere. Without `tc` lines are not slowed; without `iptables` there
is no firewall and no loss; without the right to mount, no disk is filled. `--short` leaves the two-minute outage out.
"""

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import Host, Lost, cannot, host, network, run
from rich.console import Console
from rich.table import Table
from round import write_images
from views import machine

from wardround.config import FederationConfig, read_toml
from wardround.plan import resolve
from wardround.processes import stopped_by_sigterm
from wardround.server.run_folder import open_run
from wardround.update import state_hash

NAMES = ("lyon", "oslo", "wien", "pisa", "gent")
WARDROUND = [sys.executable, "-m", "wardround.cli"]
CONFIG = """format = 1
name = "chaos"
encoding = "int8"
seed = 3
[backbone]
patch_size = 8
depth = 4
[method]
name = "mae"
decoder_depth = 1
[data]
image_size = 32
[training]
rounds = {rounds}
local_steps = 30
batch_size = 2
optimiser_state = "kept"
[membership]
sites = {{ {sites} }}
wait_seconds = 240
"""
PORT = 8500
OUTAGE, PATIENCE = 120.0, 900.0  # seconds: of a long outage; for one round


@dataclass
class Walk:
    """The federation, and what has been done to it."""

    coordinator: Host
    sites: list[Host]
    draw: random.Random
    begun: float = field(default_factory=time.monotonic)
    round: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.coordinator.folder / "run"

    def say(self, kind: str, who: str, seconds: float = 0.0) -> None:
        """Note and print a fault."""
        at = round(time.monotonic() - self.begun, 1)
        self.faults.append({"at": at, "round": self.round, "kind": kind, "who": who, "seconds": round(seconds, 1)})
        print(
            f"{at:7.1f} s  round {self.round:2d}  {kind}: {who}" + (f", {seconds:.0f} s" if seconds else ""), flush=True
        )

    def wait(self, seconds: float) -> None:
        """Let time pass, starting again what ended."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, seconds + 60)

    def until(self, holds: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Wait for something, starting again what ended. Raises Lost."""
        deadline = time.monotonic() + patience
        while not holds():
            if time.monotonic() > deadline:
                raise Lost(f"round {self.round}: nothing for {patience:.0f} s")
            for each in (self.coordinator, *self.sites):
                each.tend()
            time.sleep(0.05)

    def site(self) -> Host:
        """Draw a site."""
        return self.draw.choice(self.sites)


Undo = Callable[[], None]
Fault = Callable[[Walk], Undo | None]  # what it gives is called after the round


def kill_site(walk: Walk) -> None:
    """Kill -9 a site's command, which is started again at once or after the coordinator noticed."""
    site, pause = walk.site(), walk.draw.choice((0.5, 3.0, 70.0))
    walk.say("kill -9 of a site", site.name, pause)
    site.kill(pause)


def kill_node(walk: Walk) -> None:
    """Kill -9 the process of a site that trains."""
    site = walk.site()
    if site.kill_below("wardround.client.node"):
        walk.say("kill -9 of a site's training process", site.name)


def kill_superlink(walk: Walk) -> None:
    """Kill -9 Flower's server."""
    if walk.coordinator.kill_below("flower-superlink"):
        walk.say("kill -9 of SuperLink", "coordinator")


def kill_rounds(walk: Walk) -> None:
    """Kill -9 the process of the rounds."""
    if walk.coordinator.kill_below("wardround.server.rounds_process"):
        walk.say("kill -9 of the rounds' process", "coordinator")


def kill_coordinator(walk: Walk) -> None:
    """Kill -9 `wardround coordinate`, and with it all at the coordinator."""
    pause = walk.draw.choice((0.5, 10.0, 65.0))
    walk.say("kill -9 of the coordinator", "coordinator", pause)
    walk.coordinator.kill(pause)


def kill_everything(walk: Walk) -> None:
    """Kill -9 all commands at once: a power cut everywhere."""
    walk.say("kill -9 of everything", "all")
    for each in (walk.coordinator, *walk.sites):
        each.kill(walk.draw.uniform(0.0, 5.0))


def short_outage(walk: Walk) -> None:
    """Take a site's line down for less, or somewhat more, than Flower's minute."""
    site, seconds = walk.site(), walk.draw.choice((5.0, 35.0, 70.0))
    walk.say("link down", site.name, seconds)
    _outage(walk, site, seconds)


def long_outage(walk: Walk) -> None:
    """Take a site's line down for two minutes in the middle of its upload."""
    site, folder = walk.site(), walk.run / "rounds" / f"{walk.round:05d}"
    before = site.sent()
    walk.until(lambda: site.sent() > before + 1_000_000 or (folder / "checkpoint").exists(), 120)
    walk.say("link down in mid-upload", site.name, OUTAGE)
    _outage(walk, site, OUTAGE)


def _outage(walk: Walk, site: Host, seconds: float) -> None:
    site.link("down")
    walk.wait(seconds)
    site.link("up")


def loss(walk: Walk) -> Undo:
    """Drop two packets of a hundred, each way, on every site's line until the round is over."""
    walk.say("2 % of packets lost", "all sites")
    rule = ["-m", "statistic", "--mode", "random", "--probability", "0.02", "-j", "DROP"]

    def change(action: str) -> None:
        for site in walk.sites:
            for chain, way in (("INPUT", "-i"), ("OUTPUT", "-o")):
                run("ip", "netns", "exec", site.space, "iptables", action, chain, way, "eth0", *rule)

    change("-I")
    return lambda: change("-D")


def disk_full_at_server(walk: Walk) -> None:
    """Fill the coordinator's disk for a while."""
    _fill(walk, walk.coordinator)


def disk_full_at_site(walk: Walk) -> None:
    """Fill a site's disk for a while."""
    _fill(walk, walk.site())


def _fill(walk: Walk, full: Host) -> None:
    seconds, filler = walk.draw.uniform(5.0, 25.0), full.folder / "filler"
    walk.say(f"disk full at {'the server' if full is walk.coordinator else 'a site'}", full.name, seconds)
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    walk.wait(seconds)
    filler.unlink()


FAULTS: dict[str, Fault] = {
    "site": kill_site,
    "node": kill_node,
    "superlink": kill_superlink,
    "rounds": kill_rounds,
    "coordinator": kill_coordinator,
    "everything": kill_everything,
    "short": short_outage,
    "long": long_outage,
    "loss": loss,
    "server disk": disk_full_at_server,
    "site disk": disk_full_at_site,
}


def main() -> None:
    """Walk, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sites", type=int, default=3, choices=range(1, len(NAMES) + 1))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if reason := cannot():
        print(f"skipped: {reason}")
        return
    with stopped_by_sigterm(), tempfile.TemporaryDirectory(prefix="chaos-") as home:
        report = chaos(Path(home), arguments.rounds, arguments.seed, arguments.sites, arguments.short)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=110).print(table(report))
    if report["lost"]:
        sys.exit(1)


def chaos(home: Path, rounds: int, seed: int, count: int, short: bool) -> dict[str, Any]:
    """Return what was injected and what was lost."""
    names = list(NAMES[:count])
    config = home / "chaos.toml"
    config.write_text(CONFIG.format(rounds=rounds, sites=", ".join(f"{name} = 1.0" for name in names)))
    data = write_images(home / "data", names, 6)
    expected = undisturbed(home, config, data)
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(host(home, number, name)) for number, name in enumerate(["coordinator", *names])]
        missing = stack.enter_context(network(hosts))
        walk = Walk(hosts[0], hosts[1:], random.Random(seed))
        deploy(walk, config, data)
        trained, seen, lost = dict[str, int](), dict[int, str](), list[str]()
        try:
            for number, kind in enumerate(order(walk.draw, rounds, short, missing), 1):
                walk.round = number
                one_round(walk, kind, trained, seen)
            walk.until(lambda: walk.coordinator.process is not None and walk.coordinator.process.poll() == 0, 300)
        except Lost as error:
            lost.append(str(error))
        seconds = time.monotonic() - walk.begun
        lost += differences(walk, rounds, expected, seen)
        if lost:
            for each in hosts:
                print(f"--- {each.name}\n{each.log.read_text(errors='replace')[-3000:]}")
        return {
            "machine": machine(),
            "seed": seed,
            "sites": names,
            "left out": missing,
            "seconds": round(seconds),
            "faults": walk.faults,
            "ended by itself": {
                each.name: [line.replace(f"{home}/", "") for line in each.ended] for each in hosts if each.ended
            },
            "rounds": rounds,
            "committed": len(seen),
            "updates": len(seen) * count,
            "trainings": sum(trained.values()),
            "lost": lost,
        }


def order(draw: random.Random, rounds: int, short: bool, missing: dict[str, str]) -> list[str]:
    """Return the kind of each round's fault: all kinds in a drawn order, then again."""
    kinds = [kind for kind in FAULTS if kind not in missing]
    found: list[str] = []
    while len(found) < rounds:
        found += draw.sample(kinds, len(kinds))
        kinds = [kind for kind in kinds if kind != "long"]
    return [kind for kind in found if not (short and kind == "long")][:rounds]


def one_round(walk: Walk, kind: str, trained: dict[str, int], seen: dict[int, str]) -> None:
    """Break something in a round, and wait for its commit."""
    folder = walk.run / "rounds" / f"{walk.round:05d}"
    walk.until(lambda: (folder / "cohort.json").exists() or (folder / "checkpoint").exists())
    if kind != "long":
        walk.wait(walk.draw.uniform(0.0, 3.0))
    undo = FAULTS[kind](walk)
    walk.until((folder / "checkpoint").is_dir)
    if undo is not None:
        undo()
    seen[walk.round] = state_hash(open_run(walk.run).checkpoint(walk.round).state)
    for site in walk.sites:
        for path in site.folder.glob(f"kit/work/journal/*/round-{walk.round:05d}/trainings.json"):
            trained[f"{site.name} {walk.round}"] = json.loads(path.read_text())


def differences(walk: Walk, rounds: int, expected: dict[int, str], seen: dict[int, str]) -> list[str]:
    """Return what is not as without faults, in words."""
    run, found = open_run(walk.run), list[str]()
    if (committed := run.committed()) != list(range(rounds + 1)):
        found.append(f"committed are {committed}, not 0 to {rounds}")
    for number in committed[1:]:
        folded = sorted(run.record(number)["sites"])
        if folded != sorted(site.name for site in walk.sites):
            found.append(f"round {number}: folded are {folded}")
        if (now := state_hash(run.checkpoint(number).state)) != seen.get(number, now):
            found.append(f"round {number}: was committed twice, to different states")
        if now != expected[number]:
            found.append(f"round {number}: the state is not that of the undisturbed federation")
    return found


def undisturbed(home: Path, config: Path, data: Path) -> dict[int, str]:
    """Return the hash of each round's state of the same federation in one process."""
    out = home / "undisturbed"
    run(
        *WARDROUND,
        "simulate",
        config,
        "--data",
        data,
        "--out",
        out,
        "--threads",
        1,
        "--tracking",
        f"sqlite:///{home}/ml.db",
    )
    found = open_run(out)
    return {number: state_hash(found.checkpoint(number).state) for number in found.committed()}


def deploy(walk: Walk, config: Path, data: Path) -> None:
    """Make the kits, hand them over, and say what each host runs."""
    kits, address = walk.coordinator.folder / "kits", f"{walk.coordinator.address}:{PORT}"
    run(*WARDROUND, "provision", config, "--out", kits, "--address", address)
    digest = resolve(read_toml(config, FederationConfig)).digest
    for site in walk.sites:
        path = Path(shutil.move(kits / site.name, site.folder / "kit")) / "site.toml"
        text = path.read_text().replace("approved = []", f"approved = [{json.dumps(digest)}]")
        images = f'[images]\nfolder = {json.dumps(str(data))}\nkind = "labelled"\nsite = "{site.name}"\n'
        text = text.replace("[images]\n", images, 1).replace("threads = 0", "threads = 1")
        path.write_text("max_trainings_per_round = 10\n" + text + "\n[minimum]\nimages = 1\nbatch_size = 2\n")
        site.command = [*WARDROUND, "site", "run", str(path)]
    options = ["--kit", kits / "coordinator", "--out", walk.run, "--port", PORT, "--host", walk.coordinator.address]
    walk.coordinator.command = [*WARDROUND, "coordinate", str(config), *map(str, options)]


def table(report: dict[str, Any]) -> Table:
    """Return the report as a person reads it."""
    made = Table("what", "count", title=f"Seed {report['seed']}, {report['seconds']} s")
    for kind, times in sorted(Counter(fault["kind"] for fault in report["faults"]).items()):
        made.add_row(f"injected: {kind}", str(times))
    ended = sum(map(len, report["ended by itself"].values()))
    made.add_row("commands that ended by themselves, started again", str(ended))
    made.add_row("rounds committed, each once", f"{report['committed']} of {report['rounds']}")
    made.add_row("updates folded", str(report["updates"]))
    made.add_row("trainings begun", str(report["trainings"]))
    for line in report["lost"] or ["nothing: every state has the bits of the undisturbed federation"]:
        made.add_row("lost", str(line))
    return made


if __name__ == "__main__":
    main()
