"""What a federation promises about those whose images it trains on; part of the protocol digest."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from wardround.config.strict import Strict

Epsilon = Annotated[float, Field(gt=0.0, le=1000.0)]
Delta = Annotated[float, Field(gt=0.0, le=0.1)]
Clip = Annotated[float, Field(gt=0.0, le=1e6)]


class NoPrivacyConfig(Strict):
    """No differential privacy."""

    unit: Literal["none"] = Field(
        default="none",
        description="none: no differential privacy; the coordinator may be able to reconstruct images.",
    )


class UnitPrivacyConfig(Strict):
    """DP-SGD at each site: what a site releases is private in one patient, or one image, against everybody else.

    The noise follows from epsilon, delta, the rounds' steps, and [training] batch_size (the expected
    number of units a step) over the site's declared units.
    """

    unit: Literal["patient", "image"] = Field(
        description="What may be added or removed: a patient with all images, or one image."
    )
    epsilon: Epsilon = Field(
        description="What each site spends over all rounds where every round is trained once; add/remove adjacency."
    )
    delta: Delta = Field(description="The guarantee's delta; below one over a site's number of units.")
    clip: Clip = Field(default=1.0, description="Largest norm of a unit's gradient, C.")
    images_per_patient: int = Field(
        default=1, ge=1, le=1000, description="patient: at most so many images of a drawn patient in a step."
    )
    views: int = Field(
        default=1, ge=1, le=64, description="Augmentations of an image in a step, averaged inside the unit."
    )
    engine: Literal["bookkeeping", "opacus", "opacus-ghost"] = Field(
        default="bookkeeping",
        description="bookkeeping: one backward pass. opacus: a gradient an image, by Opacus's hooks; slower, takes "
        "more layers. opacus-ghost: two backward passes, for one row a unit.",
    )
    randomness: Literal["torch", "secure"] = Field(
        default="torch",
        description="torch: Mersenne Twister with a fresh state from the operating system; fast, and no cryptographic "
        "generator. secure: AES in counter mode, and noise that resists attacks on floating point; slower.",
    )

    @model_validator(mode="after")
    def _an_image_is_one_image(self) -> Self:
        if self.unit == "image" and self.images_per_patient != 1:
            raise ValueError(f"images_per_patient = {self.images_per_patient} is a key of unit = 'patient'; remove it")
        return self


class SitePrivacyConfig(Strict):
    """Noise on whole updates: the released states are private in one site; any method, any loss."""

    unit: Literal["site"] = Field(description="What may be added or removed: a site with all it has.")
    epsilon: Epsilon = Field(description="What the federation spends over all rounds; add/remove adjacency.")
    delta: Delta = Field(description="The guarantee's delta.")
    clip: Clip = Field(description="Largest norm of a site's delta, C; where it adapts, that of round 1.")
    cohort: int = Field(ge=2, le=10_000, description="The declared number of sites, by which the sum is divided.")
    noise: Literal["server", "site"] = Field(
        default="server",
        description="server: one noise on the sum; protects against other sites and users, not against the server. "
        "site: noise on each update before it leaves; protects against the server too.",
    )
    clip_quantile: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="server: share of the sites whose deltas are to fit the norm, which then adapts; unset: fixed.",
    )

    @model_validator(mode="after")
    def _sites_do_not_adapt(self) -> Self:
        if self.noise == "site" and self.clip_quantile is not None:
            raise ValueError("clip_quantile is a key of noise = 'server'; remove it, or change noise")
        return self


PrivacyConfig = Annotated[
    NoPrivacyConfig | UnitPrivacyConfig | SitePrivacyConfig,
    Field(discriminator="unit"),
]
