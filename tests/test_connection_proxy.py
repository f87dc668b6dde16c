"""A site behind a hospital's proxy: its connection takes that way alone, and what stands in the way is named."""

import contextlib
import socket
import socketserver
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, known_at, tiny
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_ssh_private_key
from cryptography.x509.oid import NameOID
from test_connection import Scripted, serving

from wardround.client.kit import check_kit, why_untrusted
from wardround.config import read_site
from wardround.config.site import CoordinatorConfig
from wardround.connection import site as connection
from wardround.errors import ConfigError
from wardround.processes import environment
from wardround.provision import provision

NAME = "coordinator.invalid"  # no resolver knows it: only who asks the proxy gets there
LOGIN = ("lyon", "s3cret-word")


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy that knows CONNECT alone, and leads whoever asks to one port of this machine."""

    daemon_threads = True

    def __init__(self, behind: int, login: tuple[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.behind, self.login = behind, login
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        self.refusal = ""  # in the place of a connection


class Tunnel(socketserver.StreamRequestHandler):
    """One connection through the proxy."""

    server: Proxy

    def handle(self) -> None:
        head = [line.decode().strip() for line in iter(self.rfile.readline, b"\r\n") if line]
        self.server.asked.append(head[0])
        given = [line.partition(": ")[2] for line in head if line.lower().startswith("proxy-authorization")]
        expected = f"Basic {b64encode(':'.join(self.server.login or ()).encode()).decode()}"
        unknown = self.server.login is not None and given != [expected]
        if refusal := "407 Proxy Authentication Required" if unknown else self.server.refusal:
            self.wfile.write(f"HTTP/1.1 {refusal}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        with socket.create_connection(("127.0.0.1", self.server.behind)) as there:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=pipe, args=(there, self.connection))
            back.start()
            pipe(self.connection, there)
            back.join()


def pipe(come: socket.socket, go: socket.socket) -> None:
    """Pass on what comes until it ends."""
    with contextlib.suppress(OSError):
        while block := come.recv(65536):
            go.sendall(block)
    with contextlib.suppress(OSError):
        go.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def proxy_to(behind: int, login: tuple[str, str] | None = None) -> Iterator[Proxy]:
    """Serve a proxy in a thread."""
    with Proxy(behind, login) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits")
    provision(tiny(membership={"server_names": [NAME]}), folder, ["lyon"], f"{NAME}:443")
    (folder / "lyon" / "images").mkdir()
    path = folder / "lyon" / "site.toml"
    path.write_text(path.read_text().replace('# folder = "/data/images"', 'folder = "images"'))
    return folder


@contextlib.contextmanager
def through(proxy: Proxy, kits: Path, login: Path | None = None) -> Iterator[connection.SiteConnection]:
    """Give a site's connection to the address that only the proxy knows."""
    key = load_ssh_private_key((kits / "lyon" / "site.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    with connection.connected(known_at(kits, f"{NAME}:443", proxy=proxy.address, proxy_credentials=login), key) as made:
        yield made


def test_a_site_reaches_the_coordinator_through_the_proxy_and_by_no_other_way(kits: Path) -> None:
    fleet = Scripted()
    with serving(fleet, kits) as port, proxy_to(port) as proxy, through(proxy, kits) as made:
        assert made.node == 7
        assert made.receive() is None
    assert set(proxy.asked) == {f"CONNECT {NAME}:443 HTTP/1.1"}
    assert fleet.asked[0] == "activate-node" and "pull-messages" in fleet.asked


def login(folder: Path) -> Path:
    """Write the proxy's name and password as a site keeps them."""
    path = folder / "proxy.txt"
    path.write_text(":".join(LOGIN) + "\n")
    path.chmod(0o600)
    return path


def test_a_proxy_that_asks_who_it_is_gets_the_name_and_password_of_the_file(kits: Path, tmp_path: Path) -> None:
    fleet = Scripted()
    with serving(fleet, kits) as port, proxy_to(port, LOGIN) as proxy, through(proxy, kits, login(tmp_path)) as made:
        assert made.node == 7


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            "407 Proxy Authentication Required",
            "; [coordinator] proxy_credentials names the file with its USER:PASSWORD",
        ),
        ("403 Forbidden", "; have the coordinator's address allowed there"),
        ("502 Bad Gateway", ""),
    ],
)
def test_what_the_proxy_refuses_is_said_with_the_remedy_and_tried_again(
    answer: str,
    said: str,
    kits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet = Scripted()
    with serving(fleet, kits) as port, proxy_to(port) as proxy:
        proxy.refusal = answer

        def mended(_: float) -> None:
            proxy.refusal = ""

        monkeypatch.setattr(connection.time, "sleep", mended)
        with through(proxy, kits, login(tmp_path)) as made:
            assert made.node == 7
    way = proxy.address
    assert f"the coordinator cannot be reached (by the proxy {way}: it answers {answer}{said})" in caplog.messages
    assert LOGIN[1] not in caplog.text


def test_the_environments_proxy_does_not_count(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy_to(9) as environments:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, environments.address)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        fleet = Scripted()
        with serving(fleet, kits) as port, proxy_to(port) as proxy, through(proxy, kits) as made:
            assert made.node == 7
        assert environments.asked == []


def inspector(folder: Path) -> Path:
    """Write the certificate that a TLS-inspecting proxy makes of the coordinator's, by a CA of its own."""
    own = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "St Mary's Web Gateway")]))
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    (folder / "coordinator").mkdir()
    (folder / "coordinator" / "server.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    key = own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "coordinator" / "server.key").write_bytes(key)
    return folder


def inspected(proxy: str) -> str:
    return (
        "is not signed by ca.crt ('Wardround federation tiny'), but by 'St Mary's Web Gateway': the proxy "
        f"{proxy} inspects TLS; have {NAME}:443 exempted from inspection"
    )


def test_a_proxy_that_opens_tls_is_never_trusted_and_is_named_with_its_issuer(kits: Path, tmp_path: Path) -> None:
    known, fleet = login(tmp_path), Scripted()
    with serving(fleet, inspector(tmp_path)) as port, proxy_to(port, LOGIN) as proxy:
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"), through(proxy, kits, known):
            pass
        way = proxy.address
        found = coordinator(kits, proxy=way, proxy_credentials=known)
        assert why_untrusted(found) == inspected(way)
    assert fleet.asked == [], "not a byte of the protocol reached it"


def coordinator(kits: Path, **changes: object) -> CoordinatorConfig:
    found = read_site(kits / "lyon" / "site.toml").coordinator
    assert found is not None
    return found.model_copy(update=changes)


def site_toml(kits: Path, folder: Path, lines: str) -> Path:
    """Write a site.toml beside the kit's, with these lines in [coordinator]."""
    path = kits / "lyon" / f"{folder.name}.toml"
    path.write_text(f"{(kits / 'lyon' / 'site.toml').read_text().rstrip()}\n{lines}\n")
    return path


@pytest.mark.parametrize(
    "proxy", ["proxy.hospital:3128", "http://lyon:s3cret-word@proxy:3128", "https://proxy:3128", "http://proxy"]
)
def test_what_is_no_proxys_address_is_refused_without_being_quoted(proxy: str, kits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[coordinator\.proxy\] is no http://host:port") as caught:
        read_site(site_toml(kits, tmp_path, f'proxy = "{proxy}"'))
    assert "s3cret" not in str(caught.value)


def test_credentials_without_a_proxy_are_refused(kits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="proxy_credentials is for a proxy"):
        read_site(site_toml(kits, tmp_path, 'proxy_credentials = "proxy.txt"'))


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0o600, "cannot be read: No such file or directory"),
        ("lyon:s3cret-word", 0o644, "other accounts can read it; 'chmod 600' it"),
        ("", 0o600, "holds not one line"),
        ("lyon:s3cret-word\nagain", 0o600, "holds not one line"),
        ("s3cret-word", 0o600, "has no colon"),
    ],
)
def test_credentials_are_looked_at_before_anything_starts_and_never_quoted(
    content: str | None, mode: int, said: str, kits: Path, tmp_path: Path
) -> None:
    path = tmp_path / "proxy.txt"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    toml = site_toml(kits, tmp_path, f'proxy = "http://proxy:3128"\nproxy_credentials = "{path}"')
    with pytest.raises(ConfigError, match=said) as caught:
        check_kit(read_site(toml), toml)
    assert "s3cret" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.network
