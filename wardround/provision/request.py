"""A site's request: the public half of a key that was made at the site and stays there.

It is a certificate request (PKCS #10), signed with the key itself, so that who sends it has the key:
`openssl req -verify -in lyon.csr` says so, too.
"""

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.x509.oid import NameOID

from wardround.errors import ConfigError
from wardround.provision import keys
from wardround.registry.durable import private_folder, write_file


def init(folder: Path, site: str) -> tuple[Path, EllipticCurvePublicKey]:
    """Make a site's key in a folder, and the request to send; return the request's file and the public key.

    A key that is there is kept. Raises ConfigError where the name is none.
    """
    keys.check_name(site)
    private_folder(folder)
    key = keys.site_key(folder / "site.key")
    path = folder / f"{site}.csr"
    if not path.exists() or public_key(path) != key.public_key():
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
        write_file(path, request.public_bytes(serialization.Encoding.PEM))
    return path, key.public_key()


def public_key(path: Path) -> EllipticCurvePublicKey:
    """Return the key of a request."""
    return read(path)[1]


def read(path: Path) -> tuple[str, EllipticCurvePublicKey]:
    """Return the site and the key of a request. Raises ConfigError where it is none, or not signed with that key."""
    remedy = "let the site make it with 'wardround site init'"
    try:
        request = x509.load_pem_x509_csr(path.read_bytes())
        key, named = request.public_key(), request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        signed = request.is_signature_valid
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is no certificate request; {remedy}.") from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise ConfigError(f"{path}: its key is no ECDSA P-384; {remedy}.")
    if not signed:
        raise ConfigError(f"{path}: is not signed with the key that it names; {remedy}.")
    if len(named) != 1:
        raise ConfigError(f"{path}: names {len(named)} sites, expected one; {remedy}.")
    return keys.check_name(str(named[0].value)), key
