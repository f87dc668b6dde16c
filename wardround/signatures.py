"""Who said it: ECDSA P-384 signatures of what crosses, by keys that were exchanged with the kits.

TLS ends at SuperLink, which passes messages on. Whoever takes that over still cannot ask a site for
anything, nor answer in a site's name.
"""

import base64
import hashlib
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import ssh_key_fingerprint
from cryptography.x509 import ExtensionNotFound, Name, SubjectAlternativeName, load_pem_x509_certificate
from cryptography.x509.oid import NameOID

AUTHORITY = "Wardround federation"  # how the name of a federation's CA begins
FOREIGN = "is not signed by ca.crt"


def sign(key: EllipticCurvePrivateKey, *parts: bytes | str) -> bytes:
    """Return a signature of these parts in this order; the first says what kind of thing they are."""
    return key.sign(_message(parts), ECDSA(SHA384()))


def is_signed(key: EllipticCurvePublicKey, signature: bytes, *parts: bytes | str) -> bool:
    """Return whether a signature is that of a key's owner on exactly these parts."""
    try:
        key.verify(signature, _message(parts), ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


def _message(parts: tuple[bytes | str, ...]) -> bytes:
    """Return a hash a part, so that no two lists of parts have the same message."""
    return b"".join(hashlib.sha384(part.encode() if isinstance(part, str) else part).digest() for part in parts)


def fingerprint(key: EllipticCurvePublicKey | Ed25519PublicKey) -> str:
    """Return what `ssh-keygen -lf` prints of a public key, to be read out over the telephone."""
    return "SHA256:" + base64.b64encode(ssh_key_fingerprint(key, SHA256())).decode().rstrip("=")


def untrusted(certificate: bytes, ca: bytes, host: str | None = None, now: datetime | None = None) -> str | None:
    """Return why a server's certificate (PEM) does not hold against a CA's, for a host, at a time; None where it does.

    It explains what OpenSSL refused, in words and dates, and decides nothing by itself.
    """
    found, authority = load_pem_x509_certificate(certificate), load_pem_x509_certificate(ca)
    now = now or datetime.now(UTC)
    try:
        found.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        own, other = _common_name(authority.subject), _common_name(found.issuer)
        by = "another of that name" if own == other else f"'{other}'"
        return f"{FOREIGN} ('{own}'), but by {by}"
    clock = f"and this machine's clock says {now:%Y-%m-%d}"
    for one, what in ((found, ""), (authority, "is signed by a ca.crt that ")):
        if now < one.not_valid_before_utc:
            return f"{what}is not valid before {one.not_valid_before_utc:%Y-%m-%d}, {clock}"
        if now > one.not_valid_after_utc:
            return f"{what}was valid until {one.not_valid_after_utc:%Y-%m-%d}, {clock}"
    names = certificate_names(certificate)
    return f"is for {', '.join(sorted(names))}, not for {host}" if host is not None and host not in names else None


def issuer(certificate: bytes) -> str:
    """Return who signed a certificate (PEM), by its own word."""
    return _common_name(load_pem_x509_certificate(certificate).issuer)


def certificate_names(certificate: bytes) -> set[str]:
    """Return the host names and IP addresses that a certificate (PEM) is for."""
    found = load_pem_x509_certificate(certificate).extensions
    try:
        return {str(name.value) for name in found.get_extension_for_class(SubjectAlternativeName).value}
    except ExtensionNotFound:
        return set()


def _common_name(name: Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()
