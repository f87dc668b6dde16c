"""What happens to a federation in its years: wrong clocks, a killed site, a new certificate, another address.

One federation with `encoding = "int8"`, over the real network (loopback, TLS, keys), goes through all of it; only this
shows that a SuperLink takes our signatures by a wrong clock, and takes a killed site back before its minute is over.
`benchmarks/chaos.py` breaks networks, disks and processes at random, in network namespaces.
"""

import os
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import TINY, end_all, merged, to_toml, write_labelled
from test_network_smoke import Deployment, fill_in, final

from wardround.config import FederationConfig, read_toml
from wardround.plan import resolve
from wardround.processes import free_port
from wardround.provision import provision
from wardround.server.run_folder import open_run
from wardround.simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.network]

SITES = {"lyon": 20, "oslo": 30}
CHANGES = {"encoding": "int8", "membership": {"sites": dict.fromkeys(SITES, 1.0)}}
HOUR = 3600
# Linux has no clock of a process's own, so Python's is shifted in the site's processes; TLS asks the real one.
CLOCK = """
import os, time
real = time.time
time.time = lambda: real() + float(os.environ["CLOCK_AHEAD"])
"""


@dataclass
class Life:
    """What a federation went through."""

    deployed: Deployment
    certificates: list[str] = field(default_factory=list)  # as served, one after the other

    def join(self, site: str, ahead: float) -> None:
        """Start a site whose clock is off by so many seconds."""
        folder = self.deployed.folder / "clock"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(CLOCK)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
            patch.setenv("CLOCK_AHEAD", str(ahead))
            self.deployed.join(site)

    def wait_for(self, name: str, text: str, times: int) -> None:
        """Wait until a process has said something so often."""
        deadline = time.monotonic() + 120
        while self.deployed.said(name).count(text) < times:
            assert time.monotonic() < deadline, f"'{name}' did not say '{text}' again:\n{self.deployed.said(name)}"
            time.sleep(0.1)

    def served(self) -> None:
        """Note the certificate that sites see."""
        self.certificates.append(ssl.get_server_certificate(("localhost", self.deployed.port)))

    def move(self) -> None:
        """Start the coordinator again at another port, with a new certificate."""
        assert self.deployed.end("coordinator") == 130
        for name in ("server.crt", "server.key"):
            (self.deployed.folder / "kits" / "coordinator" / name).unlink()
        self.deployed.port = free_port()
        give_kits(self.deployed)
        self.deployed.coordinate()
        self.wait_for("coordinator", "sites connect to", 2)


def give_kits(deployed: Deployment) -> None:
    address = f"localhost:{deployed.port}"
    provision(read_toml(deployed.config, FederationConfig), deployed.folder / "kits", list(SITES), address)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"), SITES)


@pytest.fixture(scope="module")
def life(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """Give a federation that went through all of it to its end. Its first round waits for 'oslo', who comes last."""
    folder = tmp_path_factory.mktemp("network")
    (folder / "tiny.toml").write_text(to_toml(merged(TINY, CHANGES)))
    deployed = Deployment(folder, folder / "tiny.toml", data)
    give_kits(deployed)
    for site in SITES:
        fill_in(
            folder / "kits" / site / "site.toml", data, resolve(read_toml(deployed.config, FederationConfig)).digest
        )
    life = Life(deployed)
    try:
        through(life)
        yield life
    finally:
        end_all(deployed.running.values())


def through(life: Life) -> None:
    deployed, before = life.deployed, life.deployed.port
    deployed.coordinate()
    life.wait_for("coordinator", "sites connect to", 1)
    life.join("lyon", HOUR)
    life.wait_for("lyon", "is connected", 1)
    for process in psutil.Process(deployed.running["lyon"].pid).children(recursive=True):
        process.kill()  # first: where its parent is killed it is asked to end, and says good-bye
    deployed.running["lyon"].kill()
    deployed.running["lyon"].wait()
    life.join("lyon", HOUR)
    life.wait_for("lyon", "is connected", 2)
    assert deployed.end("lyon") == 130
    life.served()
    life.move()
    life.served()
    for site in SITES:
        path = deployed.folder / "kits" / site / "site.toml"
        path.write_text(path.read_text().replace(f"localhost:{before}", f"127.0.0.1:{deployed.port}"))
    life.join("lyon", HOUR)
    life.join("oslo", -HOUR)
    assert deployed.running["coordinator"].wait(240) == 0, deployed.said("coordinator")


def test_int8_over_the_network_has_the_bits_of_one_process(life: Life, tmp_path: Path) -> None:
    config, run = read_toml(life.deployed.config, FederationConfig), open_run(life.deployed.run)
    assert run.protocol.encoding == "int8"
    assert sorted(run.record(2)["sites"]) == sorted(SITES)
    alone = simulate(config, life.deployed.data, tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}", threads=1)
    assert final(run) == final(alone)


def test_a_clock_that_is_an_hour_off_changes_nothing_and_is_said(life: Life) -> None:
    for site, ahead in (("lyon", HOUR), ("oslo", -HOUR)):
        found = re.search(rf"site '{site}': this machine's clock is ([+-]\d+) s off", life.deployed.said(site))
        assert found and abs(int(found[1]) - ahead) < 10
        assert f"site '{site}': round 2" in life.deployed.said(site)


def test_a_site_that_was_killed_is_taken_back_at_once_though_it_still_counts_as_online(life: Life) -> None:
    assert "tries again in" not in life.deployed.said("lyon"), "Flower refuses it for a minute"


def test_a_site_follows_to_another_address_and_a_new_certificate_with_one_line_of_its_file(life: Life) -> None:
    first, second = life.certificates
    assert first != second
    text = (life.deployed.folder / "kits" / "lyon" / "site.toml").read_text()
    assert f'"127.0.0.1:{life.deployed.port}"' in text
    assert life.deployed.said("lyon").count("is connected") == 3