def test_a_running_site_says_what_stands_in_its_way(kits: Path, tmp_path: Path) -> None:
    """Only the real process shows that the proxy's words and the foreign certificate are explained to a person."""
    (tmp_path / "proxy.txt").write_text(":".join(LOGIN))
    (tmp_path / "proxy.txt").chmod(0o600)
    (tmp_path / "images").mkdir()
    with serving(Scripted(), inspector(tmp_path)) as port, proxy_to(port, LOGIN) as proxy:
        way, proxy.refusal = proxy.address, "403 Forbidden"
        lines = f'proxy = "{way}"\nproxy_credentials = "{tmp_path / "proxy.txt"}"'
        command = [sys.executable, "-m", "wardround.cli", "site", "run", str(site_toml(kits, tmp_path, lines))]
        env = environment(tmp_path) | {"HTTPS_PROXY": "http://127.0.0.1:9"}
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as site:
            assert site.stdout is not None
            try:
                refused = "it answers 403 Forbidden; have the coordinator's address allowed there"
                first = f"site 'lyon': cannot reach the coordinator by the proxy {way}: {refused}; keeps trying (see "
                assert site.stdout.readline().startswith(first)
                proxy.refusal = ""
                assert f"the coordinator's certificate {inspected(way)}" in site.stdout.readline()
            finally:
                site.terminate()
    assert LOGIN[1] not in (kits / "lyon" / "work" / "logs" / "node.log").read_text()
