"""What a site refuses, whatever the coordinator asks."""

import json
from collections.abc import Callable
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from conftest import tiny, to_toml, write_labelled

from wardround.client.app import run_task
from wardround.client.policy import agreed_protocol, checked_state, objections, refuse_few
from wardround.config import Protocol, SiteConfig, read_site
from wardround.config.privacy import PrivacyConfig, SitePrivacyConfig, UnitPrivacyConfig
from wardround.config.site import ImagesConfig, MinimumConfig
from wardround.errors import PolicyRefusal
from wardround.plan import architecture, resolve
from wardround.update import State, Task, layout, pack, state_hash

PLAN = resolve(tiny())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of the test's own: what is refused is kept, to be read."""
    monkeypatch.chdir(tmp_path)


def site(*approved: str, **changes: Any) -> SiteConfig:
    images = ImagesConfig(folder=Path())
    return SiteConfig(format=1, name="lyon", images=images, work=Path(), approved=approved, **changes)


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
    with pytest.raises(PolicyRefusal, match=f"'wardround site approve SITE_TOML {PLAN.digest[:12]}' shows it"):
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
    found = checked_state(PLAN.protocol, task())
    assert found is not None and found.hash == state_hash(found.state) == state_hash(PLAN.state)
    extra = {**PLAN.state, "trap": np.zeros(3, np.float32)}
    with pytest.raises(PolicyRefusal, match="1 tensors too many"):
        checked_state(PLAN.protocol, task(state=extra))


NAME = "backbone.blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop(NAME), f"lacks 1 of .* tensors .first: '{NAME}'"),
        (lambda state: state.update(other=state.pop(NAME)), f"lacks 1 of .* tensors .first: '{NAME}'"),
        (lambda state: state.update({NAME: state[NAME].T.copy()}), rf"'{NAME}' is float32\[192, 576\], expected"),
        (lambda state: state.update({NAME: state[NAME].astype(np.float16)}), rf"'{NAME}' is float16\[576, 192\]"),
        (lambda state: state[NAME].__setitem__((0, 0), np.nan), f"tensor '{NAME}' holds NaN or infinity"),
        (lambda state: state[NAME].__setitem__((0, 0), np.inf), f"tensor '{NAME}' holds NaN or infinity"),
        (lambda state: state[NAME].__imul__(1e6), f"'{NAME}' has a root mean square of .*, expected at most 1000"),
        (lambda state: state[NAME].__setitem__((0, 0), 3e38), f"'{NAME}' has a root mean square of"),
    ],
)
def test_a_state_of_another_architecture_or_that_has_blown_up_is_refused(
    change: Callable[[State], object], words: str
) -> None:
    state = {name: array.copy() for name, array in PLAN.state.items()}
    change(state)
    with pytest.raises(PolicyRefusal, match=words):
        checked_state(PLAN.protocol, task(round=2, state=state))


def test_a_state_of_another_depth_is_refused() -> None:
    deeper, wider = (resolve(tiny(backbone=change)) for change in ({"depth": 2}, {"patch_size": 4}))
    with pytest.raises(PolicyRefusal, match=r"the coordinator's state has .* bytes, expected at most"):
        checked_state(PLAN.protocol, task(round=2, state=deeper.state))
    with pytest.raises(PolicyRefusal, match=r"lacks 1[0-9] of .* tensors \(first: 'backbone.blocks.1"):
        checked_state(deeper.protocol, task(deeper.protocol, round=2))
    with pytest.raises(PolicyRefusal, match=r"tensor '.*' is float32\[.*\], expected float32\["):
        checked_state(PLAN.protocol, task(round=2, state=wider.state))


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


def test_a_state_that_unpacks_to_ten_gigabytes_is_refused_before_it_is_unpacked() -> None:
    """Zeros of ten gigabytes, by one frame that says so: 0.3 MB that cross."""
    block = b"\0" * 2**20
    maker = zstandard.ZstdCompressor(level=1).compressobj(size=10 * 2**30)
    packed = b"".join(maker.compress(block) for _ in range(10 * 2**10)) + maker.flush()
    assert len(packed) < 2_000_000
    with pytest.raises(PolicyRefusal, match="has 10737418240 bytes, expected at most"):
        checked_state(PLAN.protocol, Task(2, "", 0, packed))


