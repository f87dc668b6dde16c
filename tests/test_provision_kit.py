"""Certificates, keys and kits: verified by OpenSSL in a real handshake, and never written over."""

import shutil
import signal
import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import KILLER, ROOT, TINY, merged, tiny, to_toml
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from warm import program

from wardround.client.kit import check_kit
from wardround.config import SiteConfig, read_site, read_toml
from wardround.errors import ConfigError
from wardround.provision import lines, provision
from wardround.provision.request import init
from wardround.server.membership import read_membership

SITES = ["lyon", "oslo"]


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    provision(tiny(), tmp_path / "kits", SITES, "federation.example.org:8500")
    return tmp_path / "kits"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def handshake(kits: Path, name: str, trust: Path) -> str:
    """Return the TLS version that a site and the coordinator agree on when the site asks for `name`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(kits / "coordinator" / "server.crt", kits / "coordinator" / "server.key")
    client = ssl.create_default_context(cafile=trust)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    here, there = socket.socketpair()

    def answer() -> None:
        try:
            server.wrap_socket(there, server_side=True).close()
        except (ssl.SSLError, OSError):
            there.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with here, client.wrap_socket(here, server_hostname=name) as secure:
            return str(secure.version())
    finally:
        thread.join()


@pytest.mark.parametrize("name", ["federation.example.org", "localhost", "127.0.0.1"])
def test_openssl_accepts_the_coordinator_by_each_of_its_names(kits: Path, name: str) -> None:
    assert handshake(kits, name, kits / "lyon" / "ca.crt") == "TLSv1.3"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")
def test_the_openssl_command_verifies_certificate_request_and_checksums(kits: Path, tmp_path: Path) -> None:
    strict = ["-x509_strict", "-purpose", "sslserver", "-verify_hostname", "federation.example.org"]
    trust = ["-CAfile", kits / "lyon" / "ca.crt", kits / "coordinator" / "server.crt"]
    subprocess.run(["openssl", "verify", *strict, *trust], check=True, capture_output=True)
    path, _ = init(tmp_path / "home", "pisa")
    said = subprocess.run(["openssl", "req", "-verify", "-noout", "-in", path], check=True, capture_output=True)
    assert b"verify OK" in said.stderr + said.stdout
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=kits / "lyon", check=True)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 6, 9, 14])
def test_a_kill_between_any_two_files_costs_nothing(calls: int, tmp_path: Path) -> None:
    """Only a killed process shows that the next run completes what is there."""
    config = tmp_path / "tiny.toml"
    config.write_text(to_toml(merged(TINY, {"membership": {"sites": {"lyon": 1.0, "oslo": 1.0}}})))
    command = ["provision", str(config), "--out", str(tmp_path / "kits")]
    killed = [program() / "python", "-c", KILLER, "pathlib.Path.replace", str(calls), *command]
    assert subprocess.run(killed, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    left = {name: block for name, block in contents(tmp_path).items() if "/." not in name}
    subprocess.run([str(program() / "wardround"), *command], cwd=ROOT, check=True, capture_output=True)
    after = contents(tmp_path)
    changed = {name for name, block in left.items() if after[name] != block}
    assert changed <= {"kits/coordinator/membership.json", "kits/coordinator/federation.json"}
    assert sorted(read_membership(tmp_path / "kits" / "coordinator").active) == ["lyon", "oslo"]
    for site in ("lyon", "oslo"):
        path = tmp_path / "kits" / site / "site.toml"
        path.write_text(path.read_text().replace("# folder", "folder"))
        check_kit(read_site(path), path)


def test_openssl_refuses_the_coordinator_by_another_name(kits: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(kits, "elsewhere.example.org", kits / "lyon" / "ca.crt")


def test_another_federations_ca_is_not_trusted(kits: Path, tmp_path: Path) -> None:
    provision(tiny(), tmp_path / "other", SITES)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(kits, "localhost", tmp_path / "other" / "lyon" / "ca.crt")


def test_a_kit_holds_no_secret_but_the_sites_own(kits: Path) -> None:
    names = {"README.md", "SHA256SUMS", "SHA256SUMS.sig", "ca.crt", "coordinator.pub", "site.key", "site.pub"}
    names |= {"site.toml", "compose.yaml"}
    assert {path.name for path in (kits / "lyon").iterdir()} == names
    secrets = [block for name, block in contents(kits / "coordinator").items() if name.endswith(".key")]
    assert len(secrets) == 4
    assert not set(secrets) & set(contents(kits / "lyon").values())
    assert (kits / "lyon" / "site.key").read_bytes() != (kits / "oslo" / "site.key").read_bytes()


def test_what_is_made_can_be_read_by_nobody_else(kits: Path) -> None:
    files = [path for path in kits.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".key"]) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    init(kits / "wien", "wien")
    assert {stat.S_IMODE((kits / name).stat().st_mode) for name in ("coordinator", "lyon", "wien")} == {0o700}


def test_a_sites_key_is_what_flower_takes_and_the_coordinator_holds_its_public_half(kits: Path) -> None:
    key = load_ssh_private_key((kits / "lyon" / "site.key").read_bytes(), None)
    public = load_ssh_public_key(read_membership(kits / "coordinator").keys["lyon"].encode())
    assert isinstance(key, EllipticCurvePrivateKey)
    assert isinstance(key.curve, SECP384R1)
    assert key.public_key() == public


def test_a_second_run_adds_the_missing_sites_and_changes_nothing_else(kits: Path) -> None:
    before = contents(kits)
    provision(tiny(), kits, ["lyon", "oslo", "pisa"], "federation.example.org:8500")
    after = contents(kits)
    changed = {name for name, block in before.items() if after[name] != block}
    assert changed == {"coordinator/membership.json"}
    assert (kits / "pisa" / "site.key").exists()


def test_a_kit_that_was_handed_over_is_not_made_again_with_another_key(kits: Path) -> None:
    public = read_membership(kits / "coordinator").keys["lyon"]
    for path in (kits / "lyon").iterdir():
        path.unlink()
    (kits / "lyon").rmdir()
    provision(tiny(), kits, SITES, "federation.example.org:8500")
    assert not (kits / "lyon").exists()
    assert read_membership(kits / "coordinator").keys["lyon"] == public


def test_what_a_crash_left_out_is_made_by_the_next_run(kits: Path) -> None:
    before = contents(kits)
    for name in ("coordinator/server.crt", "lyon/SHA256SUMS.sig", "lyon/site.toml"):
        (kits / name).unlink()
    provision(tiny(), kits, SITES, "federation.example.org:8500")
    after = contents(kits)
    assert after.keys() == before.keys()
    new = {"coordinator/server.crt", "lyon/SHA256SUMS.sig"}
    assert {name for name in before if after[name] != before[name]} == new
    assert handshake(kits, "localhost", kits / "oslo" / "ca.crt") == "TLSv1.3"


def test_a_new_address_needs_a_new_certificate_and_the_error_says_so(kits: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not for new\.example\.org; move it away"):
        provision(tiny(), kits, SITES, "new.example.org:8500")
    (kits / "coordinator" / "server.crt").rename(kits / "old.crt")
    provision(tiny(), kits, SITES, "new.example.org:8500")
    assert handshake(kits, "new.example.org", kits / "lyon" / "ca.crt") == "TLSv1.3"
    told = "whose site.toml names another address than new.example.org:8500: change it there"
    assert sum(told in line for line in lines(kits)) == 2  # nothing is written over


def test_the_certificate_of_a_new_address_is_for_the_same_key_and_for_an_old_host_where_server_names_has_it(
    kits: Path,
) -> None:
    """The server's names are added as an address is: by a certificate in the place of one that was moved away."""
    key = (kits / "coordinator" / "server.key").read_bytes()
    config = tiny(membership={"server_names": ["federation.example.org", "federation.example.com"]})
    with pytest.raises(ConfigError, match=r"is not for federation\.example\.com; move it away"):
        provision(config, kits, SITES)
    (kits / "coordinator" / "server.crt").rename(kits / "old.crt")
    provision(config, kits, SITES, "new.example.org:8500")
    for host in ("new.example.org", "federation.example.org", "federation.example.com"):
        assert handshake(kits, host, kits / "lyon" / "ca.crt") == "TLSv1.3"
    (kits / "coordinator" / "server.crt").unlink()
    provision(tiny(), kits, SITES, "new.example.org:8500")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(kits, "federation.example.org", kits / "lyon" / "ca.crt")
    assert (kits / "coordinator" / "server.key").read_bytes() == key


