"""The self-supervised methods' settings: one section a method, told apart by `name`.

Defaults are the papers' where a hospital can afford them; where not, the sentence names the paper's value.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from wardround.config.strict import Strict


def _check_range(name: str, values: tuple[float, float], most: float) -> None:
    if not 0.0 < values[0] <= values[1] <= most:
        raise ValueError(f"{name} = {list(values)}: expected 0 < smallest <= largest <= {most:g}")


class MAEConfig(Strict):
    """Masked autoencoding: He et al. 2022 on transformers, SparK (Tian et al. 2023) on convolutional backbones."""

    name: Literal["mae"] = Field(default="mae", description="The SSL method.")
    mask_ratio: float = Field(default=0.75, gt=0.0, lt=1.0, description="Share of patches hidden; SparK's is 0.6.")
    decoder_dim: int = Field(default=96, ge=16, le=2048, description="Width of the decoder; the paper's 512.")
    decoder_depth: int = Field(default=2, ge=1, le=16, description="Blocks of a transformer's decoder; the paper's 8.")
    decoder_heads: int = Field(
        default=3, ge=1, le=32, description="Attention heads of a transformer's decoder; the paper's 16."
    )
    normalised_pixels: bool = Field(
        default=True, description="Predict each patch minus its mean over its standard deviation."
    )

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise ValueError(
                f"decoder_dim = {self.decoder_dim}: expected a multiple of 4 and of decoder_heads, {self.decoder_heads}"
            )
        return self


class SimCLRConfig(Strict):
    """SimCLR: NT-Xent between two views of an image (Chen et al. 2020)."""

    name: Literal["simclr"] = Field(description="The SSL method.")
    temperature: float = Field(
        default=0.2,
        gt=0.0,
        le=10.0,
        description="Temperature of the similarities; the paper's 0.1 is for batches of 4096.",
    )
    hidden_dim: int = Field(
        default=512, ge=16, le=16_384, description="Hidden width of the projection head; the paper's is the backbone's."
    )
    output_dim: int = Field(default=128, ge=8, le=16_384, description="Width of the embedding that is compared.")
    negatives: Literal["batch", "public"] = Field(
        default="batch",
        description="batch: the other images of the batch, which couples patients. public: a bank of procedural "
        "images encoded by the current network, so that each image's loss stands alone; seen to collapse "
        "(docs/methods.md).",
    )
    bank_size: int = Field(default=256, ge=8, le=65_536, description="public: images in the bank.")
    bank_draw: int = Field(
        default=64, ge=4, le=65_536, description="public: images of the bank that a step encodes; at most bank_size."
    )

    @model_validator(mode="after")
    def _the_bank_has_what_is_drawn(self) -> Self:
        if self.bank_draw > self.bank_size:
            raise ValueError(f"bank_draw = {self.bank_draw}: expected at most bank_size, {self.bank_size}")
        return self


class MoCoConfig(Strict):
    """MoCo v3: contrast of two views against a momentum encoder, without a queue (Chen, Xie and He 2021)."""

    name: Literal["moco"] = Field(description="The SSL method.")
    temperature: float = Field(default=0.2, gt=0.0, le=10.0, description="Temperature of the similarities.")
    hidden_dim: int = Field(default=1024, ge=16, le=16_384, description="Hidden width of the heads; the paper's 4096.")
    output_dim: int = Field(default=256, ge=8, le=16_384, description="Width of the embedding that is compared.")
    momentum: float = Field(
        default=0.99, ge=0.0, lt=1.0, description="The teacher's momentum at the first step; a cosine takes it to 1."
    )


class BYOLConfig(Strict):
    """BYOL: the student predicts the teacher's embedding of the other view (Grill et al. 2020)."""

    name: Literal["byol"] = Field(description="The SSL method.")
    hidden_dim: int = Field(default=1024, ge=16, le=16_384, description="Hidden width of the heads; the paper's 4096.")
    output_dim: int = Field(default=256, ge=8, le=16_384, description="Width of the embedding that is compared.")
    momentum: float = Field(
        default=0.99,
        ge=0.0,
        lt=1.0,
        description="The teacher's momentum at the first step; the paper's 0.996. A cosine takes it to 1.",
    )


class SimSiamConfig(Strict):
    """SimSiam: BYOL without a teacher; the gradient stops at the other view (Chen and He 2021)."""

    name: Literal["simsiam"] = Field(description="The SSL method.")
    hidden_dim: int = Field(default=512, ge=16, le=16_384, description="Hidden width of the predictor.")
    output_dim: int = Field(default=2048, ge=8, le=16_384, description="Width of the projection.")


