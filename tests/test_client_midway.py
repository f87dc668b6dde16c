"""A round that was cut in its middle: it goes on from what was kept, and ends with the bits of one that nobody cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import begun, tiny, write_labelled
from data_objects import site_over

from wardround.client import midway
from wardround.client.local_round import local_round
from wardround.client.midway import Midway
from wardround.config import FederationConfig
from wardround.data import SiteImages, open_site
from wardround.plan import resolve
from wardround.ssl import pretrain
from wardround.ssl.devices import Machine
from wardround.ssl.engine import Plain
from wardround.update import State, state_hash

STEPS = 5
METHODS: dict[str, dict[str, Any]] = {
    "mae": {},
    "byol": {"method": {"name": "byol", "hidden_dim": 32, "output_dim": 16}},  # with a teacher
    "dino": {"method": {"name": "dino", "hidden_dim": 32, "bottleneck_dim": 16, "output_dim": 32, "local_views": 0}},
    "batch": {
        "method": {"name": "simsiam", "hidden_dim": 16, "output_dim": 16},
        "backbone": {"name": "resnet10t", "norm": "batch"},
        "data": {"image_size": 32},
        "evaluation_set": {"kind": "procedural", "count": 8},
    },
}


class Cut(BaseException):
    """The process ends here."""


@pytest.fixture
def images(tmp_path: Path) -> SiteImages:
    folder = write_labelled(tmp_path / "data", {"lyon": 20})
    return open_site(site_over(folder, tmp_path / "work"), tiny().data)


def trained(config: FederationConfig, images: SiteImages, file: Path | None) -> tuple[str, str, list[float]]:
    """Return the hashes of the update and of the site memory after round 2, and its losses."""
    plan = resolve(config)
    update, memory = local_round(plan.protocol, "lyon", 2, begun(plan.state), {}, images, Machine(), None, file)
    declared = update.declared
    return state_hash(update.delta), state_hash(memory), [declared.loss_first or 0.0, declared.loss or 0.0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut_at", [1, 4])
def test_a_round_that_was_cut_goes_on_and_ends_with_the_same_bits(
    method: str, cut_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(training={"local_steps": STEPS}, **METHODS[method])
    folder = write_labelled(tmp_path / "data", {"lyon": 20})
    images = open_site(site_over(folder, tmp_path / "work"), config.data)
    whole = trained(config, images, None)
    monkeypatch.setattr(pretrain, "KEEP_SECONDS", 0.0)
    file, real, steps = tmp_path / "midway.safetensors", Plain.gradients, list[int]()

    def counted(self: Plain, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if len(steps) == cut_at:
            raise Cut
        steps.append(1)
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Plain, "gradients", counted)
        with pytest.raises(Cut):
            trained(config, images, file)
    steps.clear()
    with monkeypatch.context() as patch:
        cut_at = 10**9
        patch.setattr(Plain, "gradients", counted)
        assert trained(config, images, file) == whole
    assert len(steps) < STEPS, "it went on, and did not begin anew"


def test_what_was_kept_of_another_start_or_is_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "midway.safetensors"
    state: State = {"backbone.w": np.ones(3, np.float32)}
    kept = Midway([0.5, 0.25], state, {"teacher.w": state["backbone.w"]}, {"step.backbone.w": np.float32([2])})
    midway.write(path, "a" * 64, kept)
    found = midway.read(path, "a" * 64)
    assert found is not None and (found.losses, list(found.site)) == ([0.5, 0.25], ["teacher.w"])
    assert midway.read(path, "b" * 64) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert midway.read(path, "a" * 64) is None
    assert midway.read(tmp_path / "nothing", "a" * 64) is None
