"""The coordinator's side of the network: Flower's SuperLink and the rounds beside it, watched, started again.

RUN/flower/   Flower's own state (FLWR_HOME, its database): a convenience, never the truth
RUN/logs/     superlink.log, rounds.log, gate.log
"""

import contextlib
import json
import re
import secrets
import signal
import sqlite3
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from wardround.config import FederationConfig, named, read_federation
from wardround.connection.answers import most_objects
from wardround.errors import CheckpointError, ConfigError, WardroundError
from wardround.processes import NewLines, alone, command, free_port, running, stopped_by_sigterm
from wardround.registry.checkpoint import STATE
from wardround.registry.durable import write_file
from wardround.registry.signing import kit_key
from wardround.server.fab import write_stub
from wardround.server.gate import gate
from wardround.server.membership import Members, members_of, read_members
from wardround.server.registration import CONNECTION, admit, flwr, forget, is_registered
from wardround.server.run_folder import RunFolder, create, open_run, reread
from wardround.signatures import untrusted
from wardround.update import printable

_STARTUP = 120.0  # seconds; a cold start on a slow disk takes about ten
_POLL = 0.2  # seconds
# For glibc: Flower's objects of 5 MiB go back to the system when they are freed. Else each thread keeps a heap of its
# own, and SuperLink some 700 MB after a state of 340 MB went through it.
_LEAN = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "2"}
ASK = "--ask"  # rounds_process.py asks for scores, and trains nothing
NAME = "wardround coordinate"  # of who works in a run folder
ERROR = "error: "  # before the one line of a user's error, as the rounds' process says it
Answer = TypeVar("Answer")
_TRIES, _LONGEST_PAUSE = 6, 60.0  # new starts without a round in between; seconds


def coordinate(config: Path, kit: Path, out: Path, port: int, tracking: str, host: str = "127.0.0.1") -> None:
    """Run a federation with the sites that connect to host:port, from its last committed round to its end.

    Raises WardroundError, in one line, for whatever stops it; it goes on where it stopped when called again.
    """
    home = out.resolve() / "flower"
    with (
        # Else the run of another one would have its members from here, and that one would never tell SuperLink of them.
        alone(home, NAME) if home.is_dir() else contextlib.nullcontext(),
        # In a process that ends: torch and timm take a gigabyte. Ctrl-C is this one's to hear.
        ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as planner,
    ):
        try:
            planner.submit(prepare, config, kit, out, tracking).result()
        except BrokenProcessPool as error:
            raise WardroundError(f"{config}: its planning was killed; out of memory? Start again with more.") from error
    serve(open_run(out), kit, port, host)


def prepare(config: Path, kit: Path, out: Path, tracking: str) -> None:
    """Make a federation's run folder, or see that it is this one's; its members are those that were signed."""
    from wardround.plan import resolve

    federation = read_federation(config)
    with named(config):
        members = current_members(kit, federation, out)
        create(out, resolve(federation), members.keys, tracking, members.version)


def current_members(kit: Path, config: FederationConfig, out: Path) -> Members:
    """Return who takes part by the coordinator's kit, which is whole and no older than what the run knows."""
    for name in ("ca.crt", "server.crt", "server.key", "signing.key"):
        if not (kit / name).is_file():
            raise ConfigError(f"{kit}: has no {name}; give --kit the 'coordinator' folder of 'wardround provision'.")
    kit_key(kit)  # at the end of all rounds would be late to miss it
    if problem := untrusted((kit / "server.crt").read_bytes(), (kit / "ca.crt").read_bytes()):
        raise ConfigError(f"{kit / 'server.crt'}: {problem}; make another with 'wardround provision rotate'.")
    members = members_of(kit, config)
    known = out / "members.json"
    if known.exists() and (version := read_members(known).version) > members.version:
        raise CheckpointError(
            f"{kit}: its membership is version {members.version}, and run folder {out} has taken over {version}; put "
            "the newest back, or else who was revoked since would be let in again."
        )
    return members


def evaluate(out: Path, kit: Path, port: int, host: str = "127.0.0.1") -> None:
    """Ask the sites of a run folder that connect to host:port for their scores of its newest state.

    Raises WardroundError as `coordinate` does.
    """
    run = open_run(out)
    current_members(kit, run.config, out)
    serve(run, kit, port, host, ASK)


def serve(run: RunFolder, kit: Path, port: int, host: str = "127.0.0.1", *options: str) -> None:
    """Run the rounds that are left of a run folder; its members are the sites that may connect.

    `options` are those of rounds_process.py, which may do something else than rounds.

    What dies is started again, after a pause that grows while no round is committed. Raises WardroundError
    for what a person must mend, and where it died too often.
    """
    home, kit, inner = run.path.resolve() / "flower", kit.resolve(), free_port()
    logs = home.parent / "logs"
    with stopped_by_sigterm(), alone(home, NAME):
        sizes = [path.stat().st_size for path in run.path.glob(f"rounds/*/checkpoint/{STATE}")]
        with gate(kit, host, port, inner, logs / "gate.log", most_objects(max(sizes, default=0))) as door:
            tries, done, lived = 0, -1, False
            while True:
                run = reread(run)
                if not is_registered(home, run.members):
                    forget(home)
                    door.opened.clear()  # SuperLink would tell each site that its key is not known
                try:
                    door.renew()
                    with _superlink(run.path, home, kit, inner) as link:
                        lived = True
                        if not is_registered(home, run.members):
                            link.checked(admit, run.members)
                        door.opened.set()
                        if tries == 0:
                            name = run.config.name
                            print(f"federation '{name}': sites connect to {host}:{port}; logs in {logs}", flush=True)
                        _follow(link, run, *options)
                    break
                except Died as death:
                    if not lived:  # it never came up: a new start would not either
                        raise
                    committed = run.committed()[-1]
                    tries, done = (tries + 1 if committed == done else 1), committed
                    if tries > _TRIES:
                        raise WardroundError(f"{death} It died {tries} times in round {committed + 1}.") from death
                    pause = min(_LONGEST_PAUSE, 2.0**tries)
                    print(f"warning: {death} Starts again in {pause:.0f} s.", flush=True)
                    time.sleep(pause)
        forget(home)  # the last updates still stand in it


