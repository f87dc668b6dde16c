"""Who is asked in a round, and how much each site's update weighs."""

from collections.abc import Mapping, Sequence

from wardround.config import FederationConfig
from wardround.errors import ConfigError
from wardround.update import Declared


def choose(members: Sequence[str]) -> list[str]:
    """Return the sites of a round, by name: all of them."""
    return sorted(members)


def enough(config: FederationConfig, cohort: Sequence[str]) -> int:
    """Return how many updates close a round: `min_sites`, or the whole cohort where it is not set."""
    return min(config.membership.min_sites or len(cohort), len(cohort))


def weights(config: FederationConfig, declared: Mapping[str, Declared]) -> dict[str, float]:
    """Return the weight of each folded site; they need not sum to 1."""
    kind = config.aggregation.weights
    if kind == "images":
        return {site: float(update.images) for site, update in declared.items()}
    if kind == "uniform":
        return dict.fromkeys(declared, 1.0)
    if missing := sorted(declared.keys() - config.membership.sites.keys()):
        raise ConfigError(f"[membership] sites: no declared weight for '{missing[0]}'; add one, or weigh by images.")
    return {site: config.membership.sites[site] for site in declared}
