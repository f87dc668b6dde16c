"""Every method on four backbones, and every family by `mae` and `simclr`: `make matrix` runs all of them."""

import matrix
import pytest

from wardround.ssl import METHODS

# Why a pair is refused; every other pair trains.
REFUSED = {
    "ijepa": "needs an encoder that takes any subset of patches",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "inception_resnet_v2": "inception_resnet_v2",
    "legacy_xception": "legacy_xception",
}


@pytest.mark.parametrize("backbone", matrix.REPRESENTATIVES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_every_kind_of_backbone(method: str, backbone: str) -> None:
    pair = matrix.check(method, backbone)
    if method == "ijepa" and not backbone.startswith("vit"):
        assert pair.verdict == "refused" and REFUSED["ijepa"] in pair.reason
    else:
        assert pair.verdict == "trains", pair.reason


# Of volumes, test_backbones_monai.py has what a CPU bears.
@pytest.mark.parametrize("backbone", [name for name in matrix.every_family() if not name.startswith("monai")])
@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_every_family_gives_every_parameter_a_gradient(method: str, backbone: str) -> None:
    # Two steps: some branches start at scale 0 and get their gradient from the second on.
    pair = matrix.check(method, backbone, steps=2)
    if method == "mae" and backbone in REFUSED:
        assert pair.verdict == "refused" and REFUSED[backbone] in pair.reason
    else:
        assert pair.verdict == "trains", pair.reason


def test_a_broken_promise_is_seen() -> None:
    config = matrix.recipe("mae", "vit_tiny_patch16_224")
    built = matrix.methods.build(config)
    built.head.unused = matrix.torch.nn.Linear(1, 1)  # a layer that no loss reaches
    with pytest.raises(AssertionError, match=r"2 parameters never get a gradient, the first .*head\.unused"):
        matrix.train(built, config, 2)
