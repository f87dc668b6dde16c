"""Before a private round trains: the site's own terms, what its coordinator has seen, and the ledger."""

from dataclasses import dataclass

from wardround.config import Protocol, SiteConfig
from wardround.config.privacy import UnitPrivacyConfig
from wardround.config.site import SitePrivacy
from wardround.errors import ConfigError, PolicyRefusal
from wardround.privacy.accounting import Mechanism, epsilon, mechanism
from wardround.privacy.ledger import Intent, Ledger, Row
from wardround.update import Task


@dataclass(frozen=True)
class Charged:
    """What the ledger has been charged for one training of a round, and what may be declared of it."""

    mechanism: Mechanism  # rate, noise and steps to train with
    units: int  # the site's declared number of patients, or images
    epsilon: float  # spent in this federation so far, this round included, at the federation's delta
    ledger: str  # the ledger's head after it, LENGTH:HASH


def ledger_of(site: SiteConfig) -> Ledger:
    """Return a site's ledger."""
    return Ledger(site.work / "ledger.db")


def recover(site: SiteConfig) -> list[Row]:
    """Charge what a site's ledger was found to lack; return the rows written. Raises ConfigError without [privacy]."""
    if site.privacy is None:
        raise ConfigError("site.toml has no [privacy] section; add it with epsilon (the ceiling), delta and units.")
    return ledger_of(site).recover(site.privacy.delta)


def charge(site: SiteConfig, protocol: Protocol, task: Task) -> Charged:
    """Charge the ledger for one training of a task's round: on disk when this returns, and never taken back.

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
    intent = Intent(protocol.name, digest, task.round, privacy.unit, privacy.clip, a_round, task.ledger)
    head = ledger.charge(intent, terms.epsilon, terms.delta)
    spent = [row.mechanism for row in ledger.rows() if row.intent.protocol == digest]
    return Charged(a_round, units, epsilon(spent, privacy.delta), head)


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
