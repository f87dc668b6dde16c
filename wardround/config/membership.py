"""What of the federation's file the coordinator keeps for itself: who takes part, patience, its own images.

It changes neither what a site computes nor what leaves it, so no change of it needs an approval.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from wardround.config.hours import ZonedHours
from wardround.config.strict import Name, Strict


class MembershipConfig(Strict):
    """Who takes part and how long is waited; changes need no new approval."""

    sites: dict[Name, float] = Field(
        default={},
        description="The declared weight of each site by name; empty takes whoever connects or is in the data.",
    )
    units: dict[Name, Annotated[int, Field(ge=1)]] = Field(
        default={},
        description="Differential privacy: the declared number of patients (or images, where they are the unit) of "
        "each site. A round number below the true one, never counted from the index.",
    )
    min_sites: int | None = Field(
        default=None, ge=1, le=10_000, description="Fewest sites whose updates close a round; unset means all of them."
    )
    wait_seconds: float = Field(
        default=600.0,
        gt=0.0,
        le=86_400.0,
        description="How long the server waits for a round's sites to be there.",
    )
    round_seconds: float | None = Field(
        default=None,
        gt=0.0,
        le=8_640_000.0,
        description="How long a round waits for updates once it is sent, or with `buffer` each site has for one; what "
        "comes later is dropped. Unset: wait_seconds.",
    )
    hours: dict[Name, ZonedHours] = Field(
        default={},
        description='The hours that sites agreed to, with their time zone, such as "20:00-06:00 Europe/Paris"; '
        "wait_seconds and round_seconds count within them alone. A site that is not named has agreed to all.",
    )
    sites_per_round: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="How many sites are asked in a round, drawn by seed and round; unset: all of them.",
    )
    buffer: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Asynchronous rounds (FedBuff): a round is the first so many updates that come, whatever round "
        "each began in, and nobody waits for the others. Unset: a round waits for its sites.",
    )
    staleness: float = Field(
        default=0.5,
        ge=0.0,
        le=10.0,
        description="buffer: an update that began t rounds ago counts (1 + t) to the minus this; 0 counts all alike.",
    )
    max_staleness: int | None = Field(
        default=None, ge=0, le=100_000, description="buffer: an update that is more rounds old is dropped. Unset: none."
    )
    server_names: tuple[str, ...] = Field(
        default=("localhost", "127.0.0.1"),
        min_length=1,
        description="Host names and addresses in the server's certificate.",
    )

    @model_validator(mode="after")
    def _weights_are_positive(self) -> Self:
        for site, weight in self.sites.items():
            if weight <= 0.0:
                raise ValueError(f"sites: the weight of '{site}' is {weight}; expected above 0")
        if self.sites and (strangers := sorted(self.hours.keys() - self.sites.keys())):
            raise ValueError(f"hours: '{strangers[0]}' is not listed in sites; list it, or take its hours out")
        if self.sites and (self.min_sites or 0) > len(self.sites):
            raise ValueError(f"min_sites = {self.min_sites}: only {len(self.sites)} sites are listed")
        if self.sites_per_round is not None and (self.min_sites or 0) > self.sites_per_round:
            raise ValueError(
                f"min_sites = {self.min_sites}: only sites_per_round = {self.sites_per_round} are asked; lower it"
            )
        return self

    @model_validator(mode="after")
    def _a_buffer_waits_for_nobody(self) -> Self:
        others, remedy = ("staleness", "max_staleness"), "is a key of rounds with a buffer; set buffer, or remove it"
        if self.buffer is not None:
            others, remedy = ("min_sites", "sites_per_round"), "with buffer, all sites are asked and none is waited for"
        for key in others:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} = {getattr(self, key)}: {remedy}")
        if self.buffer is not None and self.sites and self.buffer > len(self.sites):
            raise ValueError(
                f"buffer = {self.buffer}: only {len(self.sites)} sites are listed, and a round takes one update of "
                "each; lower it"
            )
        return self


class EvaluationSetConfig(Strict):
    """Images that the coordinator owns, for pictures and probes."""

    kind: Literal["procedural", "labelled"] = Field(
        description="procedural: generated phantoms. labelled: a folder with labels.csv."
    )
    folder: Path | None = Field(default=None, description="labelled: the folder, relative to this file.")
    count: int = Field(default=64, ge=8, le=100_000, description="procedural: how many images.")

    @model_validator(mode="after")
    def _labelled_has_a_folder(self) -> Self:
        if self.kind == "labelled" and self.folder is None:
            raise ValueError("kind = 'labelled' needs the key 'folder'; add it, or take kind = 'procedural'")
        return self
