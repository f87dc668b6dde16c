"""Fine-tuning trains what its way says, chooses on validation, and gives the same bits twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny
from test_downstream_evaluate import striped
from torch import nn

from wardround import ssl as methods
from wardround.backbones import released_model
from wardround.config import FederationConfig
from wardround.data import LabelledImages
from wardround.downstream.arms import Network
from wardround.downstream.evaluate import evaluate
from wardround.downstream.finetune import Classifier, Labels, Tuning, answers, stages, steps_of, tune
from wardround.downstream.lora import lora_layers
from wardround.errors import CheckpointError, ConfigError
from wardround.probe.scores import score

QUICK = Tuning(epochs=1, least_steps=12, batch_size=8, checks=2)
CNN = {"backbone": {"name": "mobilenetv3_small_050"}, "method": {"name": "simclr", "hidden_dim": 16, "output_dim": 8}}


def network(config: FederationConfig | None = None) -> Network:
    """Return a network with its initial weights, as an arm that was pretrained."""
    recipe = config or tiny()
    state = methods.get_state(methods.build(recipe))
    return Network(lambda images: released_model(recipe, state, images), recipe)


def labels(images: LabelledImages) -> Labels:
    return Labels(images, *(np.flatnonzero(images.splits == name) for name in ("train", "val")))


def tuned(way: str, arm: Network | None = None, images: LabelledImages | None = None, seed: int = 0) -> Classifier:
    return tune(arm or network(), way, labels(images or striped(20)), QUICK, seed, lambda _: None)


def moved(model: Classifier, arm: Network) -> set[str]:
    """Return the names of the backbone's parameters that are no longer what they were."""
    before = dict(arm.build(striped(20).images).named_parameters())
    after = {name.replace(".base_layer", ""): parameter for name, parameter in model.backbone.named_parameters()}
    return {name for name, parameter in before.items() if not torch.equal(parameter, after[name])}