@pytest.mark.parametrize(("key", "found"), [("local_steps", 1), ("batch_size", 3)])
def test_without_noise_an_update_of_too_few_steps_or_images_is_refused_though_it_is_approved(
    key: str, found: int
) -> None:
    asked = tiny(training={key: found}).protocol(PLAN.protocol.initial_state)
    with pytest.raises(PolicyRefusal, match=rf"\[training\] {key} = {found}: expected at least .* \(\[minimum\] {key}"):
        agreed_protocol(site(asked.digest()), task(asked))
    lower = MinimumConfig(**{key: found})
    assert agreed_protocol(site(asked.digest(), minimum=lower), task(asked)) == asked


def test_a_site_of_too_few_images_trains_nothing_without_noise(tmp_path: Path) -> None:
    write_labelled(tmp_path / "images", {"lyon": 10})  # of which six are for training
    tree = {"format": 1, "name": "lyon", "work": "work", "approved": [PLAN.digest], "images": {"folder": "images"}}
    (tmp_path / "site.toml").write_text(to_toml(tree))
    with pytest.raises(PolicyRefusal, match=r"fewer than 10 images for this, .* \(\[minimum\] images"):
        run_task(read_site(tmp_path / "site.toml"), task())
    assert not list((tmp_path / "work").rglob("trainings.json")), "no training is counted"
    (tmp_path / "site.toml").write_text(to_toml({**tree, "minimum": {"images": 6}}))
    assert isinstance(run_task(read_site(tmp_path / "site.toml"), task()), bytes)


@pytest.mark.parametrize(
    ("privacy", "holds"),
    [
        (UnitPrivacyConfig(unit="patient", epsilon=2.0, delta=1e-6), False),
        (SitePrivacyConfig(unit="site", epsilon=2.0, delta=1e-6, clip=1.0, cohort=2, noise="site"), False),
        (SitePrivacyConfig(unit="site", epsilon=2.0, delta=1e-6, clip=1.0, cohort=2, noise="server"), True),
    ],
)
def test_the_minimum_holds_where_the_coordinator_sees_an_update_without_noise(
    privacy: PrivacyConfig, holds: bool
) -> None:
    asked = PLAN.protocol.model_copy(update={"privacy": privacy})
    high = site(minimum=MinimumConfig(images=1000, local_steps=1000))
    assert any("local_steps" in objection for objection in objections(high, asked)) == holds
    if holds:
        with pytest.raises(PolicyRefusal, match="fewer than 1000 images"):
            refuse_few(high, asked, 999)
    else:
        refuse_few(high, asked, 1)


def test_outside_its_hours_a_site_begins_no_round() -> None:
    now = datetime.now()
    for begin, end, answers in ((1, 2, False), (-1, 1, True)):
        hours = "-".join(f"{now + timedelta(hours=hour):%H:%M}" for hour in (begin, end))
        if answers:
            assert agreed_protocol(site(PLAN.digest, hours=hours), task()) == PLAN.protocol
        else:
            with pytest.raises(PolicyRefusal, match=f"not within this site's hours, {hours}"):
                agreed_protocol(site(PLAN.digest, hours=hours), task())


@pytest.mark.parametrize(
    ("hours", "moment", "within"),
    [
        ("20:00-06:00", time(19, 59), False),
        ("20:00-06:00", time(20), True),
        ("20:00-06:00", time(5, 59, 59), True),
        ("20:00-06:00", time(6), False),
        ("08:30-17:00", time(8, 29), False),
        ("08:30-17:00", time(12), True),
        ("08:30-17:00", time(17), False),
        (None, time(3), True),
    ],
)
def test_hours_may_pass_midnight(hours: str | None, moment: time, within: bool) -> None:
    assert site(hours=hours).is_open(moment) == within