def test_a_kit_of_the_address_that_is_signed_is_told_without_more(kits: Path) -> None:
    assert not [line for line in lines(kits) if "another address" in line]


def test_a_public_key_that_is_not_the_kits_is_noticed(kits: Path) -> None:
    (kits / "lyon" / "site.key").write_bytes((kits / "oslo" / "site.key").read_bytes())
    with pytest.raises(ConfigError, match=r"site\.key: is not the key that was signed for 'lyon'"):
        provision(tiny(), kits, SITES, "federation.example.org:8500")


def test_site_toml_asks_for_the_folder_and_then_is_whole(kits: Path) -> None:
    path = kits / "lyon" / "site.toml"
    with pytest.raises(ConfigError, match="the key 'folder' is missing"):
        read_toml(path, SiteConfig)
    path.write_text(path.read_text().replace('# folder = "/data/images"', 'folder = "/data/images"'))
    site = read_toml(path, SiteConfig)
    assert site.name == "lyon"
    assert site.approved == ()
    assert site.coordinator is not None
    assert site.coordinator.address == "federation.example.org:8500"


@pytest.mark.parametrize("name", ["../oslo", "", "a/b", ".hidden", "coordinator", "x" * 64, "lyon\n"])
def test_a_name_that_cannot_be_a_folder_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a site"):
        provision(tiny(), tmp_path / "kits", ["lyon", name])
    assert not (tmp_path / "kits").exists()


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:0", "localhost:70000", "https://x:8500", 'a"b:8500', ":8500"]
)
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected host:port"):
        provision(tiny(), tmp_path / "kits", SITES, address)


def test_only_members_get_a_kit_where_the_config_lists_them(tmp_path: Path) -> None:
    config = tiny(membership={"sites": {"lyon": 1.0}})
    with pytest.raises(ConfigError, match="site 'oslo' is not in"):
        provision(config, tmp_path / "kits", SITES)
    provision(config, tmp_path / "kits", [])
    assert (tmp_path / "kits" / "lyon" / "site.toml").exists()


def test_an_ipv6_address_is_in_the_certificate(tmp_path: Path) -> None:
    provision(tiny(), tmp_path / "kits", SITES, "[::1]:8500")
    assert handshake(tmp_path / "kits", "::1", tmp_path / "kits" / "lyon" / "ca.crt") == "TLSv1.3"