class Died(WardroundError):  # noqa: N818  # no error of anyone
    """A program of ours ended by itself, for a reason that a new start may cure."""


@dataclass(frozen=True)
class Link:
    """A SuperLink that runs."""

    home: Path  # Flower's own state
    logs: Path
    secret: Path  # a file: what the rounds prove themselves with
    kit: Path
    port: int  # on loopback
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """Raise Died where it has ended."""
        if (code := self.process.poll()) is not None:
            log = self.logs / "superlink.log"
            last = " / ".join([line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:])
            plain = re.sub(r"\x1b\[\d+m", "", last)[-300:]
            raise Died(f"Flower's SuperLink ended with {code}: {printable(plain).strip('. ')}. See {log}.")

    def checked(self, call: Callable[..., Answer], *arguments: Any) -> Answer:
        """Return what one of registration.py's calls returns; raise Died where it fails since SuperLink has ended."""
        try:
            return call(self.home, *arguments)
        except WardroundError:
            self.check()
            raise


@contextlib.contextmanager
def _superlink(run: Path, home: Path, kit: Path, port: int) -> Iterator[Link]:
    """Start SuperLink on loopback with TLS and SuperNode keys; end it on leaving."""
    logs, secret, database = home.parent / "logs", home / "rounds.secret", home / "state.db"
    write_file(secret, secrets.token_bytes(32))
    _large_pages(database)
    tls = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
    arguments = command(
        "flower-superlink",
        *("--host", "127.0.0.1", "--port", port),
        *(part for option, name in tls.items() for part in (option, kit / name)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        # The rounds are a process of ours, which says itself what ails it.
        *("--isolation", "process", "--superexec-auth-secret-file", secret),
        # On disk, so that sites stay connected, and go on training, while the coordinator is restarted.
        *("--database", database),
    )
    connection = {"address": f"127.0.0.1:{port}", "root-certificates": str(kit / "ca.crt")}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in connection.items()]
    write_file(home / "config.toml", "\n".join([f"[superlink.{CONNECTION}]", *lines, ""]).encode())
    with running(arguments, home, logs / "superlink.log", run, _LEAN) as process:
        link = Link(home, logs, secret, kit, port, process)
        _wait_until_healthy(link)
        yield link


def _large_pages(database: Path) -> None:
    """Begin SuperLink's database, where there is none, with SQLite's largest pages.

    Its objects of 5 MiB take 80 of them in place of 1,280, each of which is copied, summed and written by itself.
    Where the disk refuses, SuperLink says so next.
    """
    if not database.exists():
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as db:
            db.execute("PRAGMA page_size = 65536")
            db.execute("PRAGMA journal_mode = WAL")  # writes the file; SuperLink's own mode, and it keeps the size


def _wait_until_healthy(link: Link) -> None:
    deadline = time.monotonic() + _STARTUP
    url, trust = f"https://127.0.0.1:{link.port}/health", ssl.create_default_context(cafile=link.kit / "ca.crt")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust))
    while True:
        link.check()
        with contextlib.suppress(OSError), opener.open(url, timeout=5):
            return
        if time.monotonic() > deadline:
            raise WardroundError(
                f"Flower's SuperLink is not up after {_STARTUP:.0f} s; see {link.logs / 'superlink.log'}."
            )
        time.sleep(0.1)


def _follow(link: Link, run: RunFolder, *options: str) -> None:
    """Run the rounds to their end. Raises WardroundError with what stopped them, Died where a new start may do."""
    number = str(link.checked(flwr, "run", write_stub(link.home / "stub"), CONNECTION)["run-id"])
    log = link.logs / "rounds.log"
    address = f"127.0.0.1:{link.port}"
    rounds = [sys.executable, "-m", "wardround.server.rounds_process", str(run.path.resolve())]
    rounds += [str(link.kit), address, str(link.secret), number, *options]
    lines, done, last = NewLines(log), run.committed()[-1], ""
    certificate = (link.kit / "server.crt").read_bytes()
    with (
        tqdm(total=run.config.training.rounds, initial=done, desc="rounds", unit="round", disable=None) as bar,
        running(rounds, link.home, log, Path.cwd()) as process,
    ):
        ended = False
        while not ended:
            ended = process.poll() is not None
            link.check()
            with contextlib.suppress(OSError):  # a person may be moving it
                if (link.kit / "server.crt").read_bytes() != certificate:
                    raise Died("the server's certificate was replaced.")
            for line in lines.read():
                last = line if line.startswith(ERROR) else last
                if line.startswith(("waiting for ", "warning: ", "round ", "membership ")):  # words to a person
                    bar.write(printable(line))
            bar.update(run.committed()[-1] - done)
            done = run.committed()[-1]
            time.sleep(_POLL)
    if process.returncode == 2 and last:
        raise WardroundError(last.removeprefix(ERROR))
    if process.returncode != 0:
        code = process.returncode
        killed = f"was killed by signal {-code}; out of memory?" if code < 0 else f"ended with {code}."
        raise Died(f"the process of the rounds {killed} See {log}.")
