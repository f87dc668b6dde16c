"""The coordinator's side of the network: Flower's SuperLink, started, fed with one run, watched, stopped.

RUN/flower/   Flower's own state (FLWR_HOME, its database): a convenience, never the truth
RUN/logs/     superlink.log, rounds.log (the ServerApp), gate.log
"""

import contextlib
import json
import re
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from tqdm import tqdm

from wardround.config import FederationConfig, read_toml
from wardround.errors import ConfigError, WardroundError
from wardround.plan import resolve
from wardround.processes import NewLines, alone, command, environment, free_port, running, stopped_by_sigterm
from wardround.registry.durable import write_file
from wardround.server.fab import write_stub
from wardround.server.gate import gate
from wardround.server.run_folder import RunFolder, create

_STARTUP = 120.0  # seconds; a cold start on a slow disk takes about ten
_POLL = 0.5  # seconds
_CONNECTION = "coordinator"  # the name of our SuperLink in the Flower CLI's own config


def coordinate(config: Path, kit: Path, out: Path, port: int, tracking: str, host: str = "127.0.0.1") -> None:
    """Run a federation with the sites that connect to host:port, from its last committed round to its end.

    Raises WardroundError, in one line, for whatever stops it; it goes on where it stopped when called again.
    """
    federation = read_toml(config, FederationConfig)
    run = create(out, resolve(federation), member_keys(kit, federation), tracking)
    serve(run, kit, port, host)


def member_keys(kit: Path, config: FederationConfig) -> dict[str, str]:
    """Return the public key (PEM) of each site that takes part, from the coordinator's kit."""
    for name in ("ca.crt", "server.crt", "server.key"):
        if not (kit / name).is_file():
            raise ConfigError(f"{kit}: has no {name}; give --kit the 'coordinator' folder of 'wardround provision'.")
    found = {path.stem: path for path in sorted((kit / "keys").glob("*.pub"))}
    if missing := sorted(config.membership.sites.keys() - found.keys()):
        raise ConfigError(f"{kit}: has no key of site '{missing[0]}'; make its kit with 'wardround provision'.")
    sites = sorted(config.membership.sites or found)
    if not sites:
        raise ConfigError(f"{kit}: has no site's key; make kits with 'wardround provision'.")
    return {site: _pem(found[site]) for site in sites}


def serve(run: RunFolder, kit: Path, port: int, host: str = "127.0.0.1") -> None:
    """Run the rounds that are left of a run folder; its members are the sites that may connect."""
    home = run.path.resolve() / "flower"
    with stopped_by_sigterm(), alone(home, "wardround coordinate"):
        if not _registered(home, run.members):
            _forget(home)
        with _superlink(run.path, home, kit.resolve()) as link:
            _register(link, run.members)
            with gate(link.kit, host, port, link.port, link.logs / "gate.log"):
                name = run.config.name
                print(f"federation '{name}': sites connect to {host}:{port}; logs in {link.logs}", flush=True)
                _run(link, run)
        _forget(home)  # the last updates still stand in it


@dataclass(frozen=True)
class Link:
    """A SuperLink that runs."""

    home: Path  # Flower's own state
    logs: Path
    kit: Path
    port: int  # on loopback
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """Raise WardroundError where it has ended."""
        if (code := self.process.poll()) is not None:
            log = self.logs / "superlink.log"
            last = " / ".join([line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:])
            plain = re.sub(r"\x1b\[\d+m", "", last)[-300:]
            raise WardroundError(f"Flower's SuperLink ended with {code}: {plain}. See {log}; then start again.")

    def flwr(self, *arguments: str | Path) -> dict[str, Any]:
        """Return the Flower CLI's answer. Raises WardroundError with what it says where it fails."""
        call = command("flwr", *arguments, "--format", "json")
        try:
            done = subprocess.run(
                call, env=environment(self.home), cwd=self.home, capture_output=True, text=True, timeout=_STARTUP
            )
            answer: dict[str, Any] = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            answer = {"error-message": f"no answer after {_STARTUP:.0f} s"}
        except ValueError:
            answer = {"error-message": done.stderr or done.stdout}
        if not answer.get("success"):  # its exit status is 0 even so
            reason = " ".join(str(answer.get("error-message")).split())
            raise WardroundError(f"Flower refused '{' '.join(map(str, arguments[:2]))}': {reason[-300:]}.")
        return answer


