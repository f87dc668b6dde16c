"""A released backbone made smaller, and what that costs."""

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from torch import nn

from wardround.backbones import Backbone, build, family_of
from wardround.backbones.adapt import first_layers
from wardround.backbones.compressed import reshape
from wardround.backbones.release import module_of
from wardround.config import Protocol
from wardround.config.federation import BackboneConfig, CriteriaConfig, DataConfig
from wardround.config.site import ImagesConfig, SiteConfig
from wardround.data import open_site, read_labelled
from wardround.downstream.compared import Compared, likeness, probed, sizes
from wardround.downstream.compressed_release import Step, changed_shapes, lineage, write_reshaped, write_student
from wardround.downstream.distil import Distillation, Projection, distil, standard
from wardround.downstream.finetune import seeded
from wardround.downstream.load import load_backbone, protocol_of, release_folder
from wardround.downstream.low_rank import low_rank
from wardround.downstream.moments import MOST
from wardround.downstream.prune import prune
from wardround.downstream.splits import split
from wardround.errors import ConfigError, DataError
from wardround.probe.features import features
from wardround.registry.durable import new_folder
from wardround.registry.release import CONFIG

WAYS = {"prune": 2e-4, "low-rank": 2e-4, "distil": 1e-3}  # AdamW's rate: what is nearly there takes small steps
HELD = 256  # images at most that features are compared on
RESULT = "compressed.json"


@dataclass(frozen=True)
class Request:
    """What `wardround compress` is asked."""

    source: str  # a run folder, a release folder, NAME@alias or NAME/version
    by: str
    to: Path
    images: Path
    keep: float | None = None  # prune: share of a block's units; low-rank: of a layer's weights; unset: 0.5
    into: str | None = None  # distil: the smaller network
    steps: int | None = None  # of distillation; unset: 1,000, and none after the other two
    data: Path | None = None
    label: str = "label"
    multi_label: bool = False
    seed: int = 0
    device: str = "cpu"
    tracking: str | None = None
    trust: str | None = None

    def __post_init__(self) -> None:
        if self.by not in WAYS:
            raise ConfigError(f"--by {self.by}: expected one of {', '.join(WAYS)}.")
        if self.by == "distil" and (self.into is None or self.keep is not None):
            raise ConfigError("--by distil: takes --into NAME, a smaller network of timm, and no --keep.")
        if self.by != "distil" and self.into is not None:
            raise ConfigError(f"--into {self.into}: is for --by distil; --by {self.by} keeps the network.")
        if not 0.0 < self.share < 1.0:
            raise ConfigError(f"--keep {self.keep}: expected a share between 0 and 1, such as 0.5.")
        if self.count < (self.by == "distil"):
            raise ConfigError(f"--steps {self.steps}: expected {int(self.by == 'distil')} or more with --by {self.by}.")
        if self.to.exists() and (not self.to.is_dir() or any(self.to.iterdir())):
            raise ConfigError(f"{self.to}: is not empty; name a new folder.")

    @property
    def share(self) -> float:
        """What is kept."""
        return 0.5 if self.keep is None else self.keep

    @property
    def count(self) -> int:
        """Steps of distillation."""
        return self.steps if self.steps is not None else 1000 * (self.by == "distil")

    @property
    def settings(self) -> dict[str, object]:
        """What shapes the result, for its lineage."""
        found = {"into": self.into} if self.by == "distil" else {"keep": self.share}
        trained = asdict(self.how) if self.count else {"steps": 0}
        return {**found, **trained, "seed": self.seed}

    @property
    def how(self) -> Distillation:
        """How the smaller network is trained."""
        return Distillation(self.count, WAYS[self.by])


@dataclass(frozen=True)
class Images:
    """Images without labels, [N, C, S, S]."""

    seen: NDArray[np.uint8]  # to compress with
    held: NDArray[np.uint8]  # of other patients: to compare features on


def compress(request: Request) -> Compared:
    """Write a smaller backbone as the release folder `to`, with `compressed.json`, and return what it cost.

    `prune` and `low-rank` take two passes over at most 512 images; each step of distillation takes one of the smaller
    network, with gradients, and one of the original. On a CPU the weights are a function of the request, bit for bit.
    Raises ConfigError, DataError and CheckpointError; nothing is left of the folder then.
    """
    with ExitStack() as until_done:
        folder = until_done.enter_context(release_folder(request.source, request.tracking, request.trust))
        said, recipe = lineage(folder, request.source), protocol_of(folder)
        original = _original(folder, recipe, request)
        labelled = None
        if request.data is not None:
            labelled = read_labelled(request.data, recipe.data, request.label, multi_label=request.multi_label)
            split(labelled, request.seed)  # what is wrong with it is said before the work
        until_done.enter_context(seeded(request.seed, request.device))
        student = None if request.into is None else _student(request.into, recipe, original)
        images = until_done.enter_context(_opened(request.images, recipe.data, request.seed))
        to_original: nn.Module = nn.Identity()
        if student is None:
            net, losses = _reshaped(original, recipe, images, request)
        else:
            to_original, losses = _taught(original, student[1], recipe, images, request)
        step = Step(request.by, request.settings, len(images.seen) if request.count else min(MOST, len(images.seen)))
        with new_folder(request.to) as aside:
            if student is None:
                write_reshaped(aside, folder, said, step, net, changed_shapes(original, net.state_dict()))
            else:
                write_student(aside, folder, said, step, *student)
            smaller = load_backbone(aside).eval()
            before, after = sizes((folder, aside), (original, smaller), images.held, recipe.data)
            cosine, explained = likeness(
                *(
                    features(model, images.held, recipe.data.mean, recipe.data.std)
                    for model in (original, nn.Sequential(smaller, to_original))
                )
            )
            found = Compared(
                by=request.by,
                settings=request.settings,
                images=step.images,
                original=before,
                compressed=after,
                compared_on=len(images.held),
                least_cosine=cosine,
                explained=explained,
                losses=_ends(losses) if losses else None,
                probe=probed((folder, aside), labelled, request.seed) if labelled else None,
            )
            (aside / RESULT).write_text(json.dumps(asdict(found), indent=2) + "\n")
    return found


