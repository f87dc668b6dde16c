"""What a version must meet to become the champion: the coordinator's own gate, which no site need approve."""

from pydantic import Field

from wardround.config.strict import Strict


class ReleaseConfig(Strict):
    """The gate between a candidate and the champion; it travels with each release."""

    tolerance: float = Field(
        default=0.01,
        ge=0.0,
        le=1.0,
        description="How far the linear probe's balanced accuracy may lie below the champion's, on the same set.",
    )
    epsilon: float | None = Field(
        default=None,
        gt=0.0,
        le=1000.0,
        description="The ceiling of every site's epsilon in a release. Unset: [privacy] epsilon, which a site that "
        "trained a round twice may pass.",
    )
