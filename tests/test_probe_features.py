"""Features come from the frozen encoder, normalised with the declared constants, in order."""

import numpy as np
import pytest
import torch
from torch import nn

from wardround.errors import CheckpointError
from wardround.probe.features import features


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * 4 * 4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5))


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 2, 4, 4), dtype=np.uint8)


def test_features_equal_a_float64_reference_of_normalisation_and_encoder() -> None:
    images, net = random_images(131), encoder()  # more than two batches
    found = features(net, images, (0.3, 0.6), (0.2, 0.25))
    linear = net[1]
    mean, std = np.array([0.3, 0.6]).reshape(2, 1, 1), np.array([0.2, 0.25]).reshape(2, 1, 1)
    flat = ((images / 255.0 - mean) / std).reshape(131, -1)
    expected = flat @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
    expected /= np.sqrt(1.0 + 1e-5)  # batch norm in evaluation mode: running mean 0, variance 1; no dropout
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_encoder_is_left_as_it_was() -> None:
    net = encoder().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    features(net, random_images(70), (0.5, 0.5), (0.25, 0.25))
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_read_only_memory_map_is_read_without_a_warning(tmp_path: object) -> None:
    images = random_images(3)
    images.tofile(f"{tmp_path}/images")
    mapped = np.memmap(f"{tmp_path}/images", np.uint8, "r", shape=images.shape)
    constants = (0.5, 0.5), (0.25, 0.25)
    np.testing.assert_array_equal(features(encoder(), mapped, *constants), features(encoder(), images, *constants))


def test_bfloat16_changes_the_third_digit_only() -> None:
    images, constants = random_images(40), ((0.5, 0.5), (0.25, 0.25))
    exact, fast = (features(encoder(), images, *constants, autocast=fast) for fast in (False, True))
    assert fast.dtype == np.float32
    assert np.linalg.norm(fast - exact) / np.linalg.norm(exact) < 0.01


def test_a_diverged_backbone_is_refused() -> None:
    net = encoder()
    with torch.no_grad():
        net[1].bias[0] = float("nan")
    with pytest.raises(CheckpointError, match="3 of 3 images have features that are NaN"):
        features(net, random_images(3), (0.5, 0.5), (0.25, 0.25))
