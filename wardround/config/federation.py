"""The federation's file: what the sites agree on, and what the coordinator keeps for itself.

`Protocol` is the part that every site approves: it covers whatever a site computes and releases.
Its digest is what run folders, journals and messages carry. `[membership]`, `[evaluation_set]` and
`[release]` are outside it: they change neither what a site computes nor what leaves it.
"""

from datetime import date
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from wardround.config.aggregation import AggregationConfig
from wardround.config.correction import CorrectionConfig, NoCorrectionConfig, ScaffoldConfig, refuse_unfit
from wardround.config.membership import EvaluationSetConfig, MembershipConfig
from wardround.config.method import MAEConfig, MethodConfig
from wardround.config.privacy import NoPrivacyConfig, PrivacyConfig
from wardround.config.release import ReleaseConfig
from wardround.config.strict import NAMES, Name, Strict, digest, read_toml
from wardround.config.views import COMPARED_CROP, ViewsConfig

Encoding = Literal["float32", "bfloat16", "int8"]


class BackboneConfig(Strict):
    """The network that is kept."""

    name: str = Field(
        default="vit_tiny_patch16_224",
        description="A timm architecture of a supported family, or a volume's network such as monai_vit_tiny.",
    )
    patch_size: int | None = Field(
        default=None, ge=2, le=64, description="ViT: edge of a patch in pixels, where not the architecture's."
    )
    depth: int | None = Field(
        default=None, ge=1, le=64, description="ViT: number of blocks, where not the architecture's."
    )
    norm: Literal["group", "batch"] = Field(
        default="group",
        description="What stands where the family has batch normalisation. group: group normalisation. batch: batch "
        "statistics, which couple patients: only without differential privacy.",
    )
    batch_norm: Literal["silobn", "fedbn"] = Field(
        default="silobn",
        description="norm = batch: what stays at the site. silobn: the statistics. fedbn: scale and shift too.",
    )
    frozen_stages: int = Field(default=0, ge=0, le=64, description="How many first stages are not trained.")


class CriteriaConfig(Strict):
    """Which images take part; what a file does not say excludes it only where it is asked for."""

    modality: tuple[str, ...] = Field(
        default=(), description="DICOM Modality codes, such as CR or DX; empty takes all."
    )
    body_part: tuple[str, ...] = Field(default=(), description="DICOM BodyPartExamined values; empty takes all.")
    view: tuple[str, ...] = Field(
        default=(), description="DICOM ViewPosition values, such as PA or AP; empty takes all."
    )
    date_from: date | None = Field(default=None, description="First StudyDate that counts (YYYY-MM-DD).")
    date_to: date | None = Field(default=None, description="Last StudyDate that counts (YYYY-MM-DD).")
    min_side: int = Field(default=16, ge=1, le=8192, description="Smallest height and width in pixels.")
    max_images_per_patient: int | None = Field(
        default=None, ge=1, le=1_000_000, description="At most this many images of one patient, in content order."
    )


