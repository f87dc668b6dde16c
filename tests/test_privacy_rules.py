"""Book-keeping's rules, layer by layer, against gradients by hand and a loop of autograd over single images."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from wardround.errors import ConfigError
from wardround.privacy.bookkeeping import clipped_sum, unit_terms, weigh
from wardround.privacy.grouping import Grouping
from wardround.privacy.method import trained
from wardround.privacy.rows import rows_of_calls

UNITS = [0, 0, 1, 2]
Layers = Callable[[Tensor], Tensor]


class Of(nn.Module):
    """A method of some layers; an image's loss is a sum over what comes out, no two numbers of it alike."""

    view_size = 8
    coupling = None

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (images,)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x).flatten(1)
        return (out.sin() * torch.linspace(1, 2, out.shape[1], dtype=out.dtype)).sum(1)


class Does(nn.Module):
    """A layer with parameters of its own: what it does is a function of it and its input."""

    def __init__(self, does: Callable[["Does", Tensor], Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.p = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes])
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def check(method: nn.Module, shape: tuple[int, ...]) -> None:
    """Compare the gradients of units of two, one and one image, and their norms, with autograd on each image."""
    method = method.double()
    x = torch.rand(len(UNITS), *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inner = rows_of_calls(method, shape)
    losses, terms = unit_terms(method, (x,), Grouping(torch.tensor(UNITS), 3), inner)
    assert losses.shape == (4,)
    assert {id(term.parameter) for term in terms} == {id(p) for p in trained(method).values()}
    squares = torch.stack([term.squares for term in terms]).sum(0)
    for unit in range(3):
        mine = x[torch.tensor(UNITS) == unit]
        loss = torch.cat([method(image[None]) for image in mine]).mean()
        expected = dict(zip(trained(method), torch.autograd.grad(loss, list(trained(method).values())), strict=True))
        found = weigh(method, list(terms), torch.eye(3, dtype=torch.float64)[unit])
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-12), name
        true = float(sum(gradient.square().sum() for gradient in expected.values()))
        assert true * (1 - 1e-12) <= float(squares[unit]) <= true * (1 + 1e-9)


def test_a_linear_layer_by_hand() -> None:
    """Loss w x + b of an image: unit 0 has images (1, 2) and (3, 4), unit 1 has (5, 6)."""

    class ByHand(Of):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).squeeze(1)

    method = ByHand(nn.Linear(2, 1)).double()
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    group = Grouping(torch.tensor([0, 0, 1]), 2)
    _, terms = unit_terms(method, (rows,), group, [1])
    assert torch.stack([term.squares for term in terms]).sum(0).tolist() == pytest.approx([14, 62], rel=1e-9)
    found = clipped_sum(method, (rows,), group, 14**0.5, [1]).sums
    share = (14 / 62) ** 0.5  # of unit 1's (5, 6) and 1; unit 0's (2, 3) and 1 are not scaled
    assert found["layers.0.weight"][0].tolist() == pytest.approx([2 + 5 * share, 3 + 6 * share], rel=1e-6)
    assert found["layers.0.bias"].tolist() == pytest.approx([1 + share], rel=1e-6)


