"""A module that is built without drawing weights is, once it is given a state, the one that was built with them."""

import matrix
import pytest
import torch

from wardround import ssl as methods
from wardround.errors import ConfigError
from wardround.ssl import METHODS, Method

PAIRS = [("simclr", name) for name in matrix.every_family()]
PAIRS += [(method, name) for method in METHODS for name in matrix.REPRESENTATIVES[:2]]


def everything(method: Method) -> dict[str, torch.Tensor]:
    """Return all tensors of a module, those that no file keeps included."""
    return dict(method.named_parameters()) | dict(method.named_buffers())


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_nothing_is_left_of_what_was_not_drawn(method: str, backbone: str) -> None:
    recipe = matrix.recipe(method, backbone)
    try:
        drawn = methods.build(recipe)
    except ConfigError:  # of a pair that is refused
        pytest.skip("no such pair")
    state = methods.get_state(drawn)
    made = [drawn, methods.build(recipe, drawn=False)]
    for one in made:
        methods.set_state(one, state)
        methods.set_site_tensors(one, {})
    expected, found = map(everything, made)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


def test_no_weight_is_drawn() -> None:
    recipe = matrix.recipe("mae", "vit_tiny_patch16_224")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with methods.Undrawn():
        METHODS["mae"](recipe)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backbone", matrix.REPRESENTATIVES)
def test_nothing_depends_on_what_memory_held(backbone: str) -> None:
    """SparK passes images through its network as it is built, to see that hidden pixels stay hidden."""
    torch.use_deterministic_algorithms(True)  # torch then fills new tensors with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        methods.build(matrix.recipe("mae", backbone), drawn=False)
    finally:
        torch.use_deterministic_algorithms(False)
