"""The coordinator's side of the network: Flower's SuperLink and the rounds beside it, watched, started again.

RUN/flower/   Flower's own state (FLWR_HOME, its database): a convenience, never the truth
RUN/logs/     superlink.log, rounds.log, gate.log
"""

import contextlib
import json
import re
import secrets
import ssl
import subprocess
import sys
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
from wardround.server.rounds_process import ERROR
from wardround.server.run_folder import RunFolder, create

_STARTUP = 120.0  # seconds; a cold start on a slow disk takes about ten
_POLL = 0.2  # seconds
_TRIES, _LONGEST_PAUSE = 6, 60.0  # new starts without a round in between; seconds
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
    for name in ("ca.crt", "server.crt", "server.key", "signing.key"):
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
    """Run the rounds that are left of a run folder; its members are the sites that may connect.

    What dies is started again, after a pause that grows while no round is committed. Raises WardroundError
    for what a person must mend, and where it died too often.
    """
    home, kit, inner = run.path.resolve() / "flower", kit.resolve(), free_port()
    logs = home.parent / "logs"
    with stopped_by_sigterm(), alone(home, "wardround coordinate"):
        if not _registered(home, run.members):
            _forget(home)
        with gate(kit, host, port, inner, logs / "gate.log"):
            tries, done, lived = 0, -1, False
            while True:
                try:
                    with _superlink(run.path, home, kit, inner) as link:
                        lived = True
                        _register(link, run.members)
                        if tries == 0:
                            name = run.config.name
                            print(f"federation '{name}': sites connect to {host}:{port}; logs in {logs}", flush=True)
                        _follow(link, run)
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
        _forget(home)  # the last updates still stand in it


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
            raise Died(f"Flower's SuperLink ended with {code}: {plain.strip('. ')}. See {log}.")

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
            self.check()
            reason = " ".join(str(answer.get("error-message")).split())
            raise WardroundError(f"Flower refused '{' '.join(map(str, arguments[:2]))}': {reason[-300:]}.")
        return answer


@contextlib.contextmanager
def _superlink(run: Path, home: Path, kit: Path, port: int) -> Iterator[Link]:
    """Start SuperLink on loopback with TLS and SuperNode keys; end it on leaving."""
    logs, secret = home.parent / "logs", home / "rounds.secret"
    write_file(secret, secrets.token_bytes(32))
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
        *("--database", home / "state.db"),
    )
    connection = {"address": f"127.0.0.1:{port}", "root-certificates": str(kit / "ca.crt")}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in connection.items()]
    write_file(home / "config.toml", "\n".join([f"[superlink.{_CONNECTION}]", *lines, ""]).encode())
    with running(arguments, home, logs / "superlink.log", run) as process:
        link = Link(home, logs, secret, kit, port, process)
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


def _follow(link: Link, run: RunFolder) -> None:
    """Run the rounds to their end. Raises WardroundError with what stopped them, Died where a new start may do."""
    number, log = str(link.flwr("run", write_stub(link.home / "stub"), _CONNECTION)["run-id"]), link.logs / "rounds.log"
    address = f"127.0.0.1:{link.port}"
    rounds = [sys.executable, "-m", "wardround.server.rounds_process", str(run.path.resolve())]
    rounds += [str(link.kit), address, str(link.secret), number]
    lines, done, last = NewLines(log), run.committed()[-1], ""
    with (
        tqdm(total=run.config.training.rounds, initial=done, desc="rounds", unit="round", disable=None) as bar,
        running(rounds, link.home, log, Path.cwd()) as process,
    ):
        ended = False
        while not ended:
            ended = process.poll() is not None
            link.check()
            for line in lines.read():
                last = line if line.startswith(ERROR) else last
                if line.startswith(("waiting for ", "warning: ", "round ")):  # words to a person
                    bar.write(line)
            bar.update(run.committed()[-1] - done)
            done = run.committed()[-1]
            time.sleep(_POLL)
    if process.returncode == 2 and last:
        raise WardroundError(last.removeprefix(ERROR))
    if process.returncode != 0:
        code = process.returncode
        killed = f"was killed by signal {-code}; out of memory?" if code < 0 else f"ended with {code}."
        raise Died(f"the process of the rounds {killed} See {log}.")


def _pem(path: Path) -> str:
    """Return an OpenSSH public key as SuperLink names a node by it."""
    try:
        key = load_ssh_public_key(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: is no public key; put the original back.") from error
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