class DataConfig(Strict):
    """What an image is when it reaches the network: channels, size, intensities."""

    dimensions: Literal[2, 3] = Field(
        default=2, description="2: pictures and slices. 3: NIfTI files and DICOM series as volumes."
    )
    image_size: int = Field(
        default=64, ge=16, le=1024, description="Edge in pixels of the square, or in voxels of the cube, trained on."
    )
    spacing: tuple[float, float, float] | None = Field(
        default=None,
        description="3: millimetres from voxel to voxel that volumes are resampled to, from foot to head, from back to "
        "front, and from left to right.",
    )
    cubes_per_volume: int = Field(default=1, ge=1, le=1000, description="3: how many cubes a volume gives.")
    channels: Literal[1, 3] = Field(default=1, description="Channels of an image: 1 grey, 3 colour.")
    convert_channels: bool = Field(
        default=False,
        description="Convert grey to colour and back; without it images of another channel count are left out, and "
        "counted.",
    )
    mean: tuple[float, ...] = Field(
        default=(0.5,), description="A channel's mean on [0, 1]: declared, never measured at a site."
    )
    std: tuple[float, ...] = Field(default=(0.25,), description="A channel's standard deviation on [0, 1], declared.")
    window: tuple[float, float] | None = Field(
        default=None,
        description="Centre and width, in the modality's own units, for every image; else the file's own window.",
    )
    slice_stride: int = Field(
        default=1, ge=1, le=1000, description="Of multi-frame files and volumes, take every n-th frame or slice."
    )
    criteria: CriteriaConfig = Field(default=CriteriaConfig(), description="Inclusion criteria.")

    @model_validator(mode="after")
    def _one_constant_a_channel(self) -> Self:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for channels = {self.channels}; give one a channel")
        if min(self.std) <= 0.0:
            raise ValueError(f"std = {list(self.std)}: expected values above 0")
        if self.window is not None and self.window[1] <= 0.0:
            raise ValueError(f"window = {list(self.window)}: expected a width above 0")
        return self

    @model_validator(mode="after")
    def _keys_fit_the_dimensions(self) -> Self:
        if self.dimensions == 2 and (self.spacing is not None or self.cubes_per_volume != 1):
            raise ValueError("spacing and cubes_per_volume are keys of volumes; remove them, or set dimensions = 3")
        if self.dimensions == 3 and (self.spacing is None or min(self.spacing) <= 0.0):
            raise ValueError("dimensions = 3 needs spacing: three numbers above 0, in millimetres")
        if self.dimensions == 3 and self.slice_stride != 1:
            raise ValueError(f"slice_stride = {self.slice_stride}: volumes are read whole; remove it")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image: (C, S, S), or (C, S, S, S) where it is a cube."""
        return (self.channels, *[self.image_size] * self.dimensions)


class TrainingConfig(Strict):
    """What a site does in a round."""

    rounds: int = Field(ge=1, le=100_000, description="Rounds of the federation.")
    local_steps: int = Field(ge=1, le=1_000_000, description="Optimiser steps a site takes in a round.")
    batch_size: int = Field(
        default=64, ge=2, le=65_536, description="Images a step; with differential privacy, units expected a step."
    )
    optimiser: Literal["adamw", "sgd"] = Field(default="adamw", description="The sites' own optimiser.")
    learning_rate: float = Field(default=1e-3, gt=0.0, le=10.0, description="Peak learning rate of a local step.")
    weight_decay: float = Field(
        default=0.05, ge=0.0, le=1.0, description="Weight decay: decoupled in adamw, part of the gradient in sgd."
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="adamw: decay of its two moments, in [0, 1).")
    local_momentum: float = Field(default=0.0, ge=0.0, lt=1.0, description="sgd: momentum of the local steps.")
    correction: CorrectionConfig = Field(default=NoCorrectionConfig(), description="Against a site's drift.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up, counted over the federation.")
    clip_norm: float | None = Field(
        default=1.0,
        gt=0.0,
        description="Largest norm of a step's joint gradient; not used where [privacy] clips each unit's.",
    )
    optimiser_state: Literal["fresh", "kept"] = Field(
        default="kept", description="Whether a site's moments start anew in each round or are part of its site memory."
    )
    teacher_state: Literal["fresh", "kept"] = Field(
        default="kept",
        description="Whether a site's teacher starts from the incoming state in each round or is part of its site "
        "memory; for methods that have one.",
    )
    layer_decay: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Each stage learns at this share of the rate of the stage above it."
    )
    resolutions: tuple[tuple[int, int], ...] = Field(
        default=(),
        description="Pairs of first round and edge in pixels: from that round on, views are of this size. Empty: "
        "always [data] image_size.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: forward and backward under autocast; weights stay float32."
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warmup_steps > self.total_steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps}: the federation has only {self.total_steps} steps; lower it"
            )
        firsts = [first for first, _ in self.resolutions]
        if self.resolutions and (firsts[0] != 1 or firsts != sorted(set(firsts))):
            raise ValueError(f"resolutions begin at rounds {firsts}: expected 1, then later rounds in order")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: expected values in [0, 1)")
        return self

    @model_validator(mode="after")
    def _keys_fit_the_optimiser(self) -> Self:
        if self.optimiser == "adamw" and self.local_momentum:
            raise ValueError("local_momentum is a key of optimiser = 'sgd'; remove it, or set optimiser = 'sgd'")
        plain = self.optimiser == "sgd" and self.local_momentum == 0.0 and self.layer_decay == 1.0
        if isinstance(self.correction, ScaffoldConfig) and not plain:
            raise ValueError(
                "correction = 'scaffold' takes a site's step over its learning rate for a mean gradient, which only "
                "plain SGD keeps; set optimiser = 'sgd', local_momentum = 0.0 and layer_decay = 1.0"
            )
        return self

    @property
    def total_steps(self) -> int:
        """Local steps of one site over the whole federation, which the schedule spans."""
        return self.rounds * self.local_steps


class Recipe(Strict):
    """How a state is trained: all that both files below share."""

    name: Name = Field(description=f"The federation's name: {NAMES}.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="The experiment's seed; never that of DP noise.")
    encoding: Encoding = Field(
        default="float32",
        description="Numbers as they cross, up and down; what is lost is added to what crosses next. bfloat16: half "
        "the bytes. int8: a quarter; not with noise = 'server' in [privacy].",
    )
    backbone: BackboneConfig = Field(default=BackboneConfig(), description="The network that is kept.")
    method: MethodConfig = Field(default=MAEConfig(), description="The self-supervised method.")
    views: ViewsConfig = Field(default=ViewsConfig(), description="Augmentation.")
    data: DataConfig = Field(
        default=DataConfig(), validate_default=True, description="Images as the network sees them."
    )
    training: TrainingConfig = Field(description="A site's work in a round.")
    aggregation: AggregationConfig = Field(default=AggregationConfig(), description="The server's fold.")
    privacy: PrivacyConfig = Field(default=NoPrivacyConfig(), description="Differential privacy.")

    @field_validator("data")
    @classmethod
    def _grey_has_no_hue(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        views = info.data.get("views", ViewsConfig())  # lacking where it was refused itself
        coloured = [key for key in ("hue", "saturation") if getattr(views, key) > 0.0]
        if data.channels == 1 and coloured:
            found = ", ".join(f"{key} = {getattr(views, key)}" for key in coloured)
            raise ValueError(
                f"channels = 1: grey images have no {' and no '.join(coloured)}, but [views] has {found} "
                f"(modality = '{views.modality}'); set both to 0.0 there, or take channels = 3"
            )
        return data

    @model_validator(mode="after")
    def _methods_that_compare_views_crop_more(self) -> Self:
        if self.method.name not in ("mae", "ijepa") and "crop_scale" not in self.views.model_fields_set:
            # Stands in the model, and so in the protocol digest; attributes of a frozen model are closed.
            self.__dict__["views"] = self.views.model_copy(update={"crop_scale": COMPARED_CROP})
        return self

    @model_validator(mode="after")
    def _the_correction_fits(self) -> Self:
        refuse_unfit(self.training.correction, self.method, self.aggregation, self.privacy, self.encoding)
        return self

    @model_validator(mode="after")
    def _images_as_units_stand_alone(self) -> Self:
        """Refuse what makes one image decide about another: adding it would then change two units, and so epsilon."""
        keys = {
            "criteria.max_images_per_patient": self.data.criteria.max_images_per_patient is not None,
            "cubes_per_volume": self.data.cubes_per_volume != 1,
            "slice_stride": self.data.slice_stride != 1,
        }
        if self.privacy.unit == "image" and any(keys.values()):
            name = next(name for name, is_set in keys.items() if is_set)
            raise ValueError(
                f"[data] {name} makes one image decide which others are taken, or several of one, and [privacy] unit = "
                "'image' promises that one changes one; remove it, or set unit = 'patient'"
            )
        return self

    @model_validator(mode="after")
    def _sites_as_units_are_all_alike(self) -> Self:
        if self.privacy.unit != "site":
            return self
        if self.aggregation.rule != "mean" or self.aggregation.norm_bound is not None:
            raise ValueError(
                "[privacy] unit = 'site' bounds what each site adds to one sum, by its own clip; set [aggregation] "
                "rule = 'mean' and remove norm_bound"
            )
        if self.aggregation.weights != "uniform":
            raise ValueError(
                f"[privacy] unit = 'site' bounds what each site adds to one sum, but [aggregation] weights = "
                f"'{self.aggregation.weights}'; set weights = 'uniform'"
            )
        if self.backbone.frozen_stages:
            raise ValueError(
                f"[privacy] unit = 'site' adds noise to the whole state, so to the {self.backbone.frozen_stages} "
                "frozen_stages of [backbone] too; set frozen_stages = 0"
            )
        if self.privacy.noise == "server" and self.encoding == "int8":
            raise ValueError(
                "[privacy] noise = 'server' clips and hides what arrives, which encoding = 'int8' changes before and "
                "after; take encoding = 'bfloat16' or 'float32'"
            )
        return self

    @model_validator(mode="after")
    def _no_view_is_larger_than_the_image(self) -> Self:
        for _, edge in self.training.resolutions:
            if not 8 <= edge <= self.data.image_size:
                raise ValueError(f"resolutions: edge {edge}: expected 8 to [data] image_size, {self.data.image_size}")
        return self

    def view_size(self, step: int) -> int:
        """Return the edge of a step's views: that of the last resolution whose round has come, else the image's.

        >>> training = TrainingConfig(rounds=4, local_steps=5, resolutions=((1, 32), (3, 64)))
        >>> [Recipe(name="x", training=training).view_size(step) for step in (0, 9, 10)]
        [32, 32, 64]
        """
        round = step // self.training.local_steps + 1
        reached = [edge for first, edge in self.training.resolutions if first <= round]
        return reached[-1] if reached else self.data.image_size


class Protocol(Recipe):
    """What a site computes and releases; its digest is what a site approves."""

    initial_state: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the state that round 1 starts from (update.state_hash)."
    )

    def digest(self) -> str:
        """Return the protocol digest: 64 hexadecimal digits."""
        return digest(self)


class FederationConfig(Recipe):
    """One file of `federation_configs/`."""

    format: Literal[1] = Field(description="The version of this file's format.")
    initial_weights: Path | None = Field(
        default=None,
        description="What the backbone starts from: a release folder, a finished run folder, or NAME@alias or "
        "NAME/version in MLflow; unset: the seed's random weights. Sites approve the weights' hash, not the name.",
    )
    membership: MembershipConfig = Field(default=MembershipConfig(), description="Sites and patience.")
    evaluation_set: EvaluationSetConfig | None = Field(default=None, description="The coordinator's own images.")
    release: ReleaseConfig = Field(default=ReleaseConfig(), description="The gate to the alias champion.")

    @model_validator(mode="after")
    def _a_buffers_updates_need_no_common_start(self) -> Self:
        if self.membership.buffer is None:
            return self
        why = f"[membership] buffer = {self.membership.buffer}: its updates begin from several rounds' states,"
        if self.privacy.unit == "site" and self.privacy.noise == "server":
            raise ValueError(
                f"{why} and one site more changes which of the others' share a round, which [privacy] noise = 'server' "
                "does not hide; take noise = 'site', or remove buffer"
            )
        if self.training.correction.name == "scaffold":
            raise ValueError(
                f"{why} and [training] correction = 'scaffold' corrects towards one; take 'fedprox', or remove buffer"
            )
        if self.aggregation.rule != "mean":
            raise ValueError(
                f"{why} and [aggregation] rule = '{self.aggregation.rule}' would cast out honest ones for it; take "
                "rule = 'mean', with a norm_bound, or remove buffer"
            )
        return self

    @model_validator(mode="after")
    def _enough_sites_for_the_rule(self) -> Self:
        least, given = self.aggregation.least_sites, self.membership.min_sites or 1
        if given < least:
            raise ValueError(
                f"[aggregation] rule = '{self.aggregation.rule}' folds no fewer than {least} updates with these keys; "
                f"set [membership] min_sites = {least} or more"
            )
        return self

    @model_validator(mode="after")
    def _phantoms_are_flat(self) -> Self:
        if self.data.dimensions == 3 and self.evaluation_set and self.evaluation_set.kind == "procedural":
            raise ValueError("evaluation_set kind = 'procedural' has no volumes; take kind = 'labelled', or remove it")
        return self

    def protocol(self, initial_state: str) -> Protocol:
        """Return the part that sites approve, bound to the hash of the first state."""
        shared = {name: getattr(self, name) for name in Recipe.model_fields}
        return Protocol(**shared, initial_state=initial_state)


def read_federation(path: Path) -> FederationConfig:
    """Return a federation's file; a relative folder of [evaluation_set] counts from its folder. Raises ConfigError."""
    config = read_toml(path, FederationConfig)
    chosen = config.evaluation_set
    if chosen is None or chosen.folder is None:
        return config
    # Absolute from here on: later commands read it from the run folder, and may be started anywhere.
    chosen = chosen.model_copy(update={"folder": path.resolve().parent / chosen.folder})
    return config.model_copy(update={"evaluation_set": chosen})
