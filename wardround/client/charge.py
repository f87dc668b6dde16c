"""Before a private round trains: the site's own terms, what its coordinator has seen, and the ledger."""

import hashlib
import hmac
import logging
from dataclasses import dataclass

from wardround.config import Protocol, SiteConfig
from wardround.config.privacy import UnitPrivacyConfig
from wardround.config.site import SitePrivacy
from wardround.errors import ConfigError, PolicyRefusal
from wardround.privacy.accounting import Mechanism, epsilon, mechanism
from wardround.privacy.ledger import Intent, Ledger, Row
from wardround.update import Task

log = logging.getLogger(__name__)
_SEAL = 32  # hexadecimal digits, 128 bits


@dataclass(frozen=True)
class Charged:
    """What the ledger has been charged for one training of a round, and what may be declared of it."""

    mechanism: Mechanism  # rate, noise and steps to train with
    units: int  # the site's declared number of patients, or images
    epsilon: float  # spent in this federation so far, this round included, at the federation's delta
    ledger: str  # the ledger's head after it, LENGTH:HASH, sealed


def ledger_of(site: SiteConfig) -> Ledger:
    """Return a site's ledger: by default its own, or one that it shares with the hospital's other federations."""
    shared = site.privacy.ledger if site.privacy is not None else None
    return Ledger(shared or site.work / "ledger.db")


def recover(site: SiteConfig) -> list[Row]:
    """Charge what a site's ledger was found to lack; return the rows written. Raises ConfigError without [privacy]."""
    if site.privacy is None:
        raise ConfigError("site.toml has no [privacy] section; add it with epsilon (the ceiling), delta and units.")
    return ledger_of(site).recover(site.privacy.delta)


def charge(site: SiteConfig, protocol: Protocol, task: Task) -> Charged:
    """Charge the ledger for one training of a task's round: on disk when this returns, and never taken back.

    A head that the coordinator names counts where this site's key has sealed it: a made-up one would stop every
    private round here, and be charged for when the ledger is recovered.

    Raises PolicyRefusal where site.toml sets no terms, the batch is larger than the site, or the ledger
    lacks what the coordinator has seen of it, and BudgetExhausted as `Ledger.charge` does. Only for protocols
    whose privacy unit is a patient or an image.
    """
    privacy = protocol.privacy
    assert isinstance(privacy, UnitPrivacyConfig), "site-level noise is not charged to the site's ledger"
    terms, units = _terms(site, privacy.unit)
    if task.units not in (0, units):
        raise PolicyRefusal(
            f"[privacy] units = {units} in site.toml, and {task.units} in the federation's [membership] units; make "
            "both the same. Nothing was spent."
        )
    try:
        a_round = mechanism(protocol, units)
    except ConfigError as error:
        raise PolicyRefusal(str(error)) from error
    digest, ledger = protocol.digest(), ledger_of(site)
    intent = Intent(protocol.name, digest, task.round, privacy.unit, privacy.clip, a_round, opened(site, task.ledger))
    head = ledger.charge(intent, terms.epsilon, terms.delta)
    spent = [row.mechanism for row in ledger.rows() if row.intent.protocol == digest]
    return Charged(a_round, units, epsilon(spent, privacy.delta), sealed(site, head))


def sealed(site: SiteConfig, head: str) -> str:
    """Return a head with what only this site's key can have made of it; bare where all sites run in one process."""
    if site.coordinator is None:
        return head
    key = site.coordinator.private_key.read_bytes()
    return head + hmac.new(key, b"wardround ledger " + head.encode(), hashlib.sha256).hexdigest()[:_SEAL]


def opened(site: SiteConfig, told: str) -> str:
    """Return the head in what a coordinator has seen; empty where this site's key did not seal it, as after a new one.

    No refusal: a coordinator that names none is believed, too, so that nothing is gained by a false one.
    """
    head = told if site.coordinator is None else told[:-_SEAL]
    if hmac.compare_digest(sealed(site, head).encode(), told.encode()):
        return head
    if told:
        log.warning(
            "site '%s': the coordinator names a head of the privacy ledger that this site's key did not seal; it is "
            "passed over. Once after a new key is normal.",
            site.name,
        )
    return ""


def _terms(site: SiteConfig, unit: str) -> tuple[SitePrivacy, int]:
    """Return the site's own limit and its declared units. Raises PolicyRefusal where it has set none."""
    if site.privacy is None:
        raise PolicyRefusal(
            f"site.toml has no [privacy] section, and the federation spends privacy of each {unit}; "
            "add it with epsilon (the ceiling), delta and units."
        )
    if site.privacy.units is None:
        raise PolicyRefusal(
            f"[privacy] in site.toml has no units; declare how many {unit}s the site has: a round number below the "
            "true one."
        )
    return site.privacy, site.privacy.units
