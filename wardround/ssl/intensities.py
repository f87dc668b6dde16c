"""Changes of brightness and colour, of a whole batch at once, each image by its own draws.

The changes are those of SimCLR (Chen et al. 2020, arXiv:2002.05709, appendix A) without its random grey, and
window, gamma and noise. The order is window, brightness, contrast, saturation and hue, gamma, blur, noise. The
first five are affine in a pixel's channels, so one product does them all and the result is clamped to [0, 1] once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wardround.config.views import ViewsConfig

# Luminance and the two axes of colour of NTSC; the rows of colour sum to nothing, so grey stays grey.
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_FROM_YIQ = _TO_YIQ.inverse()


def draw(shape: torch.Size, views: ViewsConfig, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Return what `vary` needs for views of this shape: ten numbers an image, [B, 10], and noise where there is any."""
    numbers = torch.rand(shape[0], 10, generator=generator)
    return numbers, torch.randn(shape, generator=generator) if views.noise > 0.0 else None


def vary(images: Tensor, views: ViewsConfig, numbers: Tensor, noise: Tensor | None) -> Tensor:
    """Return the images with their intensities changed: [B, C, ...] in [0, 1] -> the same shape, in [0, 1].

    Takes over the tensor that it is given; `numbers` and `noise` are as `draw` gave them, on the CPU.
    """
    drawn = numbers.T.to(images.device)
    images = recoloured(images, *colours(views, drawn[:6], images))
    if views.gamma > 0.0:
        images = images.pow_(_each(_around(0.0, math.log1p(views.gamma), drawn[6]).exp(), images))
    if views.blur > 0.0:
        # Half of the views, by a deviation from 0.05 to 1 of the largest: SimCLR's 0.1 to 2 pixels.
        sigma = views.blur * images.shape[-1] * (0.05 + 0.95 * numbers[:, 8]) * (numbers[:, 7] < 0.5)
        images = blurred(images, sigma)
    if noise is not None:
        images = images.addcmul_(noise.to(images.device), _each(views.noise * drawn[9], images)).clamp_(0.0, 1.0)
    return images


def colours(views: ViewsConfig, drawn: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the maps that `recoloured` takes, from draws on [0, 1): [6, B] -> gain [B], bias [B], mixing [B, 3, 3].

    Window: (x - low) / width. Brightness: f x. Contrast: f x + (1 - f) m, with the mean grey m of the
    image. Saturation: f x + (1 - f) grey(x). These are torchvision's formulas, without a clamp between
    them. Hue turns the plane of colours about grey and keeps luminance. Mixing is None where it is idle.
    """
    width = _around(1.0, views.window_jitter, drawn[0])
    low = _around(0.5, views.window_jitter / 2, drawn[1]) - width / 2
    bright = _around(1.0, views.brightness, drawn[2])
    contrast = _around(1.0, views.contrast, drawn[3])
    gain, bias = bright / width, -bright * low / width
    level = gain * mean_grey(images) + bias
    gain, bias = contrast * gain, contrast * bias + (1.0 - contrast) * level
    if views.saturation == 0.0 and views.hue == 0.0:
        return gain, bias, None
    return gain, bias, mixing(_around(1.0, views.saturation, drawn[4]), _around(0.0, views.hue, drawn[5]))


def mixing(saturation: Tensor, hue: Tensor) -> Tensor:
    """Return the matrices that stretch and turn the plane of colours: factors [B], turns [B] -> [B, 3, 3]."""
    angle = 2.0 * math.pi * hue
    cos, sin = saturation * angle.cos(), saturation * angle.sin()
    turned = hue.new_zeros(len(hue), 3, 3)
    turned[:, 0, 0] = 1.0
    turned[:, 1, 1] = turned[:, 2, 2] = cos
    turned[:, 1, 2], turned[:, 2, 1] = -sin, sin
    return _FROM_YIQ.to(hue.device) @ turned @ _TO_YIQ.to(hue.device)


def recoloured(images: Tensor, gain: Tensor, bias: Tensor, mixed: Tensor | None) -> Tensor:
    """Return mixed @ (gain * x + bias), clamped to [0, 1]; works in place where it can."""
    if mixed is None:
        return images.mul_(_each(gain, images)).add_(_each(bias, images)).clamp_(0.0, 1.0)
    # Mixing keeps grey, so the bias goes through it unchanged.
    offset = bias.view(-1, 1, 1).expand(-1, 3, 1)
    return torch.baddbmm(offset, mixed * gain.view(-1, 1, 1), images.flatten(2)).clamp_(0.0, 1.0).view(images.shape)


def mean_grey(images: Tensor) -> Tensor:
    """Return each image's mean luminance: [B, C, ...] -> [B]."""
    means = images.flatten(2).mean(2)  # [B, C]
    return means @ _TO_YIQ[0].to(images.device) if means.shape[1] == 3 else means.mean(1)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Return each image under its own Gaussian: [B, C, ...], [B] of deviations in pixels, on the CPU; in place.

    The kernel reaches three deviations and sums to one; images are reflected at the border. Images of
    one reach go together, by shifted sums: a convolution is compiled anew for each count of images.
    """
    reaches = (3.0 * sigma).ceil().clamp(max=min(images.shape[2:]) - 1).long()
    for reach in sorted(set(reaches.tolist())):
        if reach > 0:
            rows = (reaches == reach).nonzero().squeeze(1)
            taps = -0.5 * (torch.arange(-reach, reach + 1) / sigma[rows].unsqueeze(1)).square()
            kernels = taps.softmax(dim=1).to(images.device)  # [n, 2 * reach + 1]
            rows = rows.to(images.device)
            chosen = images[rows]
            for axis in range(2, images.ndim):
                chosen = _filtered(chosen, kernels, axis)
            images[rows] = chosen
    return images


def _filtered(images: Tensor, kernels: Tensor, axis: int) -> Tensor:
    """Return images filtered along an axis, each by its own symmetric kernel: [n, C, ...], [n, 2 * reach + 1]."""
    reach, size = kernels.shape[1] // 2, images.shape[axis]
    pads = [0] * (2 * (images.ndim - 2))
    pads[2 * (images.ndim - 1 - axis)] = pads[2 * (images.ndim - 1 - axis) + 1] = reach  # last axis first
    padded = F.pad(images, pads, mode="reflect")
    out = torch.zeros_like(images)
    for step in range(2 * reach + 1):
        out.addcmul_(padded.narrow(axis, step, size), _each(kernels[:, step], images))
    return out


def _around(middle: float, reach: float, drawn: Tensor) -> Tensor:
    """Return values uniform on middle - reach to middle + reach, exactly the middle where reach is 0."""
    return middle + reach * (2.0 * drawn - 1.0)


def _each(values: Tensor, images: Tensor) -> Tensor:
    """Return one number an image in a shape that broadcasts against the images: [B] -> [B, 1, 1, 1]."""
    return values.view(-1, *[1] * (images.ndim - 1))
