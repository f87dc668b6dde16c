"""DINO: self-distillation over large and small crops (Caron et al. 2021, arXiv:2104.14294).

The student, from any crop, predicts what a slow copy of itself makes of another, large crop of the
same image: a distribution over prototypes, sharpened by a temperature and kept from collapse by a
centre. All views are drawn alike, where the paper blurs and solarises some more than others; the last
layer trains from the first step.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wardround.backbones import Backbone, ViT, build
from wardround.config.federation import Recipe
from wardround.config.method import DINOConfig
from wardround.errors import ConfigError
from wardround.ssl.heads import cosines, each_view, widened
from wardround.ssl.method import Method
from wardround.ssl.public import public_bank
from wardround.ssl.teacher import Teacher, cosine_momentum
from wardround.ssl.views import normalise, view

LARGE_VIEWS = 2
BANK = 64  # public images whose mean output is a centre
LEAST_EDGE, EDGE_STEP = 32, 16  # of small crops for what has no patches, where the config leaves them open


class DINO(Method):
    """Backbone, head and a teacher of both; the loss is one number an image."""

    head: "Head"
    teacher: Teacher
    bank: Tensor  # [BANK, C, S, S] uint8, a constant; only with a public centre

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, DINOConfig)
        self.settings, self.norm = recipe.method, recipe.backbone.norm
        self.head = Head(self.backbone.dim, self.settings)
        self.teacher = Teacher(self.taught())
        edges = {recipe.data.image_size, *(edge for _, edge in recipe.training.resolutions)}
        self.local_sizes = {edge: local_size(recipe, self.settings, edge) for edge in sorted(edges)}
        self._mean_output: Tensor | None = None  # of the teacher over the last batch, [K]
        if self.settings.centre == "public":
            images = public_bank(recipe, BANK, "centre", "centre = 'constant' or 'batch'")
            self.register_buffer("bank", images, persistent=False)

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return two large views, then the small ones: [B, C, S, S] in [0, 1] -> [B, C, s, s] each."""
        large = [view(images, self.recipe, generator, self.view_size) for _ in range(LARGE_VIEWS)]
        edge, scale = self.local_sizes[self.view_size], self.settings.local_scale
        small = (view(images, self.recipe, generator, edge, crop_scale=scale) for _ in range(self.settings.local_views))
        return *large, *small

    def embed(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Return the student's output of each view, then the teacher's of the large ones: [B, K] each."""
        large, small = views[:LARGE_VIEWS], views[LARGE_VIEWS:]
        outputs = list(each_view(self.project, large, self.norm))
        if small:
            outputs += each_view(self.project, small, self.norm)
        return *outputs, *each_view(self.teacher, large, self.norm)

    def loss(self, *outputs: Tensor) -> Tensor:
        """Return each image's mean over pairs of views: [B, K] of each of `embed` -> [B]."""
        students, teachers = outputs[:-LARGE_VIEWS], [output.detach() for output in outputs[-LARGE_VIEWS:]]
        if self.settings.centre == "batch":
            self._mean_output = widened(torch.stack(teachers)).mean(dim=(0, 1))
        temperatures = (self.settings.student_temperature, self.settings.teacher_temperature)
        return distillation(students, teachers, self.centre(), temperatures)

    def loss_coupling(self) -> str | None:
        """Return that a running centre couples."""
        if self.settings.centre != "batch":
            return None
        return (
            "DINO's running centre carries the outputs of a batch into later losses ([method] centre = 'constant' "
            "or 'public' does not)"
        )

    def after_step(self, step: int) -> None:
        """Let the teacher follow, and a running centre move towards the last batch's mean (equation 4)."""
        momentum = cosine_momentum(step, self.recipe.training.total_steps, self.settings.momentum)
        self.teacher.follow(self.taught(), momentum)
        if self._mean_output is not None:
            self.head.centre.lerp_(self._mean_output, 1.0 - self.settings.centre_momentum)
            self._mean_output = None

    def taught(self) -> dict[str, nn.Module]:
        """Return backbone and projector; the centre is no weight to follow."""
        return {"backbone": self.backbone, "projector": self.head.projector}

    def project(self, views: Tensor) -> Tensor:
        """[B, C, s, s] -> [B, K]"""
        output: Tensor = self.head.projector(self.backbone.features(views))
        return output

    @torch.no_grad()
    def centre(self) -> Tensor:
        """Return what is taken from the teacher's outputs: [K].

        A public one is computed anew in each step, so that it depends on the teacher alone and a run
        that was cut goes on with the same. Its images are not augmented.
        """
        if self.settings.centre != "public":
            return self.head.centre
        size = [self.view_size] * self.recipe.data.dimensions
        images = F.interpolate(self.bank.to(self.head.centre.dtype) / 255, size, mode="bilinear", antialias=True)
        return widened(self.teacher(normalise(images, self.recipe.data))).mean(dim=0)


class Head(nn.Module):
    """A projector with prototypes (appendix C, without batch normalisation), and the running centre.

    With centre = "batch" the centre is part of the state: it travels, and the server folds it as it
    folds weights. Else it stays zero.
    """

    centre: Tensor  # [K]

    def __init__(self, dim: int, method: DINOConfig) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(dim, method.hidden_dim),
            nn.GELU(),
            nn.Linear(method.hidden_dim, method.hidden_dim),
            nn.GELU(),
            nn.Linear(method.hidden_dim, method.bottleneck_dim),
            Prototypes(method.bottleneck_dim, method.output_dim),
        )
        self.register_buffer("centre", torch.zeros(method.output_dim), persistent=method.centre == "batch")
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                # The published 0.02 is this at the paper's width of 2048.
                nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)


