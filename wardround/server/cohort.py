"""Who is asked in a round, and how much each site's update weighs."""

import random
from collections.abc import Mapping, Sequence

from wardround.config import FederationConfig
from wardround.config.privacy import SitePrivacyConfig, UnitPrivacyConfig
from wardround.errors import ConfigError
from wardround.privacy import site_level
from wardround.server.membership import check_declared
from wardround.update import Declared


def choose(config: FederationConfig, members: Sequence[str], round: int) -> list[str]:
    """Return the sites of a round, by name: all of them, or as many as are asked, drawn by seed and round.

    Raises ConfigError where declared numbers do not carry the privacy that is promised; nothing is trained then.
    """
    check_declared(config, members)
    if isinstance(config.privacy, SitePrivacyConfig):
        site_level.noise(config.privacy, config.training.rounds)
    if (config.membership.buffer or 0) > len(members):
        raise ConfigError(
            f"[membership] buffer = {config.membership.buffer}: there are {len(members)} sites, and a round takes one "
            "update of each; lower it."
        )
    asked, least = config.membership.sites_per_round, config.aggregation.least_sites
    if min(asked or len(members), len(members)) < least:
        raise ConfigError(
            f"[aggregation] rule = '{config.aggregation.rule}': needs the updates of {least} sites, and a round asks "
            f"{min(asked or len(members), len(members))}; ask more sites, or take rule = 'mean'."
        )
    if asked is None or asked >= len(members):
        return sorted(members)
    return sorted(random.Random(f"{config.seed}|cohort|{round}").sample(sorted(members), asked))  # noqa: S311  # no secret


def enough(config: FederationConfig, cohort: Sequence[str], exhausted: int = 0) -> int:
    """Return how many updates close a round: `min_sites`, or all of the cohort that has privacy budget left."""
    return min(config.membership.min_sites or max(1, len(cohort) - exhausted), len(cohort))


def freshness(config: FederationConfig, staleness: int) -> float:
    """Return what an update that began so many rounds ago counts: (1 + t) to the minus [membership] staleness.

    The polynomial of Xie et al. 2019 (arXiv:1903.03934, section 5.2), which FedBuff takes at 0.5.

    >>> freshness(FederationConfig.model_validate(dict(format=1, name="x", training=dict(rounds=9, local_steps=1))), 3)
    0.5
    """
    return float((1 + staleness) ** -config.membership.staleness)


def weights(config: FederationConfig, declared: Mapping[str, Declared]) -> dict[str, float]:
    """Return the weight of each folded site; they need not sum to 1.

    Where a patient or an image is the privacy unit, images are not counted: their declared number weighs.
    """
    kind, membership = config.aggregation.weights, config.membership
    if kind == "uniform":
        return dict.fromkeys(declared, 1.0)
    if kind == "images" and isinstance(config.privacy, UnitPrivacyConfig):
        return {site: float(update.units or 0) for site, update in declared.items()}  # check_update has compared them
    if kind == "images":
        return {site: float(update.images or 0) for site, update in declared.items()}  # none passes check_update
    if missing := sorted(declared.keys() - membership.sites.keys()):
        raise ConfigError(f"[membership] sites: no declared weight for '{missing[0]}'; add one, or weigh by images.")
    return {site: membership.sites[site] for site in declared}
