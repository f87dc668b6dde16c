"""The federation's own CA, and the one certificate it issues: the coordinator's.

Sites prove who they are with a key of their own instead (`keys.py`), so none of them has a certificate.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wardround.signatures import AUTHORITY

_DAYS_CA = 3650  # longer than a federation lives: a new CA means a new kit for every site
_DAYS_SERVER = 825  # the most that Apple's TLS clients accept, the strictest in use
_CLOCK = timedelta(days=1)  # certificates count from yesterday, for sites whose clock is behind


def authority(name: str, key: EllipticCurvePrivateKey) -> bytes:
    """Return the PEM of a self-signed CA certificate that may issue server certificates only."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{AUTHORITY} {name}"[:64])])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(subject, subject, key.public_key(), key.public_key(), _DAYS_CA)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return certificate.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def server_certificate(
    ca: bytes, ca_key: EllipticCurvePrivateKey, key: EllipticCurvePublicKey, names: Sequence[str]
) -> bytes:
    """Return the PEM of a server's certificate for host names and IP addresses; the first is its subject."""
    issuer = x509.load_pem_x509_certificate(ca)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    certificate = (
        _builder(subject, issuer.subject, key, ca_key.public_key(), _DAYS_SERVER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
    )
    return certificate.sign(ca_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, issuer_key: EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    """Return what every certificate has; the two identifiers are what OpenSSL's strict mode asks for."""
    start = datetime.now(UTC) - _CLOCK
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
