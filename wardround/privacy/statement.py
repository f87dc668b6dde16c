"""The privacy statement: what is promised, in the words of docs/privacy.md and no others."""

from wardround.config.privacy import NoPrivacyConfig, PrivacyConfig, UnitPrivacyConfig
from wardround.privacy.accounting import upward

NONE = "none: the coordinator may be able to reconstruct images"
_OUTSIDE = "Timing, availability and the choice of hyper-parameters are outside it."


def statement(privacy: PrivacyConfig, rounds: int, site: str | None = None, epsilon: float | None = None) -> str:
    """Return what holds through a round, as a person reads it.

    `epsilon` is what is spent until then; unset, all that the config allows. Without a site the
    sentence speaks of each. Epsilon is rounded up.

    >>> print(statement(NoPrivacyConfig(), 5))
    none: the coordinator may be able to reconstruct images
    """
    if isinstance(privacy, NoPrivacyConfig):
        return NONE
    numbers = f"({upward(privacy.epsilon if epsilon is None else epsilon)}, {privacy.delta})"
    if isinstance(privacy, UnitPrivacyConfig):
        who, there = (f"site '{site}'", f"'{site}'") if site else ("a site", "that site")
        return (
            f"Everything {who} releases through round {rounds} is {numbers}-differentially private under adding or "
            f"removing one {privacy.unit} at {there}, against the server and the other sites. {_OUTSIDE}"
        )
    released, server = ("updates and states", "also") if privacy.noise == "site" else ("states", "not")
    return (
        f"The {released} released through round {rounds} are {numbers}-differentially private in one whole site, "
        f"against other sites and users, {server} against the server. {_OUTSIDE}"
    )