LAYERS: dict[str, tuple[tuple[int, ...], list[nn.Module]]] = {
    "linear": ((6,), [nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)]),
    "linear over tokens, few and wide": ((2, 40), [nn.Linear(40, 48)]),
    "linear over tokens, many and narrow": ((30, 3), [nn.Linear(3, 2)]),
    "stride, padding, dilation": ((2, 9, 8), [nn.Conv2d(2, 3, 3, (2, 1), (1, 2), (1, 2))]),
    "a large kernel": ((8, 7, 7), [nn.Conv2d(8, 24, 5)]),
    "patches": ((3, 8, 8), [nn.Conv2d(3, 20, 4, 4)]),
    "groups": ((4, 6, 6), [nn.Conv2d(4, 6, 3, groups=2)]),
    "depthwise": ((4, 6, 6), [nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)]),
    "conv1d": ((2, 12), [nn.Conv1d(2, 3, 3, 2, 1, 2)]),
    "conv3d": ((2, 5, 6, 4), [nn.Conv3d(2, 4, (3, 2, 3), (1, 2, 1), (1, 0, 1), groups=2)]),
    "layer norm": ((3, 4, 5), [nn.LayerNorm(5), nn.Linear(5, 5), nn.LayerNorm((4, 5))]),
    "group norm": ((4, 3, 3), [nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4)]),
    "added": ((3, 4), [Does(lambda m, x: x + m.p[0] + m.p[1], (1, 3, 4), (4,))]),
    "added in place": ((3, 4), [Does(lambda m, x: (2 * x).add_(m.p[0]), (4,))]),
    "multiplied": ((3, 4), [Does(lambda m, x: m.p[1] * (x * m.p[0]), (4,), (3, 1))]),
    "multiplied in place": ((3, 4), [nn.Linear(4, 4), Does(lambda m, x: x.mul_(m.p[0]), (4,))]),
    "matrix product": ((3, 4), [Does(lambda m, x: x @ m.p[0], (4, 5))]),
    "reshaped": ((3, 4), [Does(lambda m, x: x + m.p[0].reshape(3, 4).t().t(), (12,))]),
    "normalised": ((6,), [Does(lambda m, x: F.linear(x, F.normalize(m.p[0])), (3, 6))]),
    "normalised kernel": (
        (2, 5, 5),
        [Does(lambda m, x: F.conv2d(x, F.normalize(m.p[0].flatten(1)).view(3, 2, 3, 3)), (3, 2, 3, 3))],
    ),
    "rows gathered": ((5, 4), [Does(lambda m, x: x + m.p[0][torch.tensor([2, 0, 2, 1, 0])], (3, 4))]),
    "expanded": ((3, 4), [Does(lambda m, x: torch.add(x, m.p[0].expand(3, -1)), (1, 4))]),
    "a parameter in windows, image after image": (
        (4, 6),
        [Does(lambda m, x: F.linear(x.reshape(-1, 6), m.p[0]).reshape(len(x), 4, 5), (5, 6))],
    ),
    "views, one after the other": (
        (6,),
        [Does(lambda m, x: torch.cat(F.linear(torch.cat([x, 2 * x]), m.p[0]).chunk(2), 1), (5, 6))],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradients_of_units_are_autograds(name: str) -> None:
    shape, layers = LAYERS[name]
    check(Of(*layers), shape)


@pytest.mark.parametrize(("width", "places"), [(4, 30), (40, 2)])
def test_a_layer_called_twice_has_one_gradient(width: int, places: int) -> None:
    layer = nn.Linear(width, width)
    check(Of(layer, nn.Tanh(), layer), (places, width))
    convolution = nn.Conv2d(places, places, 3, padding=1)
    check(Of(convolution, nn.Tanh(), convolution), (places, 5, 5))


class Words(Of):
    """An embedding of an image's pixels, of which some are the same, and a linear layer."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(4, 5), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 4).long().clamp(0, 3))


def test_an_embedding_adds_up_where_a_unit_has_a_word_twice() -> None:
    check(Words(), (6,))


def test_windows_are_told_from_views() -> None:
    rows = [Does(lambda m, x: F.linear(x.reshape(-1, 6), m.p[0]).reshape(len(x), -1), (5, 6))]
    assert rows_of_calls(Of(*rows), (4, 6)) == [4]
    views = [Does(lambda m, x: torch.cat(F.linear(torch.cat([x, -x]), m.p[0]).chunk(2), 1), (5, 6))]
    assert rows_of_calls(Of(*views), (6,)) == [1]


class Signed(Of):
    """Positions whose gradients all but cancel: the loss is plus the first, minus the second, and so on."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)  # [B, N, D]
        signs = torch.tensor([1.0, -1.0], dtype=out.dtype).repeat(out.shape[1] // 2)
        return (out * signs[:, None]).sum((1, 2))


@pytest.mark.parametrize("layer", [nn.Linear(256, 256), nn.Linear(512, 256, bias=False)], ids=repr)
def test_a_norm_is_never_understated_where_large_numbers_cancel(layer: nn.Linear) -> None:
    """Positions of size 1,000 that differ by 0.001 and less: float32 loses what is left of their products."""
    method, draw = Signed(layer), torch.Generator().manual_seed(0)
    group = Grouping(torch.arange(8), 8)
    for spread in (0.0, 1e-4, 1e-3, 1e-1, 10.0):
        x = 1e3 * torch.randn(8, 1, layer.in_features, generator=draw) + spread * torch.randn(
            8, 4, layer.in_features, generator=draw
        )
        _, terms = unit_terms(method, (x,), group, [1])
        found = next(term for term in terms if term.parameter is layer.weight)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        # Of each of the 256 outputs the gradient is the signed sum of the positions.
        true = layer.out_features * (x.double() * signs[:, None]).sum(1).square().sum(1)
        assert (found.squares.double() >= true * (1 - 1e-5)).all(), spread


class Steep(Of):
    """A loss that rises by 1e18 with each number that comes out, as weights from outside can make it."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) * 1e18).flatten(1).sum(1)


@pytest.mark.parametrize("size", [1e-19, 1e-22, 1e-23, 1e-25, 1e-30])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(512, 256, bias=False), (4, 512)), (nn.Conv2d(256, 256, 3, padding=1, bias=False), (256, 3, 3))],
    ids=["linear", "conv"],
)
def test_a_norm_is_never_understated_where_squares_are_too_small_for_a_float(
    layer: nn.Module, shape: tuple[int, ...], size: float
) -> None:
    """Inputs whose squares are zero in float32, times a gradient that makes up for it."""
    method = Steep(layer)
    x = size * (1 + torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)))
    _, terms = unit_terms(method, (x,), Grouping(torch.arange(3), 3), [1])
    (found,) = terms
    for unit in range(3):
        (plain,) = torch.autograd.grad(method(x[unit : unit + 1]).sum(), [found.parameter])
        true = plain.double().square().sum()
        assert found.squares[unit].double() >= true * (1 - 1e-5), (found.squares[unit], true)
        alone = clipped_sum(method, (x[unit : unit + 1],), Grouping(torch.zeros(1, dtype=torch.long), 1), 1e-3, [1])
        (total,) = alone.sums.values()  # at 1e-23 it was 20 and 65 times as long
        assert total.double().norm() <= 1e-3 * (1 + 1e-6)


def test_the_norm_of_a_words_gradient_is_never_understated() -> None:
    class Weighed(Of):
        def forward(self, x: Tensor) -> Tensor:
            return (self.layers(torch.zeros_like(x, dtype=torch.long)) * x[..., None]).sum((1, 2))

    method, draw = Weighed(nn.Embedding(2, 16)), torch.Generator().manual_seed(0)
    for spread in (1e-3, 1e-2, 1e-1):
        large = 1e3 * torch.rand(32, 3, generator=draw)
        x = torch.cat([large, -large + spread * torch.randn(32, 3, generator=draw)], 1)
        _, (term,) = unit_terms(method, (x,), Grouping(torch.arange(32), 32), [1])
        true = 16 * x.double().sum(1).square()
        assert (term.squares.double() >= true * (1 - 1e-5)).all(), spread


def test_an_input_that_is_overwritten_before_its_gradient_is_taken_is_an_error() -> None:
    """Autograd does not see it: with the parameters frozen it has no use for the input."""

    def overwrites(m: Does, x: Tensor) -> Tensor:
        hidden = x * 2
        out = F.linear(hidden, m.p[0])
        hidden.add_(1)
        return out

    with pytest.raises(AssertionError, match="overwritten before its gradient was taken"):
        rows_of_calls(Of(Does(overwrites, (5, 6))), (6,))


def test_a_batch_whose_units_have_gaps_is_an_error() -> None:
    """Three images of units 0, 2 and 2 would be taken for one of each of three units, and clipped one by one."""
    for units, count in (([0, 2, 2], 3), ([1, 1], 2), ([0, 1, 0], 2), ([0, 0], 2), ([0, 1], 1)):
        with pytest.raises(AssertionError, match="without a gap"):
            Grouping(torch.tensor(units), count)
    assert Grouping(torch.tensor([0, 0, 1]), 2).most == 2
    assert Grouping(torch.empty(0, dtype=torch.int64), 0).images == 0


def test_rows_belong_to_units_by_hand() -> None:
    """Three images of two units, two views of each, two windows a view: rows 0 and 1 are the first image's."""
    group = Grouping(torch.tensor([0, 0, 1]), 2)
    rows = torch.arange(12.0)[:, None]
    assert group.summed(rows, 2).flatten().tolist() == [0 + 1 + 2 + 3 + 6 + 7 + 8 + 9, 4 + 5 + 10 + 11]
    padded = group.by_unit(rows, 2)[..., 0]
    assert [sorted(unit) for unit in padded.tolist()] == [[0, 1, 2, 3, 6, 7, 8, 9], [0, 0, 0, 0, 4, 5, 10, 11]]
    assert group.of_rows(torch.tensor([5.0, 7.0]), 12, 2).tolist() == [5, 5, 5, 5, 7, 7] * 2


class Shared(Of):
    """Two layers that share a weight, and no bias between them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.layers[2].weight = self.layers[0].weight


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "a shared weight": (Shared(), (6,), "'layers.0.weight' is shared by two layers"),
    "no rule": (Of(nn.PReLU(6)), (6,), r"no rule for 'layers.0.weight' in .*prelu"),
    "two parameters at once": (
        Of(Does(lambda m, x: x + (m.p[0] + m.p[1]), (6,), (6,))),
        (6,),
        "no rule for 'layers.0.p.0'",
    ),
    "a kernel over its norm": (Of(Does(lambda m, x: F.linear(x, m.p[0] / m.p[0].norm()), (5, 6))), (6,), "no rule"),
    "a weighted sum": (Of(Does(lambda m, x: torch.add(x, m.p[0], alpha=2), (6,))), (6,), "no rule"),
    "padding": (Of(nn.Conv2d(2, 2, 3, padding="same")), (2, 6, 6), "padding = 'same' has no rule"),
    "padded words": (Of(nn.Embedding(4, 2, padding_idx=0)), (6,), "an embedding with options has no rule"),
    "attention in one call": (Of(Attends()), (4, 6), "no rule for 'layers.0.attention.in_proj_weight'"),
    "tokens before images": (
        Of(Does(lambda m, x: F.linear(x.permute(1, 0, 2), m.p[0]).permute(1, 0, 2), (5, 6))),
        (4, 6),
        "'layers.0.p.0' mixes the images of a batch",
    ),
    "rows out of order": (
        Of(Does(lambda m, x: F.linear(x.flip(0), m.p[0]).flip(0), (5, 6))),
        (6,),
        "do not follow 3 images",
    ),
    "a batch's mean": (
        Of(nn.Linear(6, 6), Does(lambda m, x: x - x.mean(0))),
        (6,),
        "changes with another image of its batch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_gradient_of_one_image_is_refused(name: str) -> None:
    method, shape, text = REFUSED[name]
    if name == "padded words":
        method = Words()
        method.layers[0] = nn.Embedding(4, 5, padding_idx=0)
    with pytest.raises(ConfigError, match=text) as refused:
        rows_of_calls(method, shape)
    assert "ake " in str(refused.value)  # what to do instead
    assert all(parameter.requires_grad for parameter in method.parameters())
