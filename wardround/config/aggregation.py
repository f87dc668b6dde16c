"""How the server folds updates into the state: the rule over the sites, and the optimiser over the rounds."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from wardround.config.strict import Strict

# Keys that only some rules or optimisers have: key -> the key that chooses, and for which of its values.
_KEYS_OF = {
    "trim": ("rule", ("trimmed_mean",)),
    "byzantine": ("rule", ("krum", "multi_krum")),
    "keep": ("rule", ("multi_krum",)),
    "momentum": ("optimiser", ("sgd",)),
    "betas": ("optimiser", ("adam", "yogi")),
    "tau": ("optimiser", ("adam", "yogi", "adagrad")),
}
_NEEDED = ("trim", "byzantine", "keep")


class AggregationConfig(Strict):
    """How the server folds updates into the state."""

    weights: Literal["images", "declared", "uniform"] = Field(
        default="images",
        description="images: by distinct images indexed. declared: by [membership] weights. uniform: all alike.",
    )
    rule: Literal["mean", "median", "trimmed_mean", "krum", "multi_krum"] = Field(
        default="mean",
        description="mean: FedAvg. median, trimmed_mean: of each number by itself. krum: the one update that lies "
        "closest to the others. multi_krum: the mean of several such.",
    )
    trim: float | None = Field(
        default=None, gt=0.0, lt=0.5, description="trimmed_mean: share of the sites cut off at either end."
    )
    byzantine: int | None = Field(
        default=None, ge=0, le=5_000, description="krum, multi_krum: how many sites may send anything at all, f."
    )
    keep: int | None = Field(default=None, ge=1, le=10_000, description="multi_krum: how many updates are averaged.")
    norm_bound: float | None = Field(
        default=None,
        gt=0.0,
        le=1e9,
        description="Largest L2 norm of a site's delta; a longer one is scaled to it before the rule. Unset: none.",
    )
    optimiser: Literal["sgd", "adam", "yogi", "adagrad"] = Field(
        default="sgd",
        description="What turns the rule's delta into the step: sgd, or an adaptive one (Reddi et al. 2021).",
    )
    learning_rate: float = Field(
        default=1.0, gt=0.0, le=10.0, description="The optimiser's rate; 1 with sgd without momentum is FedAvg."
    )
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0, description="sgd: momentum (FedAvgM).")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.99), description="adam, yogi: decay of the two moments, each in [0, 1)."
    )
    tau: float = Field(
        default=1e-3, gt=0.0, le=1.0, description="adam, yogi, adagrad: the smaller, the more they adapt."
    )

    @model_validator(mode="after")
    def _keys_fit_the_rule_and_the_optimiser(self) -> Self:
        for key, (chooser, kinds) in _KEYS_OF.items():
            chosen, value = getattr(self, chooser), getattr(self, key)
            if chosen in kinds and value is None:
                raise ValueError(f"{chooser} = '{chosen}' needs the key '{key}'; add it")
            if chosen not in kinds and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is a key of {chooser} = {' or '.join(map(repr, kinds))}, not of '{chosen}'; remove it"
                )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: expected values in [0, 1)")
        if self.rule != "mean" and self.weights != "uniform":
            raise ValueError(
                f"rule = '{self.rule}' counts every site alike, but weights = '{self.weights}'; set weights = 'uniform'"
            )
        return self

    @property
    def least_sites(self) -> int:
        """The fewest updates that the rule can fold: below, it would protect against nobody.

        Krum takes 2f + 3 (Blanchard et al. 2017, proposition 1), and Multi-Krum keeps n - f - 2 at most
        (El Mhamdi et al. 2018, arXiv:1802.07927). A median of two is their mean, and a trimmed mean of
        few trims nobody.

        >>> AggregationConfig(rule="krum", byzantine=2, weights="uniform").least_sites
        7
        """
        if self.rule == "median":
            return 3
        if self.trim is not None:
            return next(sites for sites in range(math.floor(1 / self.trim), 10**9) if trimmed(sites, self.trim))
        if self.byzantine is not None:
            return max(2 * self.byzantine + 3, (self.keep or 1) + self.byzantine + 2)
        return 1


def trimmed(sites: int, trim: float) -> int:
    """Return how many of so many sites a trimmed mean cuts off at either end.

    >>> trimmed(7, 0.3), trimmed(100, 0.29)
    (2, 29)
    """
    return int(round(trim * sites, 9))  # 0.29 * 100 is a little less than 29
