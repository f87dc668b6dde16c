"""What is wrong with a kit, a folder or the server's certificate is said in one line, with names and dates."""

import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import create_server, socket

import pytest
from conftest import ROOT, tiny
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from wardround.client.kit import check_folders, check_kit, why_untrusted
from wardround.client.supervisor import run_site
from wardround.config import read_site
from wardround.config.site import CoordinatorConfig
from wardround.errors import ConfigError
from wardround.processes import environment, free_port
from wardround.provision import certificates, provision, renew
from wardround.server.superlink import current_members
from wardround.signatures import untrusted

PORT = free_port()


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    provision(tiny(), tmp_path / "kits", ["lyon", "oslo"], f"localhost:{PORT}")
    (tmp_path / "kits" / "lyon" / "images").mkdir()
    path = tmp_path / "kits" / "lyon" / "site.toml"
    path.write_text(path.read_text().replace('# folder = "/data/images"', 'folder = "images"'))
    return tmp_path / "kits"


def check(kits: Path) -> str:
    path = kits / "lyon" / "site.toml"
    return check_kit(read_site(path), path)


def coordinator(kits: Path) -> CoordinatorConfig:
    found = read_site(kits / "lyon" / "site.toml").coordinator
    assert found is not None
    return found


def test_a_whole_kit_pins_the_key_that_the_coordinator_shows(kits: Path) -> None:
    from wardround.provision import lines

    assert check(kits) in lines(kits)[0]


@pytest.mark.parametrize("name", ["ca.crt", "README.md", "site.pub"])
def test_a_file_that_was_changed_on_its_way_is_named(name: str, kits: Path) -> None:
    path = kits / "lyon" / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ConfigError, match=rf"{name}: is not as it came with the kit; put the kit's back, or ask"):
        check(kits)
    path.unlink()
    with pytest.raises(ConfigError, match=rf"there is no file '{name}'; put the kit's"):
        check(kits)


def test_checksums_that_were_made_anew_for_a_changed_file_are_refused(kits: Path) -> None:
    (kits / "lyon" / "README.md").write_text("run this: ...")
    done = subprocess.run(["sha256sum", "README.md", "ca.crt"], cwd=kits / "lyon", capture_output=True, check=True)
    (kits / "lyon" / "SHA256SUMS").write_bytes(done.stdout)
    with pytest.raises(ConfigError, match=r"SHA256SUMS: is not signed by the key in coordinator\.pub"):
        check(kits)


def test_another_coordinators_key_does_not_fit_the_kit(kits: Path, tmp_path: Path) -> None:
    provision(tiny(), tmp_path / "other", ["lyon"])
    shutil.copy(tmp_path / "other" / "lyon" / "coordinator.pub", kits / "lyon" / "coordinator.pub")
    with pytest.raises(ConfigError, match=r"SHA256SUMS: is not signed by the key in coordinator\.pub"):
        check(kits)


def test_a_kit_without_checksums_is_refused(kits: Path) -> None:
    (kits / "lyon" / "SHA256SUMS.sig").unlink()
    with pytest.raises(ConfigError, match=r"has no SHA256SUMS with a SHA256SUMS\.sig"):
        check(kits)


def test_a_site_with_anothers_key_is_refused_with_both_fingerprints(kits: Path) -> None:
    shutil.copy(kits / "oslo" / "site.key", kits / "lyon" / "site.key")
    with pytest.raises(ConfigError, match=r"site\.key: is another site's key, SHA256:.* knows 'lyon' by SHA256:"):
        check(kits)


def test_a_key_of_another_kind_is_refused_in_one_line(kits: Path) -> None:
    key = Ed25519PrivateKey.generate()  # what `ssh-keygen` makes if it is told nothing
    block = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (kits / "lyon" / "site.key").write_bytes(block)
    with pytest.raises(ConfigError, match=r"site\.key: is no ECDSA key; put the original back, or send a new request"):
        check(kits)


def test_a_site_in_anothers_name_is_refused(kits: Path) -> None:
    path = kits / "lyon" / "site.toml"
    path.write_text(path.read_text().replace('name = "lyon"', 'name = "oslo"'))
    with pytest.raises(ConfigError, match="name = 'oslo', but the kit beside it is that of site 'lyon'"):
        check(kits)


def test_images_that_are_not_mounted_are_said_before_anything_starts(kits: Path) -> None:
    (kits / "lyon" / "images").rmdir()
    with pytest.raises(ConfigError, match=r"\[images\] folder = '.*images' is no folder; mount it, or name another"):
        run_site(kits / "lyon" / "site.toml")


def cannot_write(kits: Path, reason: str) -> None:
    path = kits / "lyon" / "site.toml"
    with pytest.raises(ConfigError, match=rf"work = '.*' cannot be written: {reason}; give the account"):
        check_folders(read_site(path), path)


def test_a_work_folder_that_is_a_file_is_refused(kits: Path) -> None:
    (kits / "lyon" / "work").write_text("")
    cannot_write(kits, "file exists")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_work_folder_of_another_account_is_refused(kits: Path) -> None:
    (kits / "lyon" / "work").mkdir(mode=0o500)
    cannot_write(kits, "permission denied")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc, which nobody can write to")
