"""Rates by stage and step, against hand-computed shares."""

from itertools import pairwise

import pytest
from conftest import tiny

from wardround import ssl as methods
from wardround.errors import ConfigError
from wardround.ssl.optimiser import adamw, learning_rate, set_rate


def test_each_stage_learns_at_its_share_of_the_rate() -> None:
    config = tiny(training={"layer_decay": 0.5})
    method = methods.build(config)
    optimiser = adamw(method, config.training)
    set_rate(optimiser, 8.0)
    rate = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    names = dict(method.named_parameters())
    # Three stages: embedding, one block, final norm; the head above them has the whole rate.
    assert rate[id(names["head.pixels.weight"])] == 8.0
    assert rate[id(names["backbone.norm.weight"])] == 4.0
    assert rate[id(names["backbone.blocks.0.mlp.fc1.bias"])] == 2.0
    assert rate[id(names["backbone.patch_embed.proj.weight"])] == rate[id(names["backbone.class_token.weight"])] == 1.0
    assert len(rate) == len(names)


def test_only_matrices_decay() -> None:
    config = tiny()
    groups = adamw(methods.build(config), config.training).param_groups
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


def test_the_rate_warms_up_and_falls_to_almost_nothing_by_the_last_step() -> None:
    training = tiny(training={"rounds": 4, "local_steps": 25, "warmup_steps": 10, "learning_rate": 1.0}).training
    rates = [learning_rate(training, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)  # half way down: 45 of the 90 steps after the warm-up
    assert 0 < rates[99] < 0.001
    assert all(later <= earlier for earlier, later in pairwise(rates[9:]))


def test_views_grow_with_the_rounds() -> None:
    config = tiny(data={"image_size": 32}, training={"rounds": 4, "resolutions": [[1, 16], [3, 32]]})
    assert [config.view_size(step) for step in (0, 5, 6, 11)] == [16, 16, 32, 32]
    assert tiny().view_size(5) == 16


@pytest.mark.parametrize(
    ("resolutions", "words"),
    [
        ([[2, 16]], r"\[training\] resolutions begin at rounds \[2\]: expected 1, then later rounds in order"),
        ([[1, 16], [1, 16]], r"resolutions begin at rounds \[1, 1\]"),
        ([[1, 64]], "resolutions: edge 64: expected 8 to .data. image_size, 16"),
    ],
)
def test_resolutions_that_make_no_sense_are_refused(resolutions: list[list[int]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(training={"resolutions": resolutions})
