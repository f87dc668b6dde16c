"""A segmentation compares a backbone with its random start, fairly and on whole masks."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image
from rich.console import Console
from test_data_masks import rewrite, write_masked

from wardround.backbones import save_release
from wardround.config.federation import DataConfig
from wardround.data import read_masked
from wardround.downstream.monai_dice import dice
from wardround.downstream.segment import Request, segment
from wardround.downstream.splits import split_masked
from wardround.downstream.train_segmenter import Task, Training, views
from wardround.errors import ConfigError, DataError
from wardround.plan import resolve
from wardround.probe.segmentation import Segmentation
from wardround.report.segmented import segmented_table

QUICK = Training(steps=4, batch_size=4, checks=2)


def release(folder: Path, moved: float = 0.0) -> str:
    plan = resolve(tiny(views={"horizontal_flip": True, "vertical_flip": True, "rotation": 90.0}))
    state = {name: array + np.float32(moved) for name, array in plan.state.items()}
    save_release(plan.protocol, state, folder, {"protocol": plan.protocol.model_dump(mode="json")})
    return str(folder)


def test_dice_is_that_of_hand_and_an_empty_mask_asks_for_an_empty_answer() -> None:
    masks, answers = np.zeros((2, 4, 4, 4), np.uint8)
    masks[0, :2], answers[0, 1:3] = 1, 1  # 8 pixels each, 4 of them shared
    answers[2, 0, 0] = 1
    assert dice(answers, masks, 2).tolist() == [0.5, 1.0, 0.0, 1.0]
    masks[3, 0, :2], answers[3, 0, :2] = 1, (1, 2)  # class 1: 2 * 1 / 3, class 2: 0
    assert dice(answers, masks, 3)[3] == pytest.approx(1 / 3)


def test_an_untrained_backbone_gains_exactly_nothing(tmp_path: Path) -> None:
    """Only if both arms see the same images, orders and views, from the same decoder, is this 0 to the bit."""
    request = Request(release(tmp_path / "release"), write_masked(tmp_path / "data"), draws=2, training=QUICK)
    found = segment(replace(request, pictures=tmp_path / "pictures"))
    assert [(gain.dice, gain.low, gain.high) for gain in found.gains] == [(0.0, 0.0, 0.0)] * 2
    assert found.rows[0].scores[0] != found.rows[0].scores[1], "each draw has its own images and weights"
    assert [(row.arm, row.fraction, row.images) for row in found.rows] == [
        ("backbone", 0.1, 2.0),
        ("backbone", 1.0, 12.0),
        ("random", 0.1, 2.0),
        ("random", 1.0, 12.0),
    ]
    assert found.images == {"train": 12, "val": 4, "test": 4} and found.decoder == "unetr"
    assert Segmentation.from_json(found.to_json()) == found
    console = Console(width=120, file=io.StringIO())
    console.print(segmented_table(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "backbone less random" in text and "+0.000 to +0.000" in text and "10% of images" in text
    pixels = np.asarray(Image.open(tmp_path / "pictures/segmentation.png").convert("L"))
    assert min(pixels.shape) > 300 and pixels.std() > 5


def test_another_backbone_gives_other_answers_and_the_same_seed_the_same(tmp_path: Path) -> None:
    request = Request(
        release(tmp_path / "release", 0.05),
        write_masked(tmp_path / "data"),
        decoder="transunet",
        fractions=(0.5,),
        draws=1,
        training=QUICK,
    )
    found = segment(request)
    assert found.gains[0].dice != 0.0 and found.decoder == "transunet"
    console = Console(width=120, file=io.StringIO())
    console.print(segmented_table(found))
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "one draw of images and new weights" in said and "over test patients alone (bootstrap)" in said
    assert segment(request) == found
    assert segment(replace(request, seed=1)).rows != found.rows


def test_a_view_of_a_mask_is_the_mask_of_the_view(tmp_path: Path) -> None:
    plan = resolve(tiny(views={"horizontal_flip": True, "vertical_flip": True, "rotation": 90.0}))
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(np.kron(rng.integers(0, 2, (8, 4, 4)), np.ones((4, 4)))).to(torch.uint8)
    images = read_masked(write_masked(tmp_path), DataConfig(image_size=16))
    task = Task(plan.protocol, images, split_masked(images), "unetr", QUICK, "cpu")
    seen, truth = views(255 * masks[:, None], masks, task, (0, 0))
    assert seen.shape == truth.shape == (8, 1, 16, 16)
    bright = seen > (0.5 - plan.protocol.data.mean[0]) / plan.protocol.data.std[0]
    assert (bright == truth.bool()).float().mean() > 0.95, "bilinear and nearest differ at borders alone"
    assert not torch.equal(truth[:, 0], masks.long())


def blank(folder: Path, split: str) -> None:
    for row in rewrite(folder, lambda row: None):
        if row["split"] == split:
            Image.fromarray(np.zeros((20, 20), np.uint8)).save(folder / row["mask"])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: rewrite(f, lambda row: row.update(split=row["split"].replace("test", "x"))),
            "no row .* has split test",
        ),
        (lambda f: blank(f, "train"), "all 12 masks of split train are empty"),
        (lambda f: blank(f, "test"), "all 4 masks of split test are empty"),
        (lambda f: blank(f, "val"), "all 4 masks of split val are empty"),
        (lambda f: rewrite(f, lambda row: row.update(patient="one")), "1 of 1 patients are in more than one split"),
    ],
)
def test_a_set_that_cannot_tell_is_refused(spoil, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = write_masked(tmp_path / "data")
    spoil(folder)
    with pytest.raises(DataError, match=said):
        segment(Request(release(tmp_path / "release"), folder, training=QUICK))


def test_without_validation_images_some_of_train_choose(tmp_path: Path) -> None:
    folder = write_masked(tmp_path)
    rewrite(folder, lambda row: row.update(split=row["split"].replace("val", "train")))
    places = split_masked(read_masked(folder, DataConfig(image_size=16)))
    assert (len(places.train), len(places.val)) == (12, 4) and places.notes[0].startswith("no split val: 4 images of 2")


def test_what_is_asked_wrongly_is_refused_before_an_image_is_read(tmp_path: Path) -> None:
    request = Request(release(tmp_path / "release"), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"fractions = \[2\.0\]: expected some in \(0, 1\]"):
        segment(replace(request, fractions=(2.0,)))
    with pytest.raises(ConfigError, match="--decoder flexible_unet: on this backbone expected unetr or transunet"):
        segment(replace(request, decoder="flexible_unet"))
