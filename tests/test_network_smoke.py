"""A federation over the real network: the command's own processes, TLS and site keys on, all on loopback.

Only these tests show that what crosses a network gives the same bits as one process, that the port
that sites reach lets nothing else through, and that a killed coordinator goes on with sites that stayed.
"""

import contextlib
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, end_all, merged, to_toml, write_labelled

from wardround.config import FederationConfig, read_toml
from wardround.plan import resolve
from wardround.processes import command, environment, free_port
from wardround.provision import provision, revoke
from wardround.server.run_folder import RunFolder, open_run
from wardround.server.scoring import read_asked
from wardround.simulate import simulate
from wardround.update import state_hash

pytestmark = [pytest.mark.slow, pytest.mark.network]

SITES = {"lyon": 20, "oslo": 30, "pisa": 20}
CHANGES = {"training": {"optimiser_state": "kept"}, "membership": {"sites": dict.fromkeys(SITES, 1.0)}}


@dataclass
class Deployment:
    """A federation with kits made and approved, whose processes are started by name and all ended at the end."""

    folder: Path
    config: Path
    data: Path
    port: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self, name: str, *command: str | Path) -> None:
        """Start `wardround COMMAND`; its output is `said(name)`."""
        self.start_python(name, "from wardround.cli import main; main()", *command)

    def start_python(self, name: str, code: str, *given: str | Path | int) -> None:
        """Start a Python program."""
        with (self.folder / f"{name}.out").open("ab") as out:
            arguments = [sys.executable, "-c", code, *map(str, given)]
            threads = {"OMP_NUM_THREADS": "1"}
            env = environment(self.folder) | threads
            self.running[name] = subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=out, stderr=out)

    def coordinate(self) -> None:
        tracking = f"sqlite:///{self.folder / 'mlflow.db'}"
        kit = self.folder / "kits" / "coordinator"
        options = ["--kit", kit, "--out", self.run, "--tracking", tracking]  # the port is the kits'
        self.start("coordinator", "coordinate", self.config, *options)

    def join(self, site: str) -> None:
        self.start(site, "site", "run", self.folder / "kits" / site / "site.toml")

    def join_by_stock_supernode(self, site: str) -> None:
        """Join as who trusts Flower's own program more than ours: the same key, certificate and site.toml."""
        kit, node_config = self.folder / "kits" / site, self.folder / f"{site}.node.toml"
        node_config.write_text(f'site-config = "{kit / "site.toml"}"\n')
        arguments = command(
            "flower-supernode", "--superlink", f"localhost:{self.port}", "--root-certificates", kit / "ca.crt",
            "--auth-supernode-private-key", kit / "site.key", "--host", "127.0.0.1", "--port", free_port(),
            "--node-config", node_config,
        )  # fmt: skip
        with (self.folder / f"{site}.out").open("ab") as out:
            env = environment(self.folder / f"{site}-flower") | {"OMP_NUM_THREADS": "1"}
            self.running[site] = subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=out, stderr=out)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def wait_until(self, name: str, text: str, seconds: float = 90) -> None:
        """Wait until a process has said something."""
        deadline = time.monotonic() + seconds
        while text not in self.said(name):
            assert time.monotonic() < deadline, f"'{name}' did not say '{text}':\n{self.said(name)}"
            time.sleep(0.1)

    def end(self, name: str, seconds: float = 30) -> int:
        """End a process as Ctrl-C would, and return its exit status."""
        self.running[name].terminate()
        return self.running[name].wait(seconds)


@contextlib.contextmanager
def deployment(folder: Path, data: Path) -> Iterator[Deployment]:
    config = folder / "tiny.toml"
    config.write_text(to_toml(merged(TINY, CHANGES)))
    deployed = Deployment(folder, config, data)
    federation = read_toml(config, FederationConfig)
    anyone = federation.model_copy(update={"membership": federation.membership.model_copy(update={"sites": {}})})
    provision(anyone, folder / "kits", ["stranger"], f"localhost:{deployed.port}")
    provision(federation, folder / "kits", list(SITES))  # who is not listed is not registered
    for site in (*SITES, "stranger"):
        fill_in(folder / "kits" / site / "site.toml", data, resolve(federation).digest)
    try:
        yield deployed
    finally:
        end_all(deployed.running.values())


