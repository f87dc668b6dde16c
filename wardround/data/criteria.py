"""Inclusion criteria: which files take part, judged by their headers."""

from wardround.config.federation import CriteriaConfig
from wardround.data.facts import Facts


def unmet(facts: Facts, criteria: CriteriaConfig) -> str:
    """Return the criterion that a file does not meet, as it is counted in the index; "" where it meets all.

    >>> unmet(Facts(1, 512, 512, 1, modality="MR"), CriteriaConfig(modality=("CR", "DX")))
    'modality MR'
    """
    for name, asked, found in (
        ("modality", criteria.modality, facts.modality),
        ("body part", criteria.body_part, facts.body_part),
        ("view", criteria.view, facts.view),
    ):
        if asked and found not in {value.strip().upper() for value in asked}:
            return f"{name} {found or 'not stated'}"
    if criteria.date_from or criteria.date_to:
        if facts.study_date is None:
            return "study date not stated"
        if criteria.date_from and facts.study_date < criteria.date_from:
            return "study date too early"
        if criteria.date_to and facts.study_date > criteria.date_to:
            return "study date too late"
    if min(facts.height, facts.width) < criteria.min_side:
        return f"smaller than {criteria.min_side} pixels"
    return ""
