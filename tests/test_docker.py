"""A federation of containers, built from docker/ and started from fresh kits by their own compose files.

Only real containers show that the programs live with a read-only root, no capability and an account that is not
root, and that health means what it says. `make containers` runs it: it builds 7 GB, which takes minutes.

Where no registry of images is reached, the base is made with debootstrap. Podman as root without systemd wants a
CONTAINERS_CONF with `cgroup_manager = "cgroupfs"`, `events_logger = "file"`, `log_driver = "k8s-file"` and default
limits (`default_ulimits`) that this machine allows.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, TINY, merged, to_toml

from wardround import __version__
from wardround.config import FederationConfig, read_toml
from wardround.data import write_hospitals
from wardround.plan import resolve
from wardround.provision import provision
from wardround.server.run_folder import open_run

ENGINE = next((name for name in ("podman", "docker") if shutil.which(name)), "")
ACCOUNT = 10001
SITES = ("hillcrest", "northgate")
CONFIG = merged(TINY, {"name": "contained", "membership": {"sites": dict.fromkeys(SITES, 1.0), "min_sites": 2}})
IMAGES = {name: f"localhost/wardround-{name}:{__version__}" for name in ("site", "coordinator")}
OFFICIAL, OWN = "python:3.11-slim", "localhost/wardround-base:bookworm"
NETWORK = "wardround-test"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("WARDROUND_CONTAINERS" not in os.environ, reason="builds images: `make containers` asks for it"),
    pytest.mark.skipif(not ENGINE, reason="neither podman nor docker is installed"),
]


def ask(*arguments: str | Path, seconds: float = 60) -> str:
    """Return what the engine prints."""
    done = subprocess.run([ENGINE, *map(str, arguments)], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}: {done.stderr}"
    return done.stdout.strip()


def works(*arguments: str | Path) -> bool:
    """Return whether the engine ends well."""
    return subprocess.run([ENGINE, *map(str, arguments)], capture_output=True, timeout=120).returncode == 0


@dataclass
class Containers:
    """A folder of the coordinator's with kits in it, and the containers that were started from there."""

    folder: Path

    @property
    def kits(self) -> Path:
        return self.folder / "kits"

    def compose(self, who: str, *words: str, ends: int = 0) -> str:
        """Call podman-compose, or Docker's, with the file that `who` was given, on the test's network alone."""
        name = "coordinator" if who == "coordinator" else "cpu"
        given = ROOT / "docker/compose.coordinator.yaml" if who == "coordinator" else self.kits / who / "compose.yaml"
        network = {"external": True, "name": NETWORK}
        networks = {"sites" if who == "coordinator" else "default": network}
        named = {name: {"container_name": f"wardround-test-{who}"}}
        if who == "coordinator":
            named["mlflow-sqlite"] = {"container_name": "wardround-test-mlflow"}
        override = {"services": named, "networks": networks}
        beside = self.folder / f"{who}.json"  # JSON is YAML
        beside.write_text(json.dumps(override))
        program = [str(Path(sys.executable).parent / "podman-compose")] if ENGINE == "podman" else ["docker", "compose"]
        profile = "sqlite" if who == "coordinator" else "cpu"
        env = os.environ | {"COORDINATOR": str(self.folder), "IMAGES": str(self.folder / "hospitals" / who)}
        options = ["-p", f"wardround-test-{who}", "-f", str(given), "-f", str(beside), "--profile", profile]
        done = subprocess.run([*program, *options, *words], env=env, capture_output=True, text=True, timeout=180)
        assert done.returncode == ends, done.stderr
        return done.stdout

    def wait_until_well(self, who: str, seconds: float = 240) -> float:
        """Return after how many seconds a container's own health check says that it is well."""
        began = time.monotonic()
        while not self.is_well(who):
            assert time.monotonic() < began + seconds, self.said(who)
            time.sleep(1)
        return time.monotonic() - began

    def is_well(self, who: str) -> bool:
        """Return what the image's health check says now."""
        if ENGINE == "podman":  # which has timers by systemd alone
            return works("healthcheck", "run", f"wardround-test-{who}")
        return ask("inspect", "--format", "{{.State.Health.Status}}", f"wardround-test-{who}") == "healthy"

    def inside(self, who: str, *command: str) -> str:
        return ask("exec", f"wardround-test-{who}", *command)

    def said(self, who: str) -> str:
        done = subprocess.run([ENGINE, "logs", f"wardround-test-{who}"], capture_output=True, text=True)
        return done.stdout + done.stderr

    def memory(self, who: str) -> str:
        return ask("stats", "--no-stream", "--format", "{{.MemUsage}}", f"wardround-test-{who}")


