"""What a site says of a backbone that it probed on its own labels: numbers alone, and checked where they arrive."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from wardround.errors import UpdateError

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Shown = Annotated[str, Field(pattern=r"^(backbone|random|raw pixels)$")]


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True)
class Figures:
    """A probe's scores on the test images, and the ends of their 95 % interval over test patients."""

    balanced_accuracy: Share
    low: Share
    high: Share
    auc: Share
    auc_low: Share
    auc_high: Share


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True)
class SiteScores:
    """A site's scores; of its labels it tells how many there are, and no name."""

    classes: Count
    train_images: Count
    train_patients: Count
    test_images: Count
    test_patients: Count
    linear: Annotated[dict[Shown, Figures], Field(max_length=3)]  # by arm, the linear probe at all training labels
    nearest: Annotated[dict[Shown, Figures], Field(max_length=3)]  # k-NN

    def to_bytes(self) -> bytes:
        """Return them as JSON."""
        return _ADAPTER.dump_json(self)

    @staticmethod
    def from_bytes(block: bytes) -> "SiteScores":
        """Return what `to_bytes` wrote. Raises UpdateError for anything else: it comes from outside."""
        try:
            return _ADAPTER.validate_json(block)
        except ValidationError as error:
            raise UpdateError("its scores are none: its release differs from the coordinator's.") from error


@dataclass(frozen=True)
class Asked:
    """What the sites answered of one round's state."""

    round: int
    state: str  # its hash
    scores: dict[str, SiteScores]  # by site
    refused: dict[str, str]  # by site, why there are none

    def to_json(self) -> str:
        """Return it as JSON."""
        return _ASKED.dump_json(self, indent=1).decode()

    @staticmethod
    def from_json(text: str) -> "Asked":
        """Return what `to_json` wrote. Raises pydantic's ValidationError for anything else."""
        return _ASKED.validate_json(text)


_ADAPTER = TypeAdapter(SiteScores)
_ASKED = TypeAdapter(Asked)
