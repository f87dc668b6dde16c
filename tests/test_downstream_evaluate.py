"""The comparison of a backbone with its random start and raw pixels: fair, repeatable, readable."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny, write_labelled
from rich.console import Console

from wardround.backbones import save_release
from wardround.config.federation import DataConfig
from wardround.data import LabelledImages, procedural_set, read_labelled
from wardround.downstream.arms import protocol_of, raw_pixels, three_arms
from wardround.downstream.evaluate import compare, evaluate, evaluate_backbone
from wardround.errors import CheckpointError, ConfigError, DataError
from wardround.plan import resolve

SIZE = 16


def striped(patients: int = 60, images_each: int = 4) -> LabelledImages:
    """Return stripes across or along, at random offsets: no single pixel tells the classes apart."""
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(patients), images_each)
    labels = (patient // 5 % 2).astype(np.int64)
    offsets = rng.integers(0, 4, len(patient))
    wave = ((np.arange(SIZE)[None] + offsets[:, None]) // 2 % 2) * 200  # [N, S]
    images = np.where(labels[:, None, None] == 0, wave[:, :, None], wave[:, None, :])
    noisy = np.clip(images + rng.normal(0, 20, (len(patient), SIZE, SIZE)), 0, 255).astype(np.uint8)
    turn = np.array(["train", "train", "train", "val", "test"])
    return LabelledImages(
        images=noisy[:, None],
        labels=labels,
        classes=("across", "along"),
        patients=patient,
        sites=np.full(len(patient), "s"),
        splits=turn[patient % 5],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plan = resolve(tiny())
    save_release(plan.protocol, plan.state, tmp_path / "release", {"protocol": plan.protocol.model_dump(mode="json")})
    return tmp_path / "release"


def answer(images: np.ndarray) -> np.ndarray:
    """An arm that knows: the variation along each axis."""
    x = images[:, 0].astype(np.float32)
    return np.stack([np.abs(np.diff(x, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)], axis=1)


def noise(images: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(len(images), 8)).astype(np.float32)


def test_an_arm_that_knows_scores_one_and_noise_scores_a_half() -> None:
    found = evaluate({"knows": answer, "noise": noise}, striped(), fractions=(0.1, 1.0), draws=3)
    assert found.score("knows") == found.score("knows", "k-NN") == 1.0
    assert 0.3 < found.score("noise") < 0.7
    assert found.images == {"train": 144, "val": 48, "test": 48}
    assert found.patients == {"train": 36, "val": 12, "test": 12}


def test_a_fraction_reports_its_images_draws_and_spread() -> None:
    rows = evaluate({"noise": noise}, striped(), fractions=(1.0, 0.1), draws=4).rows
    assert [(row.probe, row.fraction, row.draws, row.sd is None) for row in rows] == [
        ("k-NN", 0.1, 4, False),
        ("k-NN", 1.0, 1, True),
        ("linear", 0.1, 4, False),
        ("linear", 1.0, 1, True),
    ]
    assert rows[0].images == 16.0  # 0.1 of 72 images a class, by patients of four: two patients
    assert rows[0].sd is not None and rows[0].sd.auc > 0.0


def test_every_arm_sees_the_same_draws_and_a_second_evaluation_is_equal() -> None:
    arms = {"first": noise, "second": noise}
    found = evaluate(arms, striped(), fractions=(0.1,), draws=3, seed=4)
    first, second = (tuple(replace(row, arm="") for row in found.rows if row.arm == name) for name in arms)
    assert first == second
    assert evaluate(arms, striped(), fractions=(0.1,), draws=3, seed=4) == found
    assert evaluate(arms, striped(), fractions=(0.1,), draws=3, seed=5) != found


def test_test_images_do_not_reach_the_probes() -> None:
    images = striped()
    test = images.splits == "test"
    turned = replace(images, labels=np.where(test, 1 - images.labels, images.labels))
    found = evaluate({"knows": answer}, turned, fractions=(1.0,))
    assert found.score("knows") == 0.0  # it learned the rule of train, which test contradicts


def test_the_result_reads_as_a_table_and_as_json() -> None:
    images = striped()
    found = evaluate(
        {"knows": answer}, replace(images, splits=np.where(images.splits == "val", "train", images.splits))
    )
    console = Console(width=120, file=io.StringIO())
    console.print(found.table())
    text = console.file.getvalue()
    for part in (
        "48 test images of 12 patients",
        "1% of labels",
        "100% of labels",
        "k-NN",
        "1.000 / 1.000",
        "no split val",
    ):
        assert part in text
    saved = json.loads(found.to_json())
    assert saved["rows"][0]["mean"] == {"balanced_accuracy": 1.0, "auc": 1.0}
    assert saved["notes"] == list(found.notes)


@pytest.mark.parametrize(("fractions", "draws"), [((), 1), ((0.0,), 1), ((1.5,), 1), ((0.5,), 0)])
def test_a_fraction_that_is_none_is_refused(fractions: tuple[float, ...], draws: int) -> None:
    with pytest.raises(ConfigError, match=r"expected fractions in \(0, 1\]"):
        evaluate({"knows": answer}, striped(), fractions, draws)


def test_a_set_that_cannot_tell_is_refused_before_any_feature_is_computed() -> None:
    images = striped()
    with pytest.raises(DataError, match="needs two classes"):
        evaluate({"never": lambda _: pytest.fail("computed")}, replace(images, labels=images.labels * 0))


def test_raw_pixels_are_the_image_at_thirty_two() -> None:
    flat = np.full((3, 1, 48, 48), 7, np.uint8)
    assert raw_pixels(flat).shape == (3, 1024)
    np.testing.assert_allclose(raw_pixels(flat), 7.0, rtol=1e-5)
    exact = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    np.testing.assert_array_equal(raw_pixels(exact), exact.reshape(2, -1))


def test_the_random_arm_is_the_state_that_training_started_from(folder: Path) -> None:
    """The fixture releases the initial state, so that backbone and random must agree bit for bit."""
    arms = three_arms(folder)
    images = striped().images
    np.testing.assert_array_equal(arms["backbone"](images), arms["random"](images))


def test_a_trained_backbone_and_its_random_start_differ(folder: Path, tmp_path: Path) -> None:
    plan = resolve(tiny())
    moved = {name: array + np.float32(0.05) for name, array in plan.state.items()}
    save_release(plan.protocol, moved, tmp_path / "moved", {"protocol": plan.protocol.model_dump(mode="json")})
    arms = three_arms(tmp_path / "moved")
    images = striped().images
    assert not np.allclose(arms["backbone"](images), arms["random"](images))
    np.testing.assert_array_equal(arms["random"](images), three_arms(folder)["random"](images))


def test_images_of_another_size_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"images are \(1, 32, 32\), the backbone takes \(1, 16, 16\)"):
        compare(folder, procedural_set(8, 0, DataConfig(image_size=32)))


def test_a_release_without_a_protocol_says_what_it_lacks(folder: Path) -> None:
    (folder / "provenance.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not say how the backbone was trained"):
        protocol_of(folder)


def test_a_labelled_folder_is_evaluated_from_a_release_folder(folder: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", {"lyon": 60, "oslo": 60})
    found = evaluate_backbone(str(folder), data, "label", 2, None)
    assert [row.arm for row in found.rows[::6]] == ["backbone", "random", "raw pixels"]
    assert all(0.0 <= row.mean.auc <= 1.0 for row in found.rows)


@pytest.mark.slow
def test_the_known_floor_of_raw_pixels_on_real_cells_is_found(shared_data: Callable[[str], Path]) -> None:
    """On the real malaria cells a logistic regression on raw 32 x 32 pixels reaches .60 / .71; so must this one.

    Only real images show that the probes' settings are no worse than those of a careful person.
    """
    torch.manual_seed(0)
    images = read_labelled(shared_data("malaria_cells"), DataConfig(image_size=32))
    found = evaluate({"raw pixels": raw_pixels}, images, fractions=(1.0,))
    linear = found.rows[1].mean
    assert (linear.balanced_accuracy, linear.auc) == pytest.approx((0.60, 0.71), abs=0.03)