class DINOConfig(Strict):
    """DINO: self-distillation over large and small crops (Caron et al. 2021)."""

    name: Literal["dino"] = Field(description="The SSL method.")
    hidden_dim: int = Field(default=1024, ge=16, le=16_384, description="Hidden width of the head; the paper's 2048.")
    bottleneck_dim: int = Field(default=256, ge=8, le=16_384, description="Width before the last layer.")
    output_dim: int = Field(default=4096, ge=8, le=262_144, description="Number of prototypes; the paper's 65536.")
    momentum: float = Field(
        default=0.996, ge=0.0, lt=1.0, description="The teacher's momentum at the first step; a cosine takes it to 1."
    )
    student_temperature: float = Field(default=0.1, gt=0.0, le=10.0, description="Temperature of the student.")
    teacher_temperature: float = Field(
        default=0.04, gt=0.0, le=10.0, description="Temperature of the teacher; the paper's rises to 0.07."
    )
    centre: Literal["constant", "public", "batch"] = Field(
        default="batch",
        description="constant: zero, with which the paper's ablation (section 5.3) collapses. public: the teacher's "
        "mean output over procedural images. batch: a running mean over the batches, as in the paper; it couples "
        "patients and travels with the state.",
    )
    centre_momentum: float = Field(default=0.9, ge=0.0, lt=1.0, description="batch: momentum of the running mean.")
    local_views: int = Field(
        default=4, ge=0, le=16, description="Small crops beside the two large ones; the paper's 8."
    )
    local_size: int | None = Field(
        default=None, ge=8, le=512, description="Edge of a small crop; unset: half of the image, or the family's least."
    )
    local_scale: tuple[float, float] = Field(
        default=(0.05, 0.4), description="Smallest and largest share of the area that a small crop keeps."
    )

    @model_validator(mode="after")
    def _the_scale_is_a_range(self) -> Self:
        _check_range("local_scale", self.local_scale, 1.0)
        return self


class IJEPAConfig(Strict):
    """I-JEPA: predicts the teacher's features of hidden blocks; no augmentation needed (Assran et al. 2023)."""

    name: Literal["ijepa"] = Field(description="The SSL method.")
    predictor_dim: int = Field(default=96, ge=16, le=2048, description="Width of the predictor; the paper's 384.")
    predictor_depth: int = Field(default=4, ge=1, le=32, description="Blocks of the predictor; the paper's 12.")
    predictor_heads: int = Field(default=3, ge=1, le=32, description="Attention heads of the predictor.")
    targets: int = Field(default=4, ge=1, le=16, description="Target blocks an image.")
    target_scale: tuple[float, float] = Field(default=(0.15, 0.2), description="Share of the patches in a target.")
    target_aspect: tuple[float, float] = Field(default=(0.75, 1.5), description="Height over width of a target.")
    context_scale: tuple[float, float] = Field(default=(0.85, 1.0), description="Share of the patches in the context.")
    momentum: float = Field(
        default=0.996, ge=0.0, lt=1.0, description="The teacher's momentum at the first step; it rises linearly to 1."
    )

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.predictor_dim % self.predictor_heads or self.predictor_dim % 4:
            raise ValueError(
                f"predictor_dim = {self.predictor_dim}: expected a multiple of 4 and of predictor_heads, "
                f"{self.predictor_heads}"
            )
        return self

    @model_validator(mode="after")
    def _scales_and_aspects_are_ranges(self) -> Self:
        _check_range("target_scale", self.target_scale, 1.0)
        _check_range("target_aspect", self.target_aspect, 16.0)
        _check_range("context_scale", self.context_scale, 1.0)
        return self


class VICRegConfig(Strict):
    """VICReg: invariance, variance and covariance of the embeddings of a batch (Bardes et al. 2022)."""

    name: Literal["vicreg"] = Field(description="The SSL method.")
    hidden_dim: int = Field(
        default=1024, ge=16, le=16_384, description="Hidden width of the expander; the paper's 8192."
    )
    output_dim: int = Field(default=1024, ge=8, le=16_384, description="Width of the embedding; the paper's 8192.")
    invariance: float = Field(default=25.0, ge=0.0, description="Weight of the distance between the views.")
    variance: float = Field(
        default=25.0, gt=0.0, description="Weight of the hinge on the standard deviation; at 0 all embeddings collapse."
    )
    covariance: float = Field(default=1.0, ge=0.0, description="Weight of the squared covariances.")


MethodConfig = Annotated[
    MAEConfig | SimCLRConfig | MoCoConfig | BYOLConfig | SimSiamConfig | DINOConfig | IJEPAConfig | VICRegConfig,
    Field(discriminator="name"),
]