def fill_in(path: Path, data: Path, digest: str) -> None:
    """Do what a site does with its kit: name the images, approve the protocol."""
    text = path.read_text().replace("approved = []", f'approved = ["{digest}"]').replace("threads = 0", "threads = 1")
    images = f'folder = "{data}"\nkind = "labelled"\nsite = "{path.parent.name}"'
    path.write_text(text.replace('# folder = "/data/images"', images))


def final(run: RunFolder) -> str:
    return state_hash(run.checkpoint(run.committed()[-1]).state)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"), SITES)


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the hash of the final state of the same federation in one process."""
    folder = tmp_path_factory.mktemp("in-process")
    (folder / "tiny.toml").write_text(to_toml(merged(TINY, CHANGES)))
    config = read_toml(folder / "tiny.toml", FederationConfig)
    return final(simulate(config, data, folder / "run", f"sqlite:///{folder / 'mlflow.db'}", threads=1))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Give a federation that ran to its end: strangers knocked before it began, and its coordinator was killed once."""
    with deployment(tmp_path_factory.mktemp("network"), data) as deployed:
        deployed.coordinate()
        deployed.wait_until("coordinator", "sites connect to")
        knock(deployed)
        for site in SITES:
            deployed.join(site)
        deployed.wait_until("oslo", "site 'oslo': round 2", 180)
        deployed.running["coordinator"].kill()
        deployed.running["coordinator"].wait()
        deployed.coordinate()
        assert deployed.running["coordinator"].wait(240) == 0, deployed.said("coordinator")
        yield deployed


def knock(deployed: Deployment) -> None:
    """Ask, with the CA but no key, for everything that is not a site's; then join with a key that nobody registered."""
    trust = ssl.create_default_context(cafile=deployed.folder / "kits" / "lyon" / "ca.crt")
    for path in ("control/list-runs", "control/start-run", "control/register-node", "runtime/acquire-task",
                 "fleet/register-node", "fleet/unregister-node", "fleet/../control/list-runs"):  # fmt: skip
        request = urllib.request.Request(f"https://localhost:{deployed.port}/v1/{path}", b"", method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, context=trust)
        refused.value.close()
        assert refused.value.code == 404, path
    deployed.join("stranger")
    deployed.wait_until("stranger", "tries again")
    deployed.end("stranger")


def test_the_final_state_is_bit_equal_to_that_of_one_process_that_nobody_killed(
    finished: Deployment, expected: str
) -> None:
    run = open_run(finished.run)
    assert run.committed() == [0, 1, 2]
    assert sorted(run.record(2)["sites"]) == sorted(SITES)
    assert final(run) == expected


def test_sites_stay_while_their_coordinator_is_killed_and_started_again(finished: Deployment) -> None:
    for site in SITES:
        assert "tries again in" not in finished.said(site)
        assert finished.said(site).count("is connected") == 1


def test_a_key_that_is_not_registered_is_refused(finished: Deployment) -> None:
    assert "site 'stranger': the coordinator does not know its key" in finished.said("stranger")
    assert "is connected" not in finished.said("stranger")


def test_each_side_says_what_happens_in_a_few_lines(finished: Deployment) -> None:
    rounds = [line for line in finished.said("coordinator").splitlines() if line.startswith("round ")]
    assert [line.partition(":")[0] for line in rounds] == ["round 1 of 2", "round 2 of 2"]
    over = "its answer is sent; the federation has no more rounds: wait, or stop it"
    for line in ("is connected", "round 1", "its answer is sent", "round 2", over):
        assert f"site 'pisa': {line}" in finished.said("pisa").splitlines()