@pytest.fixture(scope="module")
def images() -> dict[str, float]:
    """Build both images; return how many seconds each took, and how many bytes it has."""
    if not works("info"):
        pytest.skip(f"{ENGINE} is installed, but its engine does not run")
    base = OFFICIAL if works("pull", OFFICIAL) else _own_base()
    build = f"--build-arg BASE_IMAGE={base}"
    if ENGINE == "podman" and (trusted := os.environ.get("SSL_CERT_FILE")):  # a registry's mirror with a CA of its own
        build += f" -v {trusted}:/etc/ssl/certs/ca-certificates.crt:ro"
    began = time.monotonic()
    subprocess.run(["make", "images", f"ENGINE={ENGINE}", f"BUILD={build}"], cwd=ROOT, check=True, timeout=3600)
    sizes = {image: float(ask("inspect", "--format", "{{.Size}}", image)) / 1e9 for image in IMAGES.values()}
    return {"build, s": time.monotonic() - began, **sizes}


def _own_base() -> str:
    """Return an image of Debian 12 with Python 3.11, made once."""
    if not works("image", "inspect", OWN):
        if shutil.which("debootstrap") is None or os.geteuid() != 0:
            pytest.skip(f"{OFFICIAL} cannot be pulled, and making a base takes debootstrap and root")
        packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
        script = (
            f"d=$(mktemp -d) && debootstrap --variant=minbase {packages} bookworm $d/root >&2 "
            f"&& tar -C $d/root -c . | {ENGINE} import - {OWN} && rm -r $d"
        )
        subprocess.run(["bash", "-eo", "pipefail", "-c", script], check=True, timeout=900)
    return OWN


