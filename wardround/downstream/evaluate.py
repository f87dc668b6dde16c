"""How much a backbone helps where labels are few: probed frozen, and trained on, at fractions of the labels."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from wardround.data import LabelledImages, read_labelled
from wardround.downstream.answers import Design, answer, draw_labels, steps
from wardround.downstream.arms import (
    Arm,
    Network,
    check_shape,
    imagenet_arm,
    protocol_of,
    refuse_volumes,
    release_arm,
    three_arms,
)
from wardround.downstream.explain import explain, unexplained
from wardround.downstream.finetune import Tuning
from wardround.downstream.load import release_folder
from wardround.downstream.results import result
from wardround.downstream.splits import split
from wardround.errors import ConfigError
from wardround.probe.evaluation import PROBES, Evaluation, Row
from wardround.registry.release import WEIGHTS, file_hashes
from wardround.registry.versions import versions
from wardround.report.explanation import draw_explanation
from wardround.report.measured import draw_all

__all__ = ["FRACTIONS", "PROBES", "Evaluation", "Request", "Row", "compare", "evaluate", "evaluate_backbone"]

FRACTIONS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Request:
    """What `wardround evaluate` is asked."""

    source: str  # a run folder, a release folder, NAME@alias or NAME/version
    data: Path
    label: str = "label"
    multi_label: bool = False
    by: tuple[str, ...] = ()  # columns whose groups are told apart
    against: tuple[str, ...] = ()  # other backbones: SOURCE, or NAME=SOURCE with the name that tables show
    imagenet: Path | None = None
    tuning: Tuning = field(default=Tuning(ways=()))
    fractions: tuple[float, ...] = FRACTIONS
    draws: int = 5
    seed: int = 0
    force_splits: bool = False
    device: str = "cpu"
    pictures: Path | None = None
    tracking: str | None = None
    trust: str | None = None  # as for `load_backbone`, of the backbone and of those it is compared with


def evaluate(
    arms: Mapping[str, Arm],
    images: LabelledImages,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 5,
    seed: int = 0,
    tuning: Tuning | None = None,
    force_splits: bool = False,
) -> Evaluation:
    """Return the scores of each arm on the test split, every arm with the same draws of labelled patients.

    A fraction counts training labels; validation, which chooses the linear probe's penalty and the step of
    a fine-tuning, is whole. All labels are one draw for the probes, which have no other chance in them;
    fine-tuning draws its new weights and orders as often as asked. Arms that are networks are also trained
    on in the ways of `tuning`; the untrained one is trained from scratch, at the same settings.
    Probes take about a second a thousand images beside the arms' own time. Raises DataError for a set that
    cannot tell: one class, a class missing from a split, a patient in two (unless forced); ConfigError for
    a fraction outside (0, 1], and where memory runs out twice.
    """
    if not fractions or not all(0.0 < fraction <= 1.0 for fraction in fractions) or draws < 1:
        raise ConfigError(
            f"fractions = {list(fractions)}, draws = {draws}: expected fractions in (0, 1] and draws above 0."
        )
    places = split(images, seed, force_splits)
    fractions = sorted(set(fractions))
    drawn = {fraction: draw_labels(images, places.train, fraction, draws, seed) for fraction in fractions}
    design = Design(images, places, drawn, tuning or Tuning(ways=()), draws, seed)
    notes = list(places.notes)
    answered = []
    with tqdm(total=steps(arms, design), desc="evaluation", unit="step", disable=None, delay=2, leave=False) as bar:
        for name, arm in arms.items():
            answered.append(answer(name, arm, design, notes, bar.update))
    return result(answered, design, notes, {**versions(), "scikit-learn": version("scikit-learn")})


def compare(
    folder: Path, images: LabelledImages, fractions: Sequence[float] = FRACTIONS, draws: int = 5, seed: int = 0
) -> Evaluation:
    """Return a released backbone's probes beside those of its random initialisation and of raw pixels.

    Raises ConfigError where the images are not of the size and channels that the backbone takes.
    """
    check_shape("backbone", protocol_of(folder), images.images)
    return replace(evaluate(three_arms(folder), images, fractions, draws, seed), weights=file_hashes(folder)[WEIGHTS])


def evaluate_backbone(request: Request, tell: Callable[[Evaluation], None] = lambda _: None) -> Evaluation:
    """Return the evaluation that a request asks for, and write its pictures.

    `tell` gets it before a picture is drawn: what took hours is not lost where drawing fails.
    """
    with ExitStack() as pulled:
        folder = pulled.enter_context(release_folder(request.source, request.tracking, request.trust))
        recipe = protocol_of(folder)
        refuse_volumes(request.source, recipe)
        arms = three_arms(folder, device=request.device)
        for name, source in map(_named, request.against):
            if name in arms:
                raise ConfigError(f"--against {name}: is the name of another arm; write OTHERNAME={source}.")
            arms[name] = release_arm(
                pulled.enter_context(release_folder(source, request.tracking, request.trust)), device=request.device
            )
        if request.imagenet is not None:
            arms["ImageNet"] = imagenet_arm(request.imagenet, recipe, device=request.device)
        images = read_labelled(request.data, recipe.data, request.label, multi_label=request.multi_label, by=request.by)
        for name, arm in arms.items():
            if isinstance(arm, Network):
                check_shape(name, arm.recipe, images.images)
        found = evaluate(
            arms, images, request.fractions, request.draws, request.seed, request.tuning, request.force_splits
        )
        found = replace(found, weights=file_hashes(folder)[WEIGHTS])
    if request.pictures is None:
        tell(found)
        return found
    backbone, places = arms["backbone"], split(images, request.seed, request.force_splits)
    assert isinstance(backbone, Network)
    if reason := unexplained(backbone, images, places):
        found = replace(found, notes=(*found.notes, reason))
    tell(found)
    draw_all(found, images, request.pictures)
    if not reason and not isinstance(explained := explain(backbone, images, places), str):
        draw_explanation(explained, images, request.pictures / "explanation.png")
    return found


def _named(given: str) -> tuple[str, str]:
    """Return the name that tables show, and the source, of NAME=SOURCE; a source alone is its own name."""
    name, equals, source = given.partition("=")
    return (name, source) if equals else (given, given)
