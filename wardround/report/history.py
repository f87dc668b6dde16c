"""What a run folder tells of a federation, as plain values: of its rounds, its sites and its promise. No images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wardround.config.federation import Recipe

# What came of a site in a round. late: an update that was dropped; training: still at work, as a buffer allows.
Outcome = Literal["counted", "refused", "late", "training", "not asked"]


@dataclass(frozen=True)
class SiteRound:
    """One site in one committed round; None stands for what was not declared, or is withheld."""

    outcome: Outcome
    reason: str = ""  # of a refusal: its code and text
    loss: float | None = None
    effective_rank: float | None = None
    seconds: float | None = None  # of training, as the site declares it
    received: int | None = None  # bytes of its update as it crossed


@dataclass(frozen=True)
class Round:
    """One committed round."""

    number: int
    sites: Mapping[str, SiteRound]
    loss: float | None  # mean by weight; None where a site withholds its own
    seconds: float
    bytes_sent: int  # to all sites
    bytes_received: int
    state: str  # SHA-256


@dataclass(frozen=True)
class Member:
    """One site over all rounds."""

    images: int | None
    patients: int | None
    units: int | None  # with a patient or image as privacy unit: the declared number
    weight: float | None  # of its last round
    counted: int  # rounds
    missed: int


@dataclass(frozen=True)
class Promise:
    """What differential privacy holds, in the words of the statement."""

    unit: str
    adjacency: str
    delta: float
    planned: float  # epsilon after all rounds, each trained once
    ceiling: float  # the largest epsilon with which the gate lets a release pass
    spent: Mapping[str, tuple[tuple[int, float], ...]]  # site, or "all sites", -> (round, epsilon)
    statements: tuple[str, ...]


@dataclass(frozen=True)
class History:
    """A federation until its last committed round."""

    name: str
    recipe: Recipe
    planned: int  # rounds
    rounds: tuple[Round, ...]
    members: Mapping[str, Member]
    withheld: bool  # whether figures that were measured on images stay at the sites, or in the run folder
    promise: Promise | None  # None: no differential privacy
    warnings: tuple[str, ...]
    provenance: Mapping[str, str]  # what -> value, for whoever compares them
    software: Mapping[str, Any]

    @property
    def last(self) -> Round:
        """The newest committed round."""
        return self.rounds[-1]

    @property
    def failures(self) -> list[tuple[int, str, SiteRound]]:
        """Each (round, site) whose update did not count though it was asked for, oldest first."""
        return [
            (one.number, site, found)
            for one in self.rounds
            for site, found in one.sites.items()
            if found.outcome in ("refused", "late")
        ]
