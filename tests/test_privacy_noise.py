"""The private randomness: normal, different at every call, and out of any seed's reach.

Each statistical test fails by chance with a probability below 1e-6.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from wardround.privacy.noise import (
    _CHUNK,
    _FAR,
    WORDS,
    _box_muller,
    _far_out,
    fresh_generator,
    generator_from,
    standard_normal,
)

KINDS = ("torch", "secure")
CHANCE = 1e-7  # of each side


def inside(value: float, freedom: int) -> bool:
    """Return whether a value may be a chi-square variable of so many degrees of freedom."""
    return bool(stats.chi2.ppf(CHANCE, freedom) < value < stats.chi2.isf(CHANCE, freedom))


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_standard_normal(kind: str) -> None:
    n, bins = 5 * _CHUNK + 7, 64
    drawn = standard_normal((n,), kind).double().numpy()  # type: ignore[arg-type]
    assert inside(float((drawn**2).sum()), n)
    assert float(drawn.sum() ** 2 / n) < stats.chi2.isf(2 * CHANCE, 1)
    counts, _ = np.histogram(stats.norm.cdf(drawn), bins, (0.0, 1.0))
    assert float(((counts - n / bins) ** 2).sum() / (n / bins)) < stats.chi2.isf(2 * CHANCE, bins - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_nine_tenths_of_the_noise_would_be_noticed(kind: str) -> None:
    n = 5 * _CHUNK
    drawn = 0.9 * standard_normal((n,), kind).double()  # type: ignore[arg-type]
    assert not inside(float(drawn.square().sum()), n)


@pytest.mark.parametrize("kind", KINDS)
def test_no_seed_makes_two_calls_equal(kind: str) -> None:
    calls = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        calls.append(standard_normal((4, 5), kind))  # type: ignore[arg-type]
    assert calls[0].shape == (4, 5) and calls[0].dtype == torch.float32
    assert not torch.equal(calls[0], calls[1])


def test_the_chunks_of_one_secure_call_are_different_numbers() -> None:
    one, two = standard_normal((2, _CHUNK), "secure")
    # Equal float32 numbers at one place are rare; a repeated keystream would make all of them equal.
    assert (one == two).sum() < 10
    assert float((one.double() @ two.double()) ** 2 / _CHUNK) < stats.chi2.isf(2 * CHANCE, 1)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_shape_is_filled(kind: str, shape: tuple[int, ...]) -> None:
    assert standard_normal(shape, kind).shape == shape  # type: ignore[arg-type]


def test_the_extreme_words_give_finite_normals() -> None:
    none, all_ones = np.zeros((4, 1), np.uint64), np.full((4, 1), 2**64 - 1, np.uint64)
    largest = math.sqrt(-2 * math.log(2.0**-53))  # 8.57: the uniform number above 0 that is the smallest
    assert _box_muller(none).T[0] == pytest.approx([largest, largest, 0, 0], abs=1e-14)
    assert _box_muller(all_ones).tolist() == [[0.0]] * 4  # the logarithm of 1


def test_the_tail_is_not_that_of_24_random_bits() -> None:
    """torch makes a pair of float32 normals, in blocks of 16, from a radius whose exp(-r^2 / 2) is a whole number of
    2^-24: none is beyond 5.77, so that one which is would tell for certain that somebody's gradient took it there.
    """
    pairs = standard_normal((2**20, 2, 8), "torch").double()
    far = (pairs.abs() > _FAR).any(1)
    steps = torch.exp(-pairs.square().sum(1) / 2)[far] * 2**24
    assert len(steps) > 500
    assert (steps - steps.round()).abs().mean() > 0.2  # 0.25 of any numbers, 0.001 of whole ones in float32


def test_what_is_drawn_far_out_is_the_normal_tail() -> None:
    n, bins = 10**6, 64
    drawn = _far_out(n, fresh_generator())
    assert drawn.min() >= _FAR and drawn.max() > 5.77
    counts, _ = np.histogram(stats.norm.sf(drawn) / stats.norm.sf(_FAR), bins, (0.0, 1.0))
    assert counts.sum() == n
    assert float(((counts - n / bins) ** 2).sum() / (n / bins)) < stats.chi2.isf(2 * CHANCE, bins - 1)


def test_as_many_numbers_lie_far_out_on_either_side_as_of_a_normal() -> None:
    drawn, n = standard_normal((2**24,), "torch"), 2**24
    for count in (int((drawn > _FAR).sum()), int((drawn < -_FAR).sum())):
        expected = n * float(stats.norm.sf(_FAR))
        assert (count - expected) ** 2 / expected < stats.chi2.isf(2 * CHANCE, 1)


def test_manual_seed_of_a_cpu_generator_takes_only_the_low_32_bits() -> None:
    """Why no seed is drawn from the operating system: 2^32 of them can be tried one after the other."""
    one, other = (torch.Generator().manual_seed(seed) for seed in (1, 1 + 2**32))
    assert torch.equal(torch.randn(100, generator=one), torch.randn(100, generator=other))


def test_the_words_are_the_state_of_the_published_mersenne_twister() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, WORDS, dtype=np.uint32)
    numpys = np.random.RandomState()
    numpys.set_state(("MT19937", words, WORDS))
    expected = numpys.randint(0, 2**32, 2000, dtype=np.uint32) & 0x7FFFFFFF
    # random_ of int32 is one output of 32 bits without its highest
    found = torch.empty(2000, dtype=torch.int32).random_(generator=generator_from(words))
    assert found.tolist() == expected.tolist()


def test_the_state_of_a_cpu_generator_lies_where_generator_from_writes_it() -> None:
    state = torch.Generator().manual_seed(5489).get_state().numpy()
    assert len(state) == 5056
    assert state[:8].view(np.uint64).item() == 5489
    assert state[8:16].view(np.int32).tolist() == [1, 1]  # one left before the twist; seeded
    words = state[24 : 24 + 8 * WORDS].view(np.uint64)
    assert words[1] == (1812433253 * (5489 ^ (5489 >> 30)) + 1) % 2**32  # Matsumoto and Nishimura's initialisation


def test_a_fresh_generator_tells_no_seed_and_no_two_share_a_word() -> None:
    one, two = fresh_generator(), fresh_generator()
    assert one.initial_seed() == 0
    places = slice(24, 24 + 8 * WORDS)
    same = one.get_state().numpy()[places].view(np.uint64) == two.get_state().numpy()[places].view(np.uint64)
    assert same.sum() < 4  # 624 chances of 2^-32 each
    assert not torch.equal(torch.randn(100, generator=one), torch.randn(100, generator=two))
