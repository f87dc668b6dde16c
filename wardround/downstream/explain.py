"""Where in an image the linear probe's answer comes from: Grad-CAM of convolutions, attention roll-out of ViTs."""

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from timm.utils.attention_extract import AttentionExtract
from torch import Tensor, nn
from torch.nn.functional import interpolate

from wardround.data import LabelledImages
from wardround.downstream.arms import Network
from wardround.downstream.splits import Splits
from wardround.probe.explanation import Explanation
from wardround.probe.features import BATCH
from wardround.probe.linear import Labelled, Linear, linear_probe
from wardround.ssl.views import normalise

SHOWN = 8  # test images


class Probed(nn.Module):
    """A convolutional network of timm and the linear probe on its features, with its last maps within reach."""

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor

    def __init__(self, encoder: Any, probe: Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.maps = nn.Identity()  # its output is [B, D, h, w]
        self.channels_last = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
        for name, values in vars(probe).items():
            self.register_buffer(name, torch.from_numpy(values))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> a score a class [B, K]; the classes' probabilities are its softmax or sigmoid."""
        found = self.encoder.forward_features(images)
        if not self.channels_last:
            return self.scores(self.encoder.forward_head(self.maps(found)))
        return self.scores(self.encoder.forward_head(self.maps(found.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))

    def scores(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, K]"""
        out: Tensor = (features.double() - self.mean) / self.scale @ self.weights.T + self.bias
        return out


def unexplained(arm: Network, images: LabelledImages, places: Splits) -> str:
    """Return in words why `explain` can say nothing, at the cost of building the network; "" where it can."""
    return _inexplicable(arm.build(images.images[places.train]), images)


def explain(arm: Network, images: LabelledImages, places: Splits) -> Explanation | str:
    """Return where the answers to some test images come from, or, in words, why nothing can be said.

    The probe is the one of all labels; explained is its answer, right or wrong. Computes the features of the training
    and validation images once more.
    """
    encoder = arm.build(images.images[places.train])
    if reason := _inexplicable(encoder, images):
        return reason
    transformer = isinstance(encoder, VisionTransformer)
    known, chosen_on = (
        Labelled(arm.of(encoder, images.images[of], BATCH), images.labels[of]) for of in (places.train, places.val)
    )
    shown = places.test[np.linspace(0, len(places.test) - 1, min(SHOWN, len(places.test)), dtype=int)]
    model = Probed(encoder, linear_probe(known, chosen_on)).to(arm.device).eval()
    batch = torch.from_numpy(images.images[shown]).to(arm.device)
    batch = normalise(batch.float() / 255.0, arm.recipe.data).requires_grad_()
    with torch.no_grad():
        scores = model.scores(encoder(batch))
        sure = scores.sigmoid() if images.multi_label else scores.softmax(1)
        probability, answer = sure.max(1)
    maps = rolled(encoder, batch) if isinstance(encoder, VisionTransformer) else grad_cam(model, batch, answer)
    return Explanation(
        way="attention roll-out, of all classes" if transformer else "Grad-CAM, of the answer",
        places=shown,
        answers=answer.cpu().numpy(),
        probabilities=probability.cpu().numpy(),
        maps=_spread(maps, images.images.shape[2:]),
    )


def grad_cam(model: Probed, batch: Tensor, answer: Tensor) -> Tensor:
    """Return Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2) of the last maps: [B, h, w]."""
    from captum.attr import LayerGradCam

    found: Tensor = LayerGradCam(model, model.maps).attribute(batch, target=answer, relu_attributions=True)
    return found[:, 0].detach()


def rollout(attentions: list[Tensor]) -> Tensor:
    """Return how much of each token's output stems from each input token: [B, H, T, T] a block -> [B, T, T].

    Attention roll-out (Abnar and Zuidema 2020, arXiv:2005.00928): of each block the mean over heads, half of it
    replaced by the identity for the residual path; their product, the last block leftmost. Rows sum to 1.

    >>> rollout([torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])])
    tensor([[[0.5000, 0.5000],
             [0.0000, 1.0000]]])
    """
    made = torch.eye(attentions[0].shape[-1], device=attentions[0].device).expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        made = (attention.mean(1) + torch.eye(attention.shape[-1], device=attention.device)) / 2 @ made
    return made


def rolled(vit: VisionTransformer, batch: Tensor) -> Tensor:
    """Return how much of the features, the mean over patch tokens, stems from each patch: [B, h, w]."""
    plain: Any = copy.deepcopy(vit)
    for block in plain.blocks:
        block.attn.fused_attn = False  # the fused one never has the matrix
    with torch.no_grad():
        found = rollout(list(AttentionExtract(plain, method="hook")(batch).values()))
    first = vit.num_prefix_tokens
    share = found[:, first:, first:].mean(1)
    return share.view(len(share), *vit.patch_embed.grid_size)


def _inexplicable(encoder: nn.Module, images: LabelledImages) -> str:
    """Return why a network cannot be explained; nothing where it can, as any ViT."""
    if isinstance(encoder, VisionTransformer):
        return ""
    if images.images.ndim != 4 or not hasattr(encoder, "forward_head"):
        return "no explanation.png: made for images and timm's networks alone"
    with torch.no_grad():
        if encoder.eval().forward_features(torch.zeros(1, *images.images.shape[1:])).ndim != 4:  # type: ignore[operator]
            return "no explanation.png: this network has neither maps nor attention between patches"
    try:
        import captum  # noqa: F401
    except ImportError:
        return "no explanation.png: captum is not installed; pip install 'wardround[explain]'"
    return ""


def _spread(maps: Tensor, size: tuple[int, ...]) -> NDArray[np.float32]:
    """Return maps [B, h, w] at the images' size, each from 0 to 1."""
    large = interpolate(maps[:, None].float(), size, mode="bilinear")[:, 0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    out: NDArray[np.float32] = ((large - low) / (high - low).clamp(min=1e-12)).cpu().numpy()
    return out