class Prototypes(nn.Module):
    """The cosine of an embedding with each of K learnt directions: the paper's weight-normalised last layer.

    No subclass of `nn.Linear`: by its rule, a per-sample gradient would leave the normalisation out.
    Torch's own weight norm (and lightly's head with it) has raw parameters for which there is no rule.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)  # of about unit length

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, K] in [-1, 1]"""
        return cosines(x, self.weight)


def distillation(
    students: Sequence[Tensor], teachers: Sequence[Tensor], centre: Tensor, temperatures: tuple[float, float]
) -> Tensor:
    """Return each image's cross-entropy H(teacher, student), the mean over pairs of different views: -> [B].

    students, teachers: [B, K] a view; the teacher's views are the student's first. temperatures:
    the student's and the teacher's. Equation (3), which sums where the published code takes the mean.
    """
    targets = [F.softmax((widened(output) - centre) / temperatures[1], dim=1) for output in teachers]
    logs = [F.log_softmax(widened(output) / temperatures[0], dim=1) for output in students]
    # All pairs at once, less those of a view with itself: the sums spare a [B, K] product a pair.
    every = (torch.stack(targets).sum(dim=0) * torch.stack(logs).sum(dim=0)).sum(dim=1)
    same = torch.stack([(target * log).sum(dim=1) for target, log in zip(targets, logs, strict=False)]).sum(dim=0)
    return (same - every) / (len(targets) * (len(logs) - 1))


def local_size(recipe: Recipe, method: DINOConfig, view_size: int) -> int:
    """Return the edge of the small crops beside large views of some edge; it is tried on the network's shapes.

    Where the config leaves it open: half of a large view, rounded up to whole patches, and smaller than
    the large one. Raises ConfigError where the backbone takes no such image.
    """
    if not method.local_views:
        return view_size
    with torch.device("meta"):  # shapes alone
        network = build(recipe.backbone, recipe.data)
    network.to("meta")
    asked, name, image_size = method.local_size, recipe.backbone.name, recipe.data.image_size
    if asked is None:
        step, least = (network.patch, network.patch) if isinstance(network, ViT) else (EDGE_STEP, LEAST_EDGE)
        edges = list(range(max(-(-view_size // (2 * step)) * step, least), view_size, step))
        refusal = (
            f"[method] local_views = {method.local_views}: '{name}' takes no small crop beside views of {view_size} "
            f"pixels (tried {edges or 'none'}). Set local_views = 0, or local_size."
        )
    else:
        edges = [min(asked, view_size)] if asked <= image_size else []  # the views of early rounds may be smaller
        refusal = (
            f"[method] local_size = {asked}: expected an edge up to [data] image_size = {image_size} that '{name}' "
            "takes, for a ViT a multiple of its patch. Take another, or leave it unset."
        )
    for edge in edges:
        if _takes(network, (2, recipe.data.channels, *[edge] * recipe.data.dimensions)):
            return edge
    raise ConfigError(refusal)


def _takes(network: Backbone, shape: tuple[int, ...]) -> bool:
    """Return whether a network on the meta device takes images of a shape."""
    try:
        network.features(torch.empty(shape, device="meta"))
    except (AssertionError, RuntimeError, ValueError):  # what timm, MONAI and torch raise for a size that does not fit
        return False
    return True
