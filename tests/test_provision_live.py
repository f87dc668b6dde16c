"""Sites join, leave and change their keys, and the server its certificate, while a federation runs over the network.

Only a real SuperLink shows that it admits and cuts off keys while it runs, and that no other site notices.
"""

import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TINY, end_all, merged, to_toml, write_labelled

from wardround.config import FederationConfig, read_toml
from wardround.plan import resolve
from wardround.processes import environment, free_port
from wardround.provision import add, provision, renew, revoke, rotate
from wardround.provision.request import init
from wardround.server.run_folder import RunFolder, open_run

pytestmark = [pytest.mark.slow, pytest.mark.network]

ROUNDS = 400  # more than are ever run: the test ends it


class Federation:
    """A federation that anybody with a kit may join; its processes write to NAME.out."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data, self.port = folder, data, free_port()
        self.kits, self.config = folder / "kits", folder / "tiny.toml"
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def write(self, **membership: object) -> None:
        changes = {"training": {"rounds": ROUNDS, "local_steps": 2}, "membership": {"min_sites": 1, **membership}}
        self.config.write_text(to_toml(merged(TINY, changes)))

    def provision(self, *sites: str) -> None:
        provision(read_toml(self.config, FederationConfig), self.kits, sites, f"localhost:{self.port}")

    def start(self, name: str, *command: str | Path) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            env = environment(self.folder) | {"OMP_NUM_THREADS": "1"}
            arguments = [sys.executable, "-m", "wardround.cli", *map(str, command)]
            self.running[name] = subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=out, stderr=out)

    def coordinate(self) -> None:
        tracking = ["--tracking", f"sqlite:///{self.folder / 'mlflow.db'}"]
        where = ["--kit", self.kits / "coordinator", "--out", self.folder / "run", "--port", str(self.port)]
        self.start("coordinator", "coordinate", self.config, *where, *tracking)

    def join(self, site: str, kit: Path | None = None) -> None:
        path = (kit or self.kits / site) / "site.toml"
        digest = resolve(read_toml(self.config, FederationConfig)).digest
        text = (
            path.read_text().replace("approved = []", f'approved = ["{digest}"]').replace("threads = 0", "threads = 1")
        )
        images = f'folder = "{self.data}"\nkind = "labelled"\nsite = "{site}"'
        path.write_text(text.replace('# folder = "/data/images"', images))
        self.start(site, "site", "run", path)

    def leave(self, site: str) -> None:
        self.running[site].terminate()
        self.running.pop(site).wait(30)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def hears(self, name: str, text: str, times: int = 1) -> None:
        """Wait until a process has said something so often."""
        until(
            lambda: self.said(name).count(text) >= times, lambda: f"'{name}' did not say '{text}':\n{self.said(name)}"
        )

    @property
    def run(self) -> RunFolder:
        return open_run(self.folder / "run")

    def last(self) -> tuple[int, set[str]]:
        """Return the newest round and the sites whose updates are in it."""
        number = self.run.committed()[-1]
        return number, set(self.run.record(number)["sites"]) if number else set()

    def folds(self, *sites: str) -> int:
        """Wait until a new round is of exactly these sites; return its number."""
        before, _ = self.last()
        until(
            lambda: self.last()[0] > before and self.last()[1] == set(sites),
            lambda: f"last: {self.last()}\n{self.said('coordinator')}",
        )
        return self.last()[0]


def until(holds: Callable[[], bool], report: Callable[[], str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, report()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("live")
    data = write_labelled(tmp_path_factory.mktemp("labelled"), {"lyon": 20, "oslo": 20, "pisa": 20})
    federation = Federation(folder, data)
    federation.write()
    federation.provision("lyon", "oslo")
    federation.join("lyon")
    federation.join("oslo")
    federation.coordinate()
    try:
        federation.hears("coordinator", "sites connect to")
        yield federation
    finally:
        end_all(federation.running.values())


def test_sites_that_were_there_before_their_coordinator_wait_for_it(federation: Federation) -> None:
    """SuperLink is up before it knows their keys."""
    federation.hears("lyon", "is connected")
    federation.hears("oslo", "is connected")
    for site in ("lyon", "oslo"):
        assert "does not know its key" not in federation.said(site)


def test_a_site_joins_between_rounds_is_revoked_at_once_and_comes_back_with_a_new_key(federation: Federation) -> None:
    digest = federation.run.digest
    federation.folds("lyon", "oslo")
    add(federation.kits, "pisa")
    federation.join("pisa")
    federation.hears("coordinator", "site 'pisa' joins")
    federation.folds("lyon", "oslo", "pisa")
    revoke(federation.kits, "pisa")
    federation.hears("coordinator", "the key of site 'pisa' is taken back")
    federation.hears("pisa", "does not know its key")
    federation.folds("lyon", "oslo")
    (federation.kits / "pisa").rename(federation.folder / "pisa-old")
    federation.leave("pisa")
    add(federation.kits, "pisa")
    federation.hears("coordinator", "site 'pisa' joins", times=2)
    federation.join("pisa")
    federation.folds("lyon", "oslo", "pisa")
    assert federation.run.digest == digest
    for site in ("lyon", "oslo"):
        assert federation.said(site).count("is connected") == 1, "the others notice nothing"


def test_a_site_changes_its_key_which_was_made_there_and_the_others_notice_nothing(federation: Federation) -> None:
    federation.folds("lyon", "oslo", "pisa")
    home = federation.folder / "oslo-next"
    path, _ = init(home, "oslo")
    (federation.kits / "oslo").rename(federation.folder / "oslo-old")
    for file in rotate(federation.kits, str(path)).iterdir():
        file.rename(home / file.name)
    federation.hears("coordinator", "the key of site 'oslo' is taken back")
    federation.leave("oslo")
    federation.hears("coordinator", "site 'oslo' joins")
    federation.join("oslo", home)
    federation.folds("lyon", "oslo", "pisa")
    assert federation.said("lyon").count("is connected") == 1
    assert sorted(path.name for path in home.iterdir() if path.suffix == ".key") == ["site.key"]


def test_the_servers_certificate_is_replaced_and_sites_stay_connected(federation: Federation) -> None:
    federation.folds("lyon", "oslo", "pisa")
    renew(federation.kits)
    federation.hears("coordinator", "the server's certificate was replaced")
    federation.folds("lyon", "oslo", "pisa")
    assert federation.said("lyon").count("is connected") == 1
    assert presented(federation.port) == (federation.kits / "coordinator" / "server.crt").read_text()


def test_patience_changes_while_rounds_go_on(federation: Federation) -> None:
    federation.write(wait_seconds=77.0)
    federation.provision("lyon", "oslo", "pisa")
    federation.hears("coordinator", "wait_seconds = 77.0")
    assert federation.run.config.membership.wait_seconds == 77.0


def test_a_second_container_with_one_identity_stays_out_and_says_so(federation: Federation) -> None:
    federation.folds("lyon", "oslo", "pisa")
    twin = federation.folder / "twin"
    twin.mkdir()
    for file in (federation.kits / "lyon").iterdir():
        if file.is_file():
            (twin / file.name).write_bytes(file.read_bytes())
            (twin / file.name).chmod(0o600)
    federation.start("twin", "site", "run", twin / "site.toml")
    federation.hears("twin", "tries again in")
    assert "another container" in federation.said("twin")
    log = (twin / "work" / "logs" / "node.log").read_text()
    assert "another container" in log and "Traceback" not in log
    assert federation.said("lyon").count("is connected") == 1
    federation.folds("lyon", "oslo", "pisa")
    federation.leave("twin")


def test_a_tampered_membership_is_said_once_and_changes_nothing(federation: Federation) -> None:
    path = federation.kits / "coordinator" / "membership.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"wait_seconds": 77.0', b'"wait_seconds": 1.0'))
    federation.hears("coordinator", "is not what the coordinator's signing.key signed")
    path.write_bytes(whole)
    federation.folds("lyon", "oslo", "pisa")
    assert federation.said("coordinator").count("signing.key signed") == 1
    assert federation.run.config.membership.wait_seconds == 77.0


def presented(port: int) -> str:
    """Return the certificate that sites are shown."""
    return ssl.get_server_certificate(("127.0.0.1", port))