@contextlib.contextmanager
def _superlink(run: Path, home: Path, kit: Path) -> Iterator[Link]:
    """Start SuperLink on loopback with TLS and SuperNode keys; end it and its ServerApp on leaving."""
    port, logs = free_port(), home.parent / "logs"
    tls = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
    arguments = command(
        "flower-superlink",
        *("--host", "127.0.0.1", "--port", port),
        *(part for option, name in tls.items() for part in (option, kit / name)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        # On disk, so that sites stay connected, and go on training, while the coordinator is restarted.
        *("--database", home / "state.db"),
    )
    connection = {"address": f"127.0.0.1:{port}", "root-certificates": str(kit / "ca.crt")}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in connection.items()]
    write_file(home / "config.toml", "\n".join([f"[superlink.{_CONNECTION}]", *lines, ""]).encode())
    # The ServerApp inherits the folder it runs in: "." in its run config is the run folder.
    with running(arguments, home, logs / "superlink.log", run) as process:
        link = Link(home, logs, kit, port, process)
        _wait_until_healthy(link)
        yield link


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


def _registered(home: Path, members: dict[str, str]) -> bool:
    """Return whether SuperLink's database knows exactly these keys."""
    book = home / "registered.json"
    return book.exists() and json.loads(book.read_bytes()) == members


def _forget(home: Path) -> None:
    """Begin SuperLink's database anew. It never admits a key again that was taken back, so nothing is taken back."""
    for path in (home / "registered.json", *home.glob("state.db*")):
        path.unlink(missing_ok=True)


def _register(link: Link, members: dict[str, str]) -> None:
    """Tell SuperLink the sites' keys, unless it has them from an earlier start."""
    if _registered(link.home, members):
        return
    for site in tqdm(sorted(members), "keys", unit="site", disable=None, delay=2, leave=False):
        link.flwr("supernode", "register", link.kit / "keys" / f"{site}.pub", _CONNECTION, "--name", site)
    write_file(link.home / "registered.json", json.dumps(members).encode())


def _run(link: Link, run: RunFolder) -> None:
    """Submit the one run, follow it to its end, and raise its error where it has one."""
    answer = link.flwr("run", write_stub(link.home / "stub"), _CONNECTION)
    number, log = str(answer["run-id"]), link.logs / "rounds.log"
    lines, rounds, done = NewLines(log), run.config.training.rounds, run.committed()[-1]
    with (
        tqdm(total=rounds, initial=done, desc="rounds", unit="round", disable=None) as bar,
        # Flower keeps what a ServerApp prints to itself; this asks for it until the run has ended.
        running(command("flwr", "log", number, _CONNECTION, "--stream"), link.home, log, link.home) as stream,
    ):
        ended = False
        while not ended:
            ended = stream.poll() is not None
            link.check()
            for line in lines.read():
                if line.startswith(("waiting for ", "round ")):  # the ServerApp's own words to a person
                    bar.write(line)
            bar.update(run.committed()[-1] - done)
            done = run.committed()[-1]
            time.sleep(_POLL)
    _raise_failure(link, number)


def _raise_failure(link: Link, number: str) -> None:
    """Return where a run was completed. Raises WardroundError with what its ServerApp raised."""
    (found,) = link.flwr("list", "--run-id", number, _CONNECTION)["runs"]
    if found["status"] != "finished:completed":
        details = str(found["status-details"]).removeprefix("ServerApp failed with exception: ").strip()
        if not details or details.startswith("No heartbeat"):
            details = (
                f"the server's process ended without a word; was it killed, or out of memory? See {link.logs}. "
                "What is committed is kept; start the same command again to go on."
            )
        raise WardroundError(details.splitlines()[0])


def _pem(path: Path) -> str:
    """Return an OpenSSH public key as SuperLink names a node by it."""
    try:
        key = load_ssh_public_key(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: is no public key; put the original back.") from error
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