@pytest.fixture(scope="module")
def containers(images: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """Give a coordinator and one of its two sites, both well and not yet in a round."""
    made = Containers(tmp_path_factory.mktemp("contained"))
    (made.folder / "federation.toml").write_text(to_toml(CONFIG))
    config = read_toml(made.folder / "federation.toml", FederationConfig)
    provision(config, made.kits, address="coordinator:8500")
    write_hospitals(made.folder / "hospitals", seed=7, patients=8)
    for name in ("runs", "mlflow", *(f"kits/{site}/work" for site in SITES)):
        (made.folder / name).mkdir()
    for site in SITES:
        toml = made.kits / site / "site.toml"
        text = toml.read_text().replace('# folder = "/data/images"', 'folder = "/data/images"')
        toml.write_text(text.replace("approved = []", f'approved = ["{resolve(config).digest}"]'))
    subprocess.run(["chown", "-R", f"{ACCOUNT}:{ACCOUNT}", made.folder], check=True)  # as the kit's README says
    works("network", "rm", "--force", NETWORK)
    ask("network", "create", "--internal", NETWORK)
    try:
        made.compose("coordinator", "up", "-d")
        images["coordinator well after, s"] = made.wait_until_well("coordinator")
        made.wait_until_well("mlflow")
        made.compose(SITES[0], "up", "-d")
        images["site well after, s"] = made.wait_until_well(SITES[0])
        for who in ("coordinator", "mlflow", SITES[0]):
            print(f"\n{who}, waiting: {made.memory(who)}")
        yield made
    finally:
        for who in (*SITES, "coordinator"):
            with suppress(AssertionError):
                made.compose(who, "down")
        works("network", "rm", "--force", NETWORK)
        print(f"\n{images}")


def test_a_compressed_image_is_loaded_as_the_kits_readme_says(containers: Containers) -> None:
    """A small one: the site's own takes minutes."""
    small, archive = "localhost/wardround-small:1", containers.folder / "small.tar.gz"
    base = OWN if works("image", "inspect", OWN) else OFFICIAL
    ask("tag", base, small)
    subprocess.run(["bash", "-o", "pipefail", "-c", f"{ENGINE} save {small} | gzip -1 > {archive}"], check=True)
    ask("rmi", small)
    readme = (containers.kits / SITES[0] / "README.md").read_text()
    (line,) = [line for line in readme.splitlines() if "gunzip" in line]
    load = line.replace("IMAGE", "small").replace("docker", ENGINE)
    subprocess.run(["bash", "-o", "pipefail", "-c", load], cwd=containers.folder, check=True, capture_output=True)
    assert works("image", "inspect", small)
    ask("rmi", small)


@pytest.mark.parametrize("who", ["coordinator", "mlflow", SITES[0]])
def test_no_process_has_root_or_a_capability_or_may_gain_one(containers: Containers, who: str) -> None:
    script = "grep -hE '^(Uid|CapEff|CapPrm|CapBnd|NoNewPrivs|Seccomp):' /proc/[0-9]*/status | sort -u"
    lines = [line.split() for line in containers.inside(who, "sh", "-c", script).splitlines()]
    found = {line[0]: set(line[1:]) for line in lines}
    assert len(lines) == len(found) == 6, lines  # the same of every process
    assert found["Uid:"] == {str(ACCOUNT)}
    assert found["CapEff:"] | found["CapPrm:"] | found["CapBnd:"] == {"0" * 16}
    assert found["NoNewPrivs:"] == {"1"}
    assert found["Seccomp:"] == {"2"}


@pytest.mark.parametrize(
    ("who", "fixed", "written"),
    [
        ("coordinator", ["/", "/opt/wardround", "/coordinator", "/coordinator/kit"], ["/coordinator/runs", "/tmp"]),
        ("mlflow", ["/", "/opt/wardround"], ["/mlflow", "/tmp"]),
        (SITES[0], ["/", "/opt/wardround", "/site", "/data/images"], ["/site/work", "/tmp"]),
    ],
)
def test_only_one_folder_and_a_bounded_tmp_are_written(
    containers: Containers, who: str, fixed: list[str], written: list[str]
) -> None:
    for folder in fixed:
        said = containers.inside(who, "sh", "-c", f"touch {folder}/x 2>&1 || true")
        assert "Read-only file system" in said, folder
    for folder in written:
        containers.inside(who, "sh", "-c", f"touch {folder}/x && rm {folder}/x")
    tmp = [line.split() for line in containers.inside(who, "cat", "/proc/mounts").splitlines() if " /tmp " in line]
    assert {"noexec", "nosuid", "nodev", "size=2097152k"} <= set(tmp[0][3].split(","))


def test_the_coordinators_container_does_not_have_the_cas_key(containers: Containers) -> None:
    assert (containers.kits / "coordinator" / "ca.key").stat().st_size > 0
    assert containers.inside("coordinator", "cat", "/coordinator/kit/ca.key") == ""


def test_the_gate_is_all_that_the_coordinator_listens_with_and_a_site_listens_on_nothing(
    containers: Containers,
) -> None:
    assert _listening(containers, "coordinator") == {8500}
    assert _listening(containers, "mlflow") == {5000}  # on a network that sites are not on
    assert _listening(containers, SITES[0]) == set()


def _listening(containers: Containers, who: str) -> set[int]:
    """Return the ports that other containers reach; on loopback there are SuperLink's, and the engine's resolver's."""
    text = containers.inside(who, "cat", "/proc/net/tcp", "/proc/net/tcp6")
    rows = [line.split() for line in text.splitlines() if ":" in line.split()[1]]
    ends = [row[1].split(":") for row in rows if row[3] == "0A"]  # listening
    return {int(port, 16) for address, port in ends if not address.endswith("7F") or len(address) != 8}


def test_a_site_reaches_the_gate_and_nothing_else(containers: Containers) -> None:
    code = (
        "import socket, sys\n"
        "for host, port in (('coordinator', 8500), ('mlflow', 5000), ('192.0.2.1', 443)):\n"
        "    try: socket.create_connection((host, port), 3).close(); print(host)\n"
        "    except OSError: pass\n"
    )
    assert containers.inside(SITES[0], "python", "-c", code).split() == ["coordinator"]
    assert containers.inside("coordinator", "python", "-c", code).split() == ["coordinator", "mlflow"]
    routes = containers.inside(SITES[0], "cat", "/proc/net/route").splitlines()[1:]
    assert all(route.split()[1] != "00000000" for route in routes), "there is no way out of the network"


def test_memory_and_processes_are_bounded(containers: Containers) -> None:
    for who, gigabytes, pids in (("coordinator", 8, 512), ("mlflow", 2, 512), (SITES[0], 16, 1024)):
        limits = "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}"
        assert ask("inspect", "--format", limits, f"wardround-test-{who}") == f"{gigabytes * 2**30} {pids}"


def test_the_site_checks_its_dicom_in_its_container(containers: Containers) -> None:
    config = (containers.folder / "federation.toml").read_text()
    (containers.kits / SITES[0] / "federation.toml").write_text(config)
    said = containers.compose(SITES[0], *_from_readme(containers, "site check"), ends=3)  # warnings
    assert "compare it by telephone" in said
    assert "cut off" in said  # the hospital has odd files
    assert "coordinator:8500 answers" in said


def _from_readme(containers: Containers, command: str) -> list[str]:
    """Return the words of a command in the kit's README after its profile, which the test gives."""
    readme = (containers.kits / SITES[0] / "README.md").read_text()
    (line,) = [line for line in readme.splitlines() if line.startswith("    docker compose") and f" {command} " in line]
    return line.replace("FEDERATION", "federation").split("--profile cpu ")[1].split()


def test_the_federation_runs_to_its_end_and_health_tells_who_is_connected(
    containers: Containers, images: dict[str, float]
) -> None:
    containers.compose(SITES[1], "up", "-d")
    began = time.monotonic()
    while ask("inspect", "--format", "{{.State.Running}}", "wardround-test-coordinator") == "true":
        assert time.monotonic() < began + 300, containers.said("coordinator")
        time.sleep(1)
    assert ask("inspect", "--format", "{{.State.ExitCode}}", "wardround-test-coordinator") == "0"
    run = open_run(containers.folder / "runs" / "federation")
    assert run.committed() == [0, 1, 2]
    assert sorted(run.record(2)["sites"]) == sorted(SITES)
    images["two rounds, s"] = time.monotonic() - began
    print(f"\n{SITES[0]}, after its rounds: {containers.memory(SITES[0])}")
    assert "contained/1" in containers.inside("mlflow", "wardround", "models", "--tracking", "http://mlflow:5000")
    assert containers.is_well(SITES[0])  # its last beat was just now
    while containers.is_well(SITES[0]):
        assert time.monotonic() < began + 500, "nobody hears it any more"
        time.sleep(5)
