"""What a site does against its drift from the others: one section a correction, told apart by `name`."""

from typing import Annotated, Literal

from pydantic import Field

from wardround.config.aggregation import AggregationConfig
from wardround.config.method import MethodConfig
from wardround.config.privacy import PrivacyConfig
from wardround.config.strict import Strict

VARIATE = "scaffold."  # before a tensor's name: its control variate, where it crosses and in the checkpoint
WITH_PREDICTOR = ("byol", "moco", "simsiam")  # methods whose head is a projector and a predictor


class NoCorrectionConfig(Strict):
    """No correction."""

    name: Literal["none"] = Field(default="none", description="The correction.")


class FedProxConfig(Strict):
    """FedProx: each local step pulls towards the state that came in (Li et al. 2020)."""

    name: Literal["fedprox"] = Field(description="The correction.")
    mu: float = Field(gt=0.0, le=1e3, description="Strength of the pull; the paper tries 0.001 to 1.")


class ScaffoldConfig(Strict):
    """SCAFFOLD: control variates take a site's own direction out of its gradients (Karimireddy et al. 2020).

    They travel beside the state and the update, which doubles what a round moves.
    """

    name: Literal["scaffold"] = Field(description="The correction.")


class FedEMAConfig(Strict):
    """FedEMA: a round starts between what came in and what the site had (Zhuang et al. 2022)."""

    name: Literal["fedema"] = Field(description="The correction.")
    scale: float = Field(
        gt=0.0, le=1e6, description="Lambda: the share of the site's own network a unit of distance from what came in."
    )


class FedUConfig(Strict):
    """FedU: a site whose encoder has drifted far keeps its own predictor (Zhuang et al. 2021)."""

    name: Literal["fedu"] = Field(description="The correction.")
    threshold: float = Field(
        gt=0.0, le=1e6, description="Distance of the site's encoder from what came in, above which it keeps it."
    )


CorrectionConfig = Annotated[
    NoCorrectionConfig | FedProxConfig | ScaffoldConfig | FedEMAConfig | FedUConfig,
    Field(discriminator="name"),
]


def refuse_unfit(
    correction: CorrectionConfig,
    method: MethodConfig,
    aggregation: AggregationConfig,
    privacy: PrivacyConfig,
    encoding: str,
) -> None:
    """Raise ValueError where a correction would not be what its paper means, or would not be private."""
    section = f"[training] correction = '{correction.name}'"
    if isinstance(correction, FedEMAConfig | FedUConfig) and method.name not in WITH_PREDICTOR:
        raise ValueError(
            f"{section} needs a method with a predictor, which '{method.name}' has not; take "
            f"{', '.join(WITH_PREDICTOR)}, or another correction"
        )
    if not isinstance(correction, ScaffoldConfig):
        return
    if privacy.unit != "none":
        raise ValueError(
            f"{section}: control variates leave beside the update without noise; with [privacy] unit = "
            f"'{privacy.unit}' take 'fedprox'"
        )
    if (aggregation.rule, aggregation.weights, aggregation.norm_bound) != ("mean", "uniform", None):
        raise ValueError(
            f"{section} averages all sites alike, their control variates too; set [aggregation] rule = 'mean' and "
            "weights = 'uniform', and remove norm_bound"
        )
    if encoding != "float32":
        raise ValueError(f"{section}: control variates cross as they are; set encoding = 'float32'")
