"""Who is asked in a round, and how much each site's update weighs."""

import random
from collections.abc import Mapping, Sequence

from wardround.config import FederationConfig
from wardround.config.privacy import SitePrivacyConfig, UnitPrivacyConfig
from wardround.errors import ConfigError
from wardround.privacy import site_level
from wardround.update import Declared


def choose(config: FederationConfig, members: Sequence[str], round: int) -> list[str]:
    """Return the sites of a round, by name: all of them, or as many as are asked, drawn by seed and round.

    Raises ConfigError where declared numbers do not carry the privacy that is promised; nothing is trained then.
    """
    privacy, units = config.privacy, config.membership.units
    if isinstance(privacy, UnitPrivacyConfig) and (missing := sorted(set(members) - units.keys())):
        raise ConfigError(
            f"[membership] units: no declared number of {privacy.unit}s for '{missing[0]}'; add one, a round number "
            "below the true one."
        )
    if isinstance(privacy, SitePrivacyConfig):
        if len(members) > privacy.cohort:
            raise ConfigError(f"[privacy] cohort = {privacy.cohort}: there are {len(members)} sites; declare them all.")
        site_level.noise(privacy, config.training.rounds)
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


def weights(config: FederationConfig, declared: Mapping[str, Declared]) -> dict[str, float]:
    """Return the weight of each folded site; they need not sum to 1.

    Where a patient or an image is the privacy unit, images are not counted: their declared number weighs.
    """
    kind, membership = config.aggregation.weights, config.membership
    if kind == "uniform":
        return dict.fromkeys(declared, 1.0)
    if kind == "images" and isinstance(config.privacy, UnitPrivacyConfig):
        return {site: float(membership.units[site]) for site in declared}
    if kind == "images":
        return {site: float(update.images or 0) for site, update in declared.items()}  # none passes check_update
    if missing := sorted(declared.keys() - membership.sites.keys()):
        raise ConfigError(f"[membership] sites: no declared weight for '{missing[0]}'; add one, or weigh by images.")
    return {site: membership.sites[site] for site in declared}