def _original(folder: Path, recipe: Protocol, request: Request) -> nn.Module:
    """Return the backbone to compress. Raises ConfigError for one that cannot be."""
    if recipe.data.dimensions == 3:
        raise ConfigError(
            f"backbone '{request.source}': is one of volumes; only those of flat images are compressed. Export it as "
            "it is ('wardround export'), or pretrain a smaller one."
        )
    if "compressed" in json.loads((folder / CONFIG).read_bytes()):
        raise ConfigError(f"backbone '{request.source}': is pruned or factorised already; compress its original.")
    return load_backbone(folder).eval()


def _student(name: str, recipe: Protocol, original: nn.Module) -> tuple[Protocol, Backbone]:
    """Return the recipe and the network to distil into. Raises ConfigError for one that does not fit or is no smaller.

    It takes a ViT's patches from a ViT, and group normalisation in the place of batch normalisation.
    """
    try:
        both = {family_of(name).masking, family_of(recipe.backbone.name).masking}
        patch = recipe.backbone.patch_size if both == {"tokens"} else None
        chosen = BackboneConfig(name=name, patch_size=patch)
        backbone = build(chosen, recipe.data)
    except ConfigError as error:
        reason = str(error).removeprefix(f"[backbone] name = '{name}'").lstrip(": ")
        raise ConfigError(f"--into {name}: {reason}") from error
    size, limit = (sum(one.numel() for one in net.parameters()) for net in (backbone, original))
    if size >= limit:
        raise ConfigError(
            f"--into {name}: has {size:,} parameters, and the original '{recipe.backbone.name}' {limit:,}; take a "
            "smaller one."
        )
    return recipe.model_copy(update={"backbone": chosen}), backbone


@contextmanager
def _opened(folder: Path, data: DataConfig, seed: int) -> Iterator[Images]:
    """Give the images of a folder: all below it, or of a labelled one its training split.

    A tenth of the patients is held. Raises DataError where there are none, or none of a second patient.
    """
    if not folder.is_dir():
        raise DataError(f"--images {folder}: is no folder; name one of images, or a labelled folder.")
    with tempfile.TemporaryDirectory() as aside:
        site = SiteConfig(format=1, name="images", work=Path(aside), images=ImagesConfig(folder=folder))
        try:
            found = open_site(site, data.model_copy(update={"criteria": CriteriaConfig()}))
        except DataError as error:
            reason = str(error).partition(": ")[2].replace("Set [images] folder", "Name another folder by --images")
            raise DataError(f"--images {folder}: {reason}") from error
        order = np.random.default_rng(seed).permutation(found.num_patients)
        held = np.isin(found.patients, order[: max(1, len(order) // 10)])
        if held.all():
            raise DataError(f"--images {folder}: are all of one patient; some of another one are needed to compare.")
        yield Images(found.images[~held], found.images[held][:HELD])


def _reshaped(original: nn.Module, recipe: Protocol, images: Images, request: Request) -> tuple[nn.Module, list[float]]:
    """Return the original with smaller layers, trained towards it where steps are asked for, and the losses."""
    arguments = (original, images.seen, recipe.data, request.share, request.device)
    tensors = prune(*arguments) if request.by == "prune" else low_rank(*arguments, first_layers(original))
    original.cpu()
    others = " or ".join(way for way in WAYS if way != request.by)
    if tensors is None:
        raise ConfigError(
            f"--by {request.by}: a '{recipe.backbone.name}' has no layer that could be made smaller; take {others}."
        )
    net = copy.deepcopy(original)
    reshape(net, changed_shapes(original, tensors))
    net.load_state_dict(tensors)
    try:
        features(net, images.held[:2], recipe.data.mean, recipe.data.std)
    except AttributeError as error:  # XCiT asks a layer for its weight, and two in its place have none
        raise ConfigError(
            f"--by {request.by}: a '{recipe.backbone.name}' looks into its layers; take {others}."
        ) from error
    losses = []
    if request.count:
        told = standard(original, images.seen, recipe.data, request.device)
        losses = distil(original, net, told, images.seen, recipe, request.how, request.seed, request.device)
        original.cpu()
    return net.cpu().eval(), losses


def _taught(
    original: nn.Module, student: Backbone, recipe: Protocol, images: Images, request: Request
) -> tuple[nn.Module, list[float]]:
    """Train a student in place, and return what leads from its features to the original's, and the losses."""
    told = standard(original, images.seen, recipe.data, request.device)
    pair = nn.Sequential(module_of(student), Projection(student.dim, told))
    losses = distil(original, pair, told, images.seen, recipe, request.how, request.seed, request.device)
    original.cpu()
    return pair.cpu().eval()[1], losses


def _ends(losses: list[float]) -> tuple[float, float]:
    """Return the means of the first and the last tenth."""
    tenth = max(1, len(losses) // 10)
    return fmean(losses[:tenth]), fmean(losses[-tenth:])
