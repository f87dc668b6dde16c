"""Nothing is left on the CPU where a site or a downstream team computes on another device, and no step waits for it."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import matrix
import numpy as np
import pytest
import torch
from conftest import begun, merged, tiny
from elsewhere import NAME, another_device, waits
from test_downstream_evaluate import striped
from test_downstream_explain import CONTRAST, arm, split
from test_downstream_finetune import CNN, QUICK, network

from wardround.client.local_round import Done, Job, train
from wardround.config import FederationConfig, parse
from wardround.downstream.evaluate import evaluate
from wardround.downstream.explain import explain
from wardround.plan import resolve
from wardround.privacy.accounting import Mechanism
from wardround.probe.explanation import Explanation
from wardround.ssl import METHODS
from wardround.ssl.devices import Machine


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with another_device(monkeypatch):
        yield


def fabric(device: str) -> Any:
    """Return what a site's process asks of Lightning's Fabric, on one device."""
    return SimpleNamespace(
        device=torch.device(device),
        world_size=1,
        global_rank=0,
        autocast=contextlib.nullcontext,
        backward=lambda loss: loss.backward(),
        broadcast=lambda drawn: drawn,
    )


def done(config: FederationConfig, device: str, mechanism: Mechanism | None = None) -> Done:
    """Return what a round leaves at a site that trains on a device."""
    plan = resolve(config)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (12, *config.data.shape), np.uint8)
    units = np.arange(12, dtype=np.int32) // 2
    job = Job(plan.protocol, "lyon", 1, begun(plan.state), {}, lambda: images, Machine(), units, mechanism, None)
    return train(fabric(device), job)


def round_of(method: str, backbone: str, changes: dict[str, Any] | None = None) -> FederationConfig:
    """Return a federation of rounds of two steps."""
    config = matrix.recipe(method, backbone).model_dump(mode="json")
    brief = {"training": {"local_steps": 2, "batch_size": 4, "warmup_steps": 0}}
    return parse(merged(merged(config, brief), changes or {}), FederationConfig, "elsewhere")


def test_a_tensor_that_was_left_behind_is_refused_and_a_value_read_back_is_noted(elsewhere: None) -> None:
    there, here = torch.ones(2, device=NAME), torch.ones(2)
    with pytest.raises(RuntimeError, match="on the same device"):
        there + here
    assert (there + here.to(NAME)).device.type == NAME and waits == []
    assert float((there * 2).sum()) == 4.0 and len(waits) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_round_elsewhere_is_that_of_this_cpu_and_no_step_waits(method: str, elsewhere: None) -> None:
    config = round_of(method, "vit_tiny_patch16_224")
    there = done(config, NAME)
    assert there.losses == pytest.approx(done(config, "cpu").losses, rel=1e-4)  # this CPU multiplies in its own way
    assert waits == ["tolist"]  # for the losses, at the end


@pytest.mark.parametrize("backbone", ["resnet18", "mobilevit_xxs"])
@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_a_round_elsewhere_mixes_nothing_on_other_backbones(method: str, backbone: str, elsewhere: None) -> None:
    assert len(done(round_of(method, backbone), NAME).losses) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"correction": {"name": "fedprox", "mu": 0.1}}},
        {
            "training": {"correction": {"name": "scaffold"}, "optimiser": "sgd", "learning_rate": 0.01},
            "aggregation": {"weights": "uniform"},
        },
        {"training": {"layer_decay": 0.5, "clip_norm": 1.0}},
    ],
)
def test_what_a_config_adds_to_a_round_mixes_nothing(changes: dict[str, Any], elsewhere: None) -> None:
    assert len(done(round_of("simclr", "resnet18", changes), NAME).losses) == 2


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_a_private_round_mixes_nothing(engine: str, elsewhere: None) -> None:
    privacy = {"unit": "patient", "epsilon": 8.0, "delta": 1e-2, "images_per_patient": 2, "engine": engine}
    changes = {"privacy": privacy, "membership": {"units": {"lyon": 6}}}
    config = round_of("mae", "vit_tiny_patch16_224", changes)
    assert len(done(config, NAME, Mechanism(rate=0.9, noise=1.0, steps=2)).losses) == 2


@pytest.mark.parametrize("config", [tiny(), tiny(**CNN)], ids=["vit", "cnn"])
def test_an_evaluation_elsewhere_mixes_nothing(config: FederationConfig, elsewhere: None) -> None:
    there = replace(network(config), device=NAME)
    tuning = replace(QUICK, ways=("full", "lora"))
    found = evaluate({"there": there}, striped(20), (1.0,), draws=1, seed=0, tuning=tuning)
    assert {row.probe for row in found.rows} >= {"k-NN", "linear", "full", "lora"}


@pytest.mark.parametrize("changes", [{}, {"backbone": {"name": "mobilenetv3_small_050"}, "method": CONTRAST}])
def test_an_explanation_elsewhere_mixes_nothing(changes: dict[str, Any], elsewhere: None) -> None:
    images = striped(20)
    assert isinstance(explain(replace(arm(**changes), device=NAME), images, split(images)), Explanation)