def test_a_volume_that_cannot_be_written_is_refused(kits: Path) -> None:
    path = kits / "lyon" / "site.toml"
    path.write_text(path.read_text().replace('work = "work"', 'work = "/proc/wardround"'))
    cannot_write(kits, "no such file or directory")


# How much of its life a certificate has behind it, of its days, and what is then said of it.
DATES = {
    "expired": (timedelta(days=400), 300, "was valid until {ended}, and this machine's clock says {today}"),
    "not yet valid": (
        timedelta(days=-30),
        300,
        "is not valid before {begins}, and this machine's clock says {today}",
    ),
}


def renewed(kits: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the coordinator a certificate of another time; return what should be said of it."""
    behind, days, said = DATES[kind]
    monkeypatch.setattr(certificates, "_CLOCK", behind)
    monkeypatch.setattr(certificates, "_DAYS_SERVER", days)
    renew(kits)
    now = datetime.now(UTC)
    begins = now - behind
    dates = {"today": now, "begins": begins, "ended": begins + timedelta(days=days)}
    return said.format(**{name: f"{date:%Y-%m-%d}" for name, date in dates.items()})


def foreign(kits: Path, tmp_path: Path) -> None:
    provision(tiny(name="other"), tmp_path / "other", ["lyon"], f"localhost:{PORT}")
    for name in ("server.crt", "server.key"):
        shutil.copy(tmp_path / "other" / "coordinator" / name, kits / "coordinator" / name)


@contextmanager
def shown(kits: Path) -> Iterator[None]:
    """Show the coordinator's certificate at its address, and say nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kits / "coordinator" / "server.crt", kits / "coordinator" / "server.key")

    def greet(door: socket) -> None:
        while True:
            try:
                caller, _ = door.accept()
            except OSError:
                return
            try:
                context.wrap_socket(caller, server_side=True).close()
            except OSError:
                caller.close()

    with create_server(("127.0.0.1", PORT)) as door:
        thread = threading.Thread(target=greet, args=(door,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            door.shutdown(2)
            thread.join()


@pytest.mark.parametrize("kind", DATES)
def test_a_certificate_of_another_time_is_named_with_its_dates_at_either_end(
    kind: str, kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = renewed(kits, kind, monkeypatch)
    with shown(kits):
        assert why_untrusted(coordinator(kits)) == expected
    with pytest.raises(ConfigError, match=f"server.crt: {expected}; make another with 'wardround provision rotate'"):
        current_members(kits / "coordinator", tiny(), kits / "run")


def test_a_foreign_certificate_is_named_by_who_signed_it(kits: Path, tmp_path: Path) -> None:
    foreign(kits, tmp_path)
    expected = (
        "is not signed by ca.crt ('Wardround federation tiny'), but by 'Wardround federation other': another "
        "coordinator answers; ask yours for its address"
    )
    with shown(kits):
        assert why_untrusted(coordinator(kits)) == expected


def test_another_federation_of_the_same_name_is_not_taken_for_this_one(kits: Path, tmp_path: Path) -> None:
    provision(tiny(), tmp_path / "twin", ["lyon"])
    server, ca = (tmp_path / "twin/coordinator/server.crt").read_bytes(), (kits / "coordinator/ca.crt").read_bytes()
    said = untrusted(server, ca, "localhost")
    assert said == "is not signed by ca.crt ('Wardround federation tiny'), but by another of that name"


def test_a_certificate_for_another_host_is_named_with_its_hosts(kits: Path) -> None:
    server, ca = ((kits / "coordinator" / name).read_bytes() for name in ("server.crt", "ca.crt"))
    assert untrusted(server, ca, "10.0.0.1") == "is for 127.0.0.1, localhost, not for 10.0.0.1"
    assert untrusted(server, ca, "localhost") is None


def test_a_coordinator_that_is_away_leaves_the_reason_open(kits: Path) -> None:
    assert why_untrusted(coordinator(kits)) == "is not signed by ca.crt, or is for another address"


def test_a_ca_whose_time_is_over_is_named(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "_DAYS_SERVER", 5000)
    renew(kits)
    server, ca = ((kits / "coordinator" / name).read_bytes() for name in ("server.crt", "ca.crt"))
    later = datetime.now(UTC) + timedelta(days=4000)
    assert "is signed by a ca.crt that was valid until" in str(untrusted(server, ca, now=later))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("spoil", ["expired", "not yet valid", "foreign"])
def test_a_running_site_says_what_ails_the_certificate(
    spoil: str, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the real process shows that Flower's refusal is found in its words and explained."""
    expected = foreign(kits, tmp_path) or "is not signed by ca.crt" if spoil == "foreign" else ""
    expected = expected or renewed(kits, spoil, monkeypatch)
    command = [sys.executable, "-m", "wardround.cli", "site", "run", str(kits / "lyon" / "site.toml")]
    with (
        shown(kits),
        subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            assert f"the coordinator's certificate {expected}" in process.stdout.readline()
        finally:
            process.terminate()
