"""What time it is at the coordinator, whose SuperLink takes no signature of another."""

import logging
import time
from base64 import b64encode
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

log = logging.getLogger(__name__)

_SAME_CLOCK = 2.0  # seconds; SuperLink takes 5 ahead, and a Date header has whole seconds
_CENTURY = 3.2e9  # seconds; no clock is so wrong


def ahead_of(date: str) -> float | None:
    """Return the seconds by which this machine's clock is ahead of a Date header; None where that tells no time."""
    try:
        ahead = time.time() - parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
    return ahead if abs(ahead) < _CENTURY else None


class CoordinatorsClock:
    """Signs a site's calls, with the coordinator's time where this machine's clock is wrong.

    SuperLink refuses a signature that is older than five minutes or from the future. Whose time is right
    says the Date of its refusal: TLS has shown who speaks. A coordinator that lies gets signatures of other
    moments from it, which only its own SuperLink would take; updates are signed by themselves, without a time.
    """

    def __init__(self, key: EllipticCurvePrivateKey) -> None:
        self.ahead = 0.0  # seconds by which this machine's clock is ahead
        self._key, self._public = key, b64encode(public_key_to_bytes(key.public_key())).decode()

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send a call with its signature, and once more where the clock was why it is refused."""
        self._sign(context.request)
        answer = call_next(context)
        if answer.status_code == httpx.codes.UNAUTHORIZED and self._set(answer.headers.get_list("date")):
            self._sign(context.request)
            answer = call_next(context)
        return answer

    def date(self, reply: Message) -> None:
        """Make a reply one of the coordinator's time; Flower drops what looks older than twelve hours."""
        fields = reply.metadata.__dict__
        fields["_created_at"] -= self.ahead
        fields["_ttl"] += self.ahead

    def _sign(self, request: httpx.Request) -> None:
        stamp = datetime.fromtimestamp(time.time() - self.ahead, UTC).isoformat()
        request.headers[TIMESTAMP_HEADER] = stamp
        request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = self._public
        request.headers[FLEET_HTTP_SIGNATURE_HEADER] = b64encode(sign_message(self._key, stamp.encode())).decode()

    def _set(self, dates: list[str]) -> bool:
        """Take the time of a Date header (RFC 9110, 6.6.1), the gate's or SuperLink's; return whether it is news."""
        ahead = ahead_of(dates[0]) if dates else None
        if ahead is None or abs(ahead - self.ahead) < _SAME_CLOCK:
            return False
        self.ahead = ahead
        log.warning("this machine's clock is %+.0f s off the coordinator's, whose time is used", ahead)
        return True
