"""The way to the coordinator, looked at as a site would take it: is it there, is it the one, until when."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import httpx
from cryptography.x509 import Certificate, load_der_x509_certificate, load_pem_x509_certificate

from wardround.client.kit import why_untrusted
from wardround.config.site import CoordinatorConfig
from wardround.connection.clock import ahead_of
from wardround.connection.way import way

_PATIENCE = 10.0  # seconds
_SOON = timedelta(days=30)
_DAY = 86_400.0  # seconds


@dataclass(frozen=True)
class Reached:
    """What the coordinator shows at its address, where its certificate holds."""

    certificate: Certificate
    ahead: float | None  # seconds by which this machine's clock is ahead of the coordinator's, if it says the time


def reach(found: CoordinatorConfig) -> Reached:
    """Return what answers at the coordinator's address, by the site's own way there.

    Raises ConnectionError where nothing does, ConnectionRefusedError where its certificate does not hold.
    """
    try:
        with way(found, _PATIENCE) as client, client.stream("GET", f"https://{found.address}/") as answer:
            certificate = answer.extensions["network_stream"].get_extra_info("ssl_object").getpeercert(True)
            date = answer.headers.get("date")  # any answer will do
    except httpx.HTTPError as error:
        if "certificate" in str(error):
            raise ConnectionRefusedError(f"the certificate at {found.address} {why_untrusted(found)}") from error
        raise ConnectionError(f"{found.address} does not answer: {error or type(error).__name__}") from error
    return Reached(load_der_x509_certificate(certificate), None if date is None else ahead_of(date))


def ends(found: CoordinatorConfig, seen: Certificate | None) -> dict[str, datetime]:
    """Return when the federation's CA, and the server's certificate where it was seen, end."""
    known = {"the federation's CA (ca.crt)": load_pem_x509_certificate(found.ca_certificate.read_bytes())}
    if seen is not None:
        known["the coordinator's certificate"] = seen
    return {name: certificate.not_valid_after_utc for name, certificate in known.items()}


def ending(dates: dict[str, datetime], now: datetime | None = None) -> list[str]:
    """Return a line for each certificate that ends within 30 days.

    >>> ending({"it": datetime(2030, 1, 31, tzinfo=UTC)}, datetime(2030, 1, 2, tzinfo=UTC))
    ['it ends on 2030-01-31; ask the coordinator to renew it']
    >>> ending({"it": datetime(2030, 1, 31, tzinfo=UTC)}, datetime(2030, 1, 1, tzinfo=UTC))
    []
    """
    now = now or datetime.now(UTC)
    return [
        f"{name} end{'s' if end > now else 'ed'} on {end:%Y-%m-%d}; ask the coordinator to renew it"
        for name, end in dates.items()
        if end - now < _SOON
    ]


def daily(found: CoordinatorConfig) -> Iterator[list[str]]:
    """Yield at each asking which certificates end soon: once a day, and nothing in between."""
    last = -_DAY
    while True:
        if (now := time.monotonic()) - last >= _DAY:
            last, seen = now, None
            with suppress(ConnectionError):
                seen = reach(found).certificate
            yield ending(ends(found, seen))
        else:
            yield []
