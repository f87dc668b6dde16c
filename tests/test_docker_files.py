"""What a person starts containers from: the same hardening everywhere, no wrong key, no secret, one port."""

import copy
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT, tiny

from wardround import __version__
from wardround.errors import ConfigError
from wardround.processes import free_port
from wardround.provision import provision, revoke
from wardround.server.gate import gate
from wardround.server.membership import read_membership
from wardround.server.superlink import current_members
from wardround.signatures import fingerprint

COORDINATOR = ROOT / "docker" / "compose.coordinator.yaml"
MANIFESTS = list(yaml.safe_load_all((ROOT / "docker" / "kubernetes" / "coordinator.yaml").read_text()))
KUBERNETES = kubernetes_validate.latest_version()


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kits")
    provision(tiny(membership={"sites": {"lyon": 1.0}}), out)
    return out


def schema_errors(path: Path) -> str:
    """Return what the Compose Specification's schema says against a file."""
    program = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run([program, "--builtin-schema", "vendor.compose-spec", path], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout if done.returncode else ""


def services(path: Path) -> dict[str, Any]:
    """Return a compose file's services, what they share filled in."""
    found = yaml.safe_load(path.read_text())["services"]
    assert found
    return dict(found)


def test_the_compose_files_follow_the_specification_and_a_misspelt_key_does_not(kits: Path, tmp_path: Path) -> None:
    kit = kits / "lyon" / "compose.yaml"
    assert schema_errors(COORDINATOR) == schema_errors(kit) == ""
    (tmp_path / "compose.yaml").write_text(kit.read_text().replace("cap_drop:", "cap_dorp:"))
    assert "cap_dorp" in schema_errors(tmp_path / "compose.yaml")


def test_every_container_is_hardened(kits: Path) -> None:
    for path in (COORDINATOR, kits / "lyon" / "compose.yaml"):
        for name, service in services(path).items():
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert service["user"] not in ("root", "0", "0:0"), name
            assert service["pids_limit"] and service["mem_limit"], name
            assert all("noexec,nosuid,nodev" in mount for mount in service["tmpfs"]), name
            assert not {"cap_add", "privileged", "devices", "network_mode", "pid", "ipc"} & service.keys(), name


def test_only_the_gate_is_published_and_mlflow_and_its_database_have_no_way_out(kits: Path) -> None:
    found = services(COORDINATOR)
    assert [name for name, service in found.items() if "ports" in service] == ["coordinator"]
    assert found["coordinator"]["ports"] == ["${WARDROUND_PORT:-8500}:8500"]
    assert yaml.safe_load(COORDINATOR.read_text())["networks"]["inside"] == {"internal": True}
    for name in found.keys() - {"coordinator"}:
        assert list(found[name]["networks"]) == ["inside"], name
    assert all("ports" not in service for service in services(kits / "lyon" / "compose.yaml").values())


def test_a_site_writes_to_its_work_folder_alone(kits: Path) -> None:
    for service in services(kits / "lyon" / "compose.yaml").values():
        mounts = {mount["target"]: mount.get("read_only", False) for mount in service["volumes"]}
        assert mounts == {
            "/site": True,
            "/site/work": False,
            "/ledger": False,
            "/data/images": True,
            "/data/labelled": True,
        }


@pytest.mark.parametrize(("given", "mounted"), [({}, "/dev/null"), ({"LABELLED": "/lent"}, "/lent")])
def test_labelled_images_are_mounted_where_they_are_named_and_nothing_else_is(
    given: dict[str, str], mounted: str, kits: Path
) -> None:
    """As podman-compose understands the files; the kit's own stays as its checksums have it."""
    program = [str(Path(sys.executable).parent / "podman-compose"), "--dry-run", "--profile", "cpu"]
    env = {"PATH": os.environ["PATH"], "COORDINATOR": "/c", "IMAGES": "/images", **given}
    for path, name in ((COORDINATOR, "coordinator"), (kits / "lyon" / "compose.yaml", "cpu")):
        done = subprocess.run([*program, "--file", path, "config"], env=env, capture_output=True, text=True, check=True)
        volumes = yaml.safe_load(done.stdout)["services"][name]["volumes"]
        found = [volume for volume in volumes if volume["target"] == "/data/labelled"]
        assert [(volume["source"], volume["read_only"]) for volume in found] == [(mounted, True)]


def test_what_the_site_is_told_to_write_into_its_env_file_mounts_what_its_site_toml_proposes(kits: Path) -> None:
    readme, toml = ((kits / "lyon" / name).read_text() for name in ("README.md", "site.toml"))
    told = set(re.findall(r"^    echo \"(\w+)=", readme, flags=re.MULTILINE))
    assert told == {"IMAGES", "LABELLED"}
    assert "`LEDGER=" in readme
    (service, *_) = services(kits / "lyon" / "compose.yaml").values()
    targets = {mount["target"] for mount in service["volumes"]}
    assert {"/ledger", *re.findall(r'folder = "(/data/\w+)"', toml)} <= targets
    assert '# ledger = "/ledger/' in toml


def test_the_kits_container_is_of_the_version_that_made_the_kit_and_is_covered_by_its_checksums(kits: Path) -> None:
    image = f"${{WARDROUND_IMAGE:-localhost/wardround-site:{__version__}}}"
    assert all(service["image"] == image for service in services(kits / "lyon" / "compose.yaml").values())
    assert f"wardround-coordinator:{__version__}}}" in COORDINATOR.read_text()
    assert f"wardround-coordinator:{__version__} " in (ROOT / "docker" / "kubernetes" / "coordinator.yaml").read_text()
    assert "  compose.yaml\n" in (kits / "lyon" / "SHA256SUMS").read_text()


def test_each_command_of_compose_that_people_are_told_names_its_profile(kits: Path) -> None:
    """Docker's guesses the profile of a service that is named; podman-compose knows of no service then."""
    for page in (kits / "lyon" / "README.md", ROOT / "docs" / "containers.md"):
        lines = re.findall(r"^\s*(docker compose .*)$", page.read_text(), flags=re.MULTILINE)
        assert len(lines) > 3, page
        assert [line for line in lines if "--profile " not in line] == [], page


def test_no_secret_stands_in_a_compose_file(kits: Path) -> None:
    for path in (COORDINATOR, kits / "lyon" / "compose.yaml"):
        for name, service in services(path).items():
            secret = [key for key in service.get("environment", {}) if re.search("PASSWORD|TOKEN|SECRET|KEY", key)]
            assert all(key.endswith("_FILE") for key in secret), name


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: str(manifest["kind"]))
def test_each_manifest_is_what_kubernetes_takes(manifest: dict[str, Any]) -> None:
    assert "namespace" not in manifest["metadata"]
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pod: pod["containers"][0]["securityContext"].update(readOnlyRootFileSystem=True),
        lambda pod: pod.update(terminationGracePeriodSeconds="a minute"),
        lambda pod: pod["containers"][0].pop("name"),
    ],
)
def test_a_wrong_manifest_is_refused(spoil: Callable[[dict[str, Any]], Any]) -> None:
    wrong = copy.deepcopy(MANIFESTS[0])
    spoil(wrong["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_the_pod_is_hardened_as_the_container_is_and_only_its_gate_is_reached() -> None:
    job, _, service, policy = MANIFESTS
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for one in (*pod["initContainers"], container):
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")} == {"runs", "tmp"}
    label = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == label
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["gate"]
    assert policy["spec"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": "gate"}]}]
    assert [port["name"] for port in container["ports"]] == ["gate"]


def test_the_pod_leaves_a_kit_that_the_coordinator_takes_and_that_follows_the_secret(
    kits: Path, tmp_path: Path
) -> None:
    """Kubernetes adds the group's right to read to a Secret's files, and changes them by one link, `..data`."""
    pod = MANIFESTS[0]["spec"]["template"]["spec"]
    (init,) = pod["initContainers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in init["volumeMounts"]}
    secret, kit = tmp_path / "secret", tmp_path / "kit"
    _mount_secret(kits / "coordinator", secret)
    config = tiny(membership={"sites": {"lyon": 1.0}})
    with pytest.raises(ConfigError, match=r"release\.key: others can read it"):
        current_members(secret, config, tmp_path / "run")
    kit.mkdir()
    *shell, script = init["command"]
    script = script.replace(mounts["secret"], str(secret)).replace(mounts["kit"], str(kit))
    for _ in range(2):  # a pod whose sandbox dies runs it again
        subprocess.run([*shell, script], check=True)
    assert sorted(current_members(kit, config, tmp_path / "run").keys) == ["lyon"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in kit.glob("*.key")} == {0o600}
    assert not (kit / "ca.key").exists()
    shutil.copytree(kits / "coordinator", tmp_path / "kits" / "coordinator")
    revoke(tmp_path / "kits", "lyon")
    _mount_secret(tmp_path / "kits" / "coordinator", secret)
    assert read_membership(kit).gone == {"lyon"}


def _mount_secret(kit: Path, secret: Path) -> None:
    """Lay a kit out as Kubernetes mounts the Secret that docs/containers.md makes of it."""
    page = (ROOT / "docs" / "containers.md").read_text()
    version = secret / f"..{len(list(secret.glob('..*')))}"
    version.mkdir(parents=True)
    for name in re.findall(r"--from-file=\$kit/(\S+)", page):
        shutil.copy(kit / name, version / name)
        (version / name).chmod(0o440)
        if not (secret / name).is_symlink():
            (secret / name).symlink_to(f"..data/{name}")
    (secret / "..next").symlink_to(version.name)
    (secret / "..next").replace(secret / "..data")


def test_the_pods_kit_is_memory_and_its_coordinator_cannot_change_it() -> None:
    pod = MANIFESTS[0]["spec"]["template"]["spec"]
    (init,), (container,) = pod["initContainers"], pod["containers"]
    assert {volume["name"]: volume for volume in pod["volumes"]}["kit"]["emptyDir"]["medium"] == "Memory"
    assert init["image"] == container["image"]
    places = [{m["name"]: m["mountPath"] for m in c["volumeMounts"] if m["name"] != "tmp"} for c in (init, container)]
    assert places[0].items() <= places[1].items(), "links lead to the same place in both"
    assert [m["name"] for m in init["volumeMounts"] if not m.get("readOnly")] == ["kit"]


def test_a_gate_without_a_superlink_behind_it_is_not_well(kits: Path, tmp_path: Path) -> None:
    port, kit = free_port(), kits / "coordinator"
    answers = [sys.executable, ROOT / "docker" / "answers.py", kit / "ca.crt", str(port)]
    assert subprocess.run(answers, stderr=subprocess.DEVNULL).returncode == 1  # nobody is there
    with gate(kit, "127.0.0.1", port, free_port(), tmp_path / "gate.log", 20):
        assert subprocess.run(answers, capture_output=True, text=True).stderr == ""  # TLS holds
        assert subprocess.run(answers).returncode == 1


def test_a_site_verifies_an_image_with_what_its_kit_pins_before_it_has_any_program_of_ours(
    kits: Path, tmp_path: Path
) -> None:
    """The commands are those of the Makefile and of the kit's README; the archive is a small one."""
    what = ["image-archive", f"KITS={kits}", "ENGINE=podman", "ARCHIVE=image.tar.gz"]
    plan = ["make", "-n", "--no-print-directory", *what]
    making = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (tmp_path / "dist").mkdir()
    archive = tmp_path / "dist" / "image.tar.gz"
    archive.write_bytes(b"layers")
    for line in making[2:]:  # not the first, which asks the engine for an image of gigabytes
        subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    readme = (kits / "lyon" / "README.md").read_text()
    verify = re.findall(r"^    ((?:openssl|sha256sum) .*IMAGE\.tar\.gz.*)$", readme, flags=re.MULTILINE)
    shutil.copy(kits / "lyon" / "coordinator.pub", tmp_path / "dist")

    def verdicts() -> list[bool]:
        lines = [line.replace("IMAGE", "image") for line in verify]
        return [subprocess.run(["sh", "-c", line], cwd=tmp_path / "dist").returncode == 0 for line in lines]

    assert verdicts() == [True, True]
    archive.write_bytes(b"other layers")
    assert verdicts() == [True, False]
    subprocess.run(["sh", "-c", "sha256sum image.tar.gz > image.tar.gz.sha256"], cwd=tmp_path / "dist", check=True)
    assert verdicts() == [False, True]


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_the_pinned_keys_fingerprint_is_shown_without_our_program(kits: Path) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = load_pem_public_key((kits / "lyon" / "coordinator.pub").read_bytes())
    (line,) = re.findall(r"^    (ssh-keygen .*)$", (kits / "lyon" / "README.md").read_text(), flags=re.MULTILINE)
    shown = subprocess.run(["sh", "-c", line], cwd=kits / "lyon", capture_output=True, text=True, check=True).stdout
    assert fingerprint(key) in shown  # type: ignore[arg-type]
