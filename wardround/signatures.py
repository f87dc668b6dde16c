"""Who said it: ECDSA P-384 signatures of what crosses, by keys that were exchanged with the kits.

TLS ends at SuperLink, which passes messages on. Whoever takes that over still cannot ask a site for
anything, nor answer in a site's name.
"""

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA384


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
