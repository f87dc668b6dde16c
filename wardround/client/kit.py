"""A site's kit, looked at before it is used: whole, as the coordinator signed it, and with this site's own key."""

import base64
import contextlib
import hashlib
import ssl
import stat
import tempfile
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_private_key, load_ssh_public_key

from wardround.config import SiteConfig
from wardround.config.site import CoordinatorConfig, read_login
from wardround.errors import ConfigError
from wardround.signatures import AUTHORITY, FOREIGN, fingerprint, is_signed, issuer, untrusted

SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it; of all files of the kit but those below
SIGNATURE = f"{SUMS}.sig"
KIND = "wardround kit"  # what the signature is of
UNSIGNED = {"site.toml", "site.key", SUMS, SIGNATURE}  # what the site fills in, what it keeps secret
_PATIENCE = 10.0  # seconds
_AGAIN = "put the kit's back, or ask the coordinator for another kit"


def check_kit(site: SiteConfig, path: Path) -> str:
    """Return the fingerprint of the coordinator's key that the kit pins; path is that of `site.toml`.

    Raises ConfigError where the kit's files are not as they came, or are another site's.
    """
    found = site.coordinator
    if found is None:
        raise ConfigError(f"{path}: has no [coordinator]; take that section from the kit.")
    for file in (found.ca_certificate, found.private_key, found.signing_key):
        if not file.is_file():
            raise ConfigError(f"{path}: there is no file '{file.name}'; put the kit's where it says.")
    key = found.private_key
    if stat.S_IMODE(key.stat().st_mode) & 0o077:
        raise ConfigError(f"{key}: other accounts can read it; 'chmod 600' it, and ask for a new kit if it was seen.")
    if found.proxy_credentials is not None:
        read_login(found.proxy_credentials)
    coordinator = _check_sums(found)
    _check_key(site.name, found, path)
    return fingerprint(coordinator)


def check_folders(site: SiteConfig, path: Path) -> None:
    """Raise ConfigError where the images' folder is missing or the work folder cannot be written."""
    if site.images.kind != "dicomweb" and not site.images.folder.is_dir():
        raise ConfigError(f"{path}: [images] folder = '{site.images.folder}' is no folder; mount it, or name another.")
    try:
        site.work.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=site.work):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"{path}: work = '{site.work}' cannot be written: {reason}; give the account that runs Wardround a folder "
            "of its own."
        ) from error


def why_untrusted(found: CoordinatorConfig) -> str:
    """Return what is wrong with the certificate that the coordinator's address shows now, in words and dates."""
    host = found.address.rpartition(":")[0].strip("[]")
    try:
        shown = _shown_certificate(found)
        why = untrusted(shown, found.ca_certificate.read_bytes(), host)
    except (OSError, ValueError, HTTPException):  # it is away again, or shows none
        return "is not signed by ca.crt, or is for another address"
    if why is not None and why.startswith(FOREIGN):
        if issuer(shown).startswith(AUTHORITY):
            return f"{why}: another coordinator answers; ask yours for its address"
        way = f"the proxy {found.proxy}" if found.proxy else "a proxy on the way"
        return f"{why}: {way} inspects TLS; have {found.address} exempted from inspection"
    return why or "is not signed by ca.crt, or is for another address"


def _shown_certificate(found: CoordinatorConfig) -> bytes:
    """Return the certificate (PEM) that the coordinator's address shows, by the way that the site takes."""
    host, _, port = found.address.rpartition(":")
    look = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # looks, trusts nothing, and says nothing
    look.check_hostname, look.verify_mode = False, ssl.CERT_NONE
    proxy = urlsplit(found.proxy) if found.proxy else None
    where = (host.strip("[]"), int(port)) if proxy is None else (proxy.hostname or "", proxy.port or 80)
    connection = HTTPSConnection(*where, timeout=_PATIENCE, context=look)
    if proxy is not None:
        login = ":".join(read_login(found.proxy_credentials)) if found.proxy_credentials else ""
        basic = {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
        connection.set_tunnel(host.strip("[]"), int(port), basic)
    with contextlib.closing(connection):
        connection.connect()
        shown = connection.sock.getpeercert(True)
        assert isinstance(shown, bytes), "TLS has no server without a certificate"
        return ssl.DER_cert_to_PEM_cert(shown).encode()


def _check_sums(found: CoordinatorConfig) -> EllipticCurvePublicKey:
    """Return the coordinator's key. Raises ConfigError unless each file is what it signed."""
    home = found.signing_key.parent
    elsewhere = {"ca.crt": found.ca_certificate, "coordinator.pub": found.signing_key}
    try:
        sums, signature = (home / SUMS).read_bytes(), (home / SIGNATURE).read_bytes()
        coordinator = load_pem_public_key(found.signing_key.read_bytes())
    except OSError as error:
        raise ConfigError(f"{home}: has no {SUMS} with a {SIGNATURE}; {_AGAIN}.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{found.signing_key}: is no public key; {_AGAIN}.") from error
    if not isinstance(coordinator, EllipticCurvePublicKey) or not is_signed(coordinator, signature, KIND, sums):
        raise ConfigError(f"{home / SUMS}: is not signed by the key in {found.signing_key.name}; {_AGAIN}.")
    for line in sums.decode().splitlines():
        expected, _, name = line.partition("  ")
        if Path(name).name != name:
            raise ConfigError(f"{home / SUMS}: names '{name}', which is no file of a kit; {_AGAIN}.")
        file = elsewhere.get(name, home / name)
        if not file.is_file():
            raise ConfigError(f"{home}: there is no file '{name}'; {_AGAIN}.")
        if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise ConfigError(f"{file}: is not as it came with the kit; {_AGAIN}.")
    return coordinator


def _check_key(name: str, found: CoordinatorConfig, path: Path) -> None:
    """Raise ConfigError unless the site has the name and the key that the coordinator knows it by."""
    line = (found.signing_key.parent / "site.pub").read_bytes()
    owner = line.split()[-1].decode(errors="replace")
    if owner != name:
        raise ConfigError(f"{path}: name = '{name}', but the kit beside it is that of site '{owner}'; use its own kit.")
    try:
        own = load_ssh_private_key(found.private_key.read_bytes(), None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{found.private_key}: is no unencrypted private key; put the original back.") from error
    again = "or send a new request from 'wardround site init'"
    if not isinstance(own, EllipticCurvePublicKey):
        raise ConfigError(f"{found.private_key}: is no ECDSA key; put the original back, {again}.")
    known = load_ssh_public_key(line)
    if own != known:
        assert isinstance(known, EllipticCurvePublicKey), "the coordinator signed it"
        raise ConfigError(
            f"{found.private_key}: is another site's key, {fingerprint(own)}; the coordinator knows '{name}' by "
            f"{fingerprint(known)}. Put the right one back, {again}."
        )
