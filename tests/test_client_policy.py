"""What a site refuses, whatever the coordinator asks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny

from wardround.client.policy import agreed_protocol, checked_state
from wardround.config import Protocol, SiteConfig
from wardround.config.site import ImagesConfig
from wardround.errors import PolicyRefusal
from wardround.plan import architecture, resolve
from wardround.update import State, Task, layout, pack

PLAN = resolve(tiny())


def site(*approved: str) -> SiteConfig:
    return SiteConfig(format=1, name="lyon", images=ImagesConfig(folder=Path()), work=Path(), approved=approved)


def task(protocol: Protocol = PLAN.protocol, round: int = 1, state: State = PLAN.state) -> Task:
    return Task(round, json.dumps(protocol.model_dump(mode="json")), 0, pack(state, {}))


def test_an_approved_protocol_comes_back_as_it_was() -> None:
    assert agreed_protocol(site(PLAN.digest), task()) == PLAN.protocol


@pytest.mark.parametrize(
    "change", [{"seed": 9}, {"training": {"local_steps": 99}}, {"data": {"criteria": {"min_side": 1}}}]
)
def test_a_protocol_with_one_value_changed_is_not_the_approved_one(change: dict[str, Any]) -> None:
    other = tiny(**change).protocol(PLAN.protocol.initial_state)
    with pytest.raises(PolicyRefusal, match=f"protocol {other.digest()[:12]} is not approved here"):
        agreed_protocol(site(PLAN.digest), task(other))


def test_nothing_is_approved_by_default() -> None:
    with pytest.raises(PolicyRefusal, match="approved: none"):
        agreed_protocol(site(), task())


def test_a_protocol_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(PolicyRefusal, match="cannot be read"):
        agreed_protocol(site(PLAN.digest), Task(1, "{", 0, b""))


@pytest.mark.parametrize("round", [0, 3, -1])
def test_rounds_outside_the_protocol_are_refused(round: int) -> None:
    with pytest.raises(PolicyRefusal, match="has rounds 1 to 2"):
        agreed_protocol(site(PLAN.digest), task(round=round))


def test_the_architecture_is_the_one_the_site_builds_itself() -> None:
    assert architecture(tiny()) == layout(PLAN.state)
    assert checked_state(PLAN.protocol, task()).keys() == PLAN.state.keys()
    extra = {**PLAN.state, "trap": np.zeros(3, np.float32)}
    with pytest.raises(PolicyRefusal, match="1 tensors too many"):
        checked_state(PLAN.protocol, task(state=extra))


def test_a_state_that_is_far_too_large_is_refused_before_it_is_read() -> None:
    huge = Task(1, "", 0, b"\0" * (sum(a.nbytes for a in PLAN.state.values()) + 2_000_000))
    with pytest.raises(PolicyRefusal, match="bytes, expected at most"):
        checked_state(PLAN.protocol, huge)


def test_round_one_starts_from_the_approved_initial_weights() -> None:
    name = next(iter(PLAN.state))
    other = {**PLAN.state, name: PLAN.state[name] + 1}
    with pytest.raises(PolicyRefusal, match="does not start from the initial weights"):
        checked_state(PLAN.protocol, task(state=other))
    assert checked_state(PLAN.protocol, task(round=2, state=other))