def test_the_coordinator_keeps_no_word_of_a_sites_files_or_patients(finished: Deployment) -> None:
    rows = [row.split(",") for row in (finished.data / "labels.csv").read_text().splitlines()[1:]]
    words = [word.encode() for row in rows for word in (row[0], row[2])] + [str(finished.data).encode()]
    for path in finished.run.rglob("*"):
        if path.is_file():
            assert not [word for word in words if word in path.read_bytes()], path


def test_sites_are_not_told_where_the_coordinator_keeps_its_run(finished: Deployment) -> None:
    for site in SITES:
        for path in (finished.folder / "kits" / site / "work").rglob("*"):
            if path.is_file():
                assert str(finished.run).encode() not in path.read_bytes(), path


def test_flowers_own_copies_of_the_updates_are_removed_at_the_end(finished: Deployment) -> None:
    assert not list((finished.run / "flower").glob("state.db*"))


def test_sites_are_asked_for_scores_after_the_last_round_and_answer_as_they_agreed(finished: Deployment) -> None:
    site = finished.folder / "kits" / "lyon" / "site.toml"
    lent = {"folder": str(finished.data), "patients": 2}
    site.write_text(site.read_text() + to_toml({"evaluation": lent}))
    kit = finished.folder / "kits" / "coordinator"
    revoke(finished.folder / "kits", "pisa")
    finished.start("asked", "evaluate", finished.run, "--federated", "--kit", kit)
    assert finished.running["asked"].wait(120) == 0, finished.said("asked")
    asked = read_asked(open_run(finished.run))
    assert set(asked.scores) == {"lyon"} and set(asked.refused) == {"oslo"}  # whose key was taken back is not asked
    assert "linear probe, mean over sites" in finished.said("asked")


def test_sites_stop_when_told_and_leave_nothing_running(finished: Deployment) -> None:
    for site in SITES:
        assert finished.end(site) == 130
    home = str(finished.folder)
    left = [process for process in psutil.process_iter() if any(home in word for word in arguments(process))]
    assert not left


def test_what_dies_at_the_coordinator_is_started_again_and_a_stock_supernode_may_be_among_the_sites(
    data: Path, expected: str, tmp_path: Path
) -> None:
    with deployment(tmp_path, data) as deployed:
        deployed.coordinate()
        deployed.wait_until("coordinator", "sites connect to")
        deployed.join("lyon")
        deployed.join("oslo")
        deployed.join_by_stock_supernode("pisa")
        for site, program in (("lyon", "flower-superlink"), ("oslo", "wardround.server.rounds_process")):
            deployed.wait_until(site, f"site '{site}': round ", 180)
            before = deployed.said("coordinator").count("Starts again in")
            kill(program, tmp_path)
            until(lambda seen=before: deployed.said("coordinator").count("Starts again in") > seen)
        assert deployed.running["coordinator"].wait(240) == 0, deployed.said("coordinator")
        assert final(open_run(deployed.run)) == expected


def test_a_federation_that_cannot_go_on_ends_with_the_reason_in_one_line(data: Path, tmp_path: Path) -> None:
    with deployment(tmp_path, data) as deployed:
        deployed.config.write_text(to_toml(merged(TINY, merged(CHANGES, {"membership": {"wait_seconds": 1.0}}))))
        provision(read_toml(deployed.config, FederationConfig), tmp_path / "kits")
        deployed.coordinate()
        assert deployed.running["coordinator"].wait(120) == 2
        last = deployed.said("coordinator").splitlines()[-1]
        assert last.startswith("error: round 1: 0 of 3 sites gave an update, 3 are needed. 'lyon' silent")


def kill(program: str, folder: Path) -> None:
    """Kill the one process of a program that works in a folder, as the kernel does where memory runs out."""

    def own() -> list[psutil.Process]:
        found = [process for process in psutil.process_iter() if any(w.endswith(program) for w in arguments(process))]
        return [process for process in found if any(str(folder) in word for word in arguments(process))]

    def killed() -> bool:
        for process in own():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                return True
        return False

    until(killed)  # it may just be starting again


def until(holds: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
