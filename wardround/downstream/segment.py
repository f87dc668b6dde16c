"""How much a pretrained encoder helps a segmentation: the same network from it and from random weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wardround import ssl as methods
from wardround.backbones import save_release
from wardround.data import read_masked
from wardround.downstream.load import protocol_of, release_folder
from wardround.downstream.memory import smaller_once
from wardround.downstream.monai_dice import dice
from wardround.downstream.monai_encoders import load_segmenter
from wardround.downstream.results import digest_of
from wardround.downstream.splits import split_masked
from wardround.downstream.train_segmenter import Task, Training, answer, train
from wardround.errors import ConfigError
from wardround.probe.fractions import draw_fraction
from wardround.probe.interval import interval_of_mean
from wardround.probe.segmentation import Segmentation, SegmentedRow
from wardround.registry.release import WEIGHTS, file_hashes
from wardround.registry.versions import versions
from wardround.report.segmented import draw_segmented
from wardround.ssl.draws import generator

ARMS = ("backbone", "random")
SHOWN = 6  # test images in the picture


@dataclass(frozen=True)
class Request:
    """What `wardround segment` is asked."""

    source: str
    data: Path
    decoder: str | None = None
    fractions: tuple[float, ...] = (0.1, 1.0)
    draws: int = 3
    training: Training = field(default=Training())
    seed: int = 0
    force_splits: bool = False
    device: str = "cpu"
    pictures: Path | None = None
    tracking: str | None = None
    trust: str | None = None  # as for `load_backbone`


def segment(request: Request, tell: Callable[[Segmentation], None] = lambda _: None) -> Segmentation:
    """Return the Dice of both arms on the test split at each fraction of the training images, and write the picture.

    Both see the same draws of images, orders and views, and begin with the same decoder. The step whose weights are
    kept is chosen on the validation images. On a CPU a function of its arguments, bit for bit. Raises ConfigError for a
    backbone or decoder that does not fit and for bad fractions, DataError for a set that cannot tell. `tell` gets the
    result before the picture is drawn: what took hours is not lost where drawing fails.
    """
    if not request.fractions or not all(0.0 < share <= 1.0 for share in request.fractions) or request.draws < 1:
        raise ConfigError(f"fractions = {list(request.fractions)}: expected some in (0, 1], and draws above 0.")
    with release_folder(request.source, request.tracking, request.trust) as folder:
        decoder = load_segmenter(folder, 2, decoder=request.decoder).decoder  # refused before images are read
        recipe = protocol_of(folder)
        images = read_masked(request.data, recipe.data)
        places = split_masked(images, request.seed, request.force_splits)
        task = Task(recipe, images, places, decoder, request.training, request.device)
        notes = list(places.notes)
        with _random_release(task) as random:
            found = _answers(dict(zip(ARMS, (folder, random), strict=True)), task, request, notes)
        result = _result(found, task, request, notes, file_hashes(folder)[WEIGHTS])
    tell(result)
    if request.pictures is not None:
        _draw(found, task, max(request.fractions), request.pictures / "segmentation.png")
    return result


Found = dict[tuple[str, float], list[tuple[int, NDArray[np.uint8]]]]  # of each draw, images trained on and test answers


def _answers(arms: dict[str, Path], task: Task, request: Request, notes: list[str]) -> Found:
    """Return what each arm's networks answer on the test images, draw by draw."""
    images, found = task.images, Found()
    total = len(arms) * len(set(request.fractions)) * request.draws * task.training.steps
    with tqdm(total=total, desc="segmentation", unit="step", disable=None, delay=2, leave=False) as bar:
        for name, folder in arms.items():
            for fraction in sorted(set(request.fractions)):
                for number in range(request.draws):
                    rng = np.random.default_rng([request.seed, 1, round(fraction * 1e6), number])
                    known, alike = task.places.train, np.zeros(len(task.places.train), np.int64)
                    chosen = known[draw_fraction(alike, images.patients[known], fraction, rng)]
                    # The same for both arms, so that their differences are paired.
                    seed = generator(request.seed, "segmentation", str(fraction), number).initial_seed() % 2**32
                    work = partial(train, folder, chosen, task, seed, bar.update)
                    model = smaller_once(work, task.training.batch_size, f"arm '{name}'", notes)
                    answered = answer(model, images.images[task.places.test], task)
                    found.setdefault((name, fraction), []).append((len(chosen), answered))
    return found


@contextmanager
def _random_release(task: Task) -> Iterator[Path]:
    """Give a release of the encoder that the seed initialises, so that it is loaded as the trained one is."""
    with TemporaryDirectory() as aside:
        recipe, folder = task.recipe, Path(aside) / "random"
        start = methods.get_state(methods.build(recipe))
        shown = task.images.images[task.places.train]  # for statistics of batch normalisation, which no state holds
        save_release(recipe, start, folder, {"protocol": recipe.model_dump(mode="json")}, shown)
        yield folder


def _result(found: Found, task: Task, request: Request, notes: list[str], weights: str) -> Segmentation:
    """Return what the answers of both arms make."""
    images, places = task.images, task.places
    truth, patients = images.masks[places.test], images.patients[places.test]
    scores = {key: np.array([dice(one, truth, len(images.values)) for _, one in drawn]) for key, drawn in found.items()}
    rows, gains = [], []
    for (arm, fraction), values in scores.items():
        count = float(np.mean([number for number, _ in found[arm, fraction]]))
        rows.append(_row(arm, fraction, count, values, patients, request.seed, lowest=0.0))
        if arm == ARMS[0]:
            gained = values - scores[ARMS[1], fraction]
            gains.append(_row(f"{arm} less {ARMS[1]}", fraction, count, gained, patients, request.seed, lowest=-1.0))
    used = {"train": places.train, "val": places.val, "test": places.test}
    return Segmentation(
        decoder=task.decoder,
        rows=tuple(rows),
        gains=tuple(gains),
        values=images.values,
        steps=task.training.steps,
        images={name: len(of) for name, of in used.items()},
        patients={name: len(np.unique(images.patients[of])) for name, of in used.items()},
        notes=tuple(notes),
        seed=request.seed,
        data=digest_of(images.images, images.masks),
        weights=weights,
        versions=versions(),
    )


def _row(
    arm: str,
    fraction: float,
    images: float,
    values: NDArray[np.float64],
    patients: NDArray[np.int64],
    seed: int,
    lowest: float,
) -> SegmentedRow:
    """Return the row of a number a draw and test image, [draws, N], all between `lowest` and 1."""
    ends = interval_of_mean(values, patients, seed)
    low, high = (None, None) if ends is None else (float(np.clip(end, lowest, 1.0)) for end in ends)
    scores = values.mean(axis=1)
    return SegmentedRow(arm, fraction, images, float(scores.mean()), low, high, tuple(scores.tolist()))


def _draw(found: Found, task: Task, fraction: float, path: Path) -> None:
    """Write a picture of some test images, their masks, and what each arm's first draw makes of them."""
    test = task.places.test
    shown = np.linspace(0, len(test) - 1, min(SHOWN, len(test)), dtype=int)
    images, masks = task.images.images[test[shown]], task.images.masks[test[shown]]
    answers = {arm: found[arm, fraction][0][1][shown] for arm in ARMS}
    scores = {arm: dice(one, masks, len(task.images.values)) for arm, one in answers.items()}
    draw_segmented(images, masks, answers, scores, path)