@pytest.mark.parametrize("way", ["full", "lora"])
def test_a_second_time_gives_the_same_bits_and_another_seed_others(way: str) -> None:
    first, again, other = (tuned(way, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["head.1.weight"], other["head.1.weight"])


def test_the_callers_draws_go_on_as_if_nothing_was_trained() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    tuned("full")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("config", [tiny(backbone={"depth": 2}), tiny(data={"image_size": 16}, **CNN)])
def test_each_way_trains_its_own_weights(config: FederationConfig) -> None:
    arm = network(config)
    groups = stages(arm.build(striped(20).images))
    every = {name for stage in groups for name in stage}
    last = {name for stage in groups[len(groups) // 2 :] for name in stage}
    fixed = {"pos_embed"} & every  # a ViT's table moves in fine-tuning, as timm has it
    assert moved(tuned("full", arm), arm) >= every - fixed - {"cls_token"}
    assert moved(tuned("frozen", arm), arm) <= last
    assert moved(tuned("lora", arm), arm) == set()


def test_with_layer_decay_the_first_stage_moves_least() -> None:
    arm = network(tiny(backbone={"depth": 4}))
    first = arm.build(striped(20).images).patch_embed.proj.weight
    away = {way: (tuned(way, arm).backbone.patch_embed.proj.weight - first).norm().item() for way in ("full", "decay")}
    assert 0 < away["decay"] < away["full"] / 3


def test_lora_sits_on_attention_in_transformers_and_on_convolutions_elsewhere() -> None:
    assert lora_layers(network().build(striped(4).images)) == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    convolutions = lora_layers(network(tiny(data={"image_size": 16}, **CNN)).build(striped(4).images))
    assert {"conv_stem", "blocks.0.0.conv_pw"} <= set(convolutions)
    assert "blocks.0.0.conv_dw" not in convolutions  # depthwise
    model = tuned("lora")
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_statistics_of_a_batch_normalisation_that_is_not_trained_stay() -> None:
    recipe = tiny(data={"image_size": 16}, **CNN | {"backbone": CNN["backbone"] | {"norm": "batch"}})
    arm = network(recipe)
    model = tuned("lora", arm)
    before = arm.build(striped(20).images[labels(striped(20)).train])
    assert torch.equal(model.backbone.bn1.running_mean, before.bn1.running_mean)
    assert not torch.equal(tuned("full", arm).backbone.bn1.running_mean, before.bn1.running_mean)


def test_the_test_images_have_no_say() -> None:
    images = striped(20)
    test = images.splits == "test"
    turned = replace(
        images,
        labels=np.where(test, 1 - images.labels, images.labels),
        images=np.where(test[:, None, None, None], 255 - images.images, images.images),
    )
    first, second = (tuned("full", images=one).state_dict() for one in (images, turned))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_what_is_kept_is_the_best_on_validation() -> None:
    """A validation that contradicts training is best early on: later weights, which know better, are not kept."""
    images = striped(40)
    against = replace(images, labels=np.where(images.splits == "val", 1 - images.labels, images.labels))
    val = labels(against).val
    scores = {}
    for checks in (1, 30):  # 1: the last step alone, which there is no choice about
        tuning = replace(QUICK, least_steps=30, checks=checks, learning_rate=2e-3)
        model = tune(network(), "full", labels(against), tuning, 0, lambda _: None)
        scores[checks] = sum(score(against.labels[val], answers(model, network(), against, val)[0]).headline)
    assert scores[1] < 0.2 < 0.4 < scores[30]


def test_images_with_several_labels_are_learned_too() -> None:
    images = striped(60)
    several = replace(images, labels=np.stack([images.labels, (images.images[:, 0, 0, 0] > 99).astype(int)], axis=1))
    model = tune(network(), "full", labels(several), replace(QUICK, least_steps=50), 0, lambda _: None)
    test = np.flatnonzero(images.splits == "test")
    sure, dropped = answers(model, network(), several, test)
    assert score(several.labels[test], sure).auc > 0.9
    assert (np.abs(sure.sum(axis=1) - 1) > 0.05).any()  # each label by itself
    assert 0 < np.abs(sure - dropped).max() < 0.5


def test_as_many_steps_are_told_as_are_taken() -> None:
    told: list[int] = []
    images = labels(striped(20))
    tune(network(), "full", images, QUICK, 0, told.append)
    assert sum(told) == steps_of(QUICK, len(images.train), 8) == 12
    assert steps_of(Tuning(), 10_000, 32) == 20 * 313


def test_a_way_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="--finetune 'head': expected some of frozen, full, decay, lora"):
        Tuning(ways=("full", "head"))


def test_weights_that_are_no_numbers_are_refused() -> None:
    arm = network()

    def broken(images: np.ndarray) -> nn.Module:
        net = arm.build(images)
        with torch.no_grad():
            net.norm.weight[0] = torch.nan
        return net

    with pytest.raises(CheckpointError, match="NaN"):
        tuned("full", Network(broken, arm.recipe))


class Small(nn.Module):
    """A network on a machine whose memory takes so many images at once: torch's own error, as a GPU raises it."""

    def __init__(self, net: nn.Module, most: int) -> None:
        super().__init__()
        self.net, self.most = net, most

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": "^net"}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(images)} images")
        out: torch.Tensor = self.net(images)
        return out


def small(most: int) -> Network:
    arm = network()
    return Network(lambda images: Small(arm.build(images), most), arm.recipe)


def test_where_memory_runs_out_half_as_many_images_are_taken_and_the_result_says_so() -> None:
    images, tuning = striped(20), replace(QUICK, ways=("full",), batch_size=64)
    found = evaluate({"backbone": small(32)}, images, fractions=(1.0,), draws=1, tuning=tuning)
    assert found.notes[:2] == (
        "arm 'backbone', features: memory ran out with 64 images at once; done with 32",
        "arm 'backbone', full: memory ran out with 64 images at once; done with 32",
    )
    assert found.score("backbone", "full") > 0


def test_where_memory_runs_out_twice_a_line_says_with_how_many_images() -> None:
    with pytest.raises(ConfigError, match=r"arm 'backbone', features: memory ran out with 64 .* again with 32\. Free"):
        evaluate({"backbone": small(16)}, striped(20), fractions=(1.0,), draws=1)
