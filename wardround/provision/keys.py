"""Private keys, made once and never written over; Flower takes ECDSA P-384 in OpenSSH's format."""

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from pydantic import TypeAdapter, ValidationError

from wardround.config.strict import Name
from wardround.errors import ConfigError
from wardround.registry.durable import write_file


def tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key in a PEM file, made on the first call (mode 0600)."""
    return _key(path, PrivateFormat.PKCS8)


def site_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key in an OpenSSH file, made on the first call (mode 0600)."""
    return _key(path, PrivateFormat.OpenSSH)


def public_line(key: ec.EllipticCurvePublicKey, site: str) -> str:
    """Return a public key as one line of OpenSSH, the site's name as its comment."""
    return f"{key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {site}"


def check_name(site: str) -> str:
    """Return what may name a site: it becomes a folder beside the coordinator's. Raises ConfigError."""
    try:
        name = TypeAdapter(Name).validate_python(site)
    except ValidationError:
        name = "coordinator"
    if name == "coordinator":
        raise ConfigError(
            f"'{site}' cannot name a site: expected letters, digits, '.', '_' and '-', not 'coordinator'."
        )
    return name


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the public half as PEM."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _key(path: Path, form: PrivateFormat) -> ec.EllipticCurvePrivateKey:
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        write_file(path, key.private_bytes(Encoding.PEM, form, NoEncryption()))
        return key
    load = load_ssh_private_key if form is PrivateFormat.OpenSSH else load_pem_private_key
    try:
        found = load(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: is no unencrypted private key ({error}); put the original back.") from error
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: is a {type(found).__name__}, expected ECDSA P-384; put the original back.")
    return found
