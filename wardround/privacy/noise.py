"""The private randomness: what draws patients and noise, from the operating system and never from a seed.

Who knows the generator's start can subtract the noise. So nothing here takes a seed, and nothing
here can be repeated.
"""

import math
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

WORDS = 624  # of 32 bits: the Mersenne Twister's state
_CHUNK = 2**16  # numbers at a time: 2 MB of keystream, which stays in the cache
_FAR = 4.0  # deviations: of 16,000 normal numbers one lies farther out
_BEYOND = math.erfc(_FAR / math.sqrt(2)) / 2  # the chance of that, on one side


def fresh_generator() -> torch.Generator:
    """Return a CPU generator whose whole state, 624 words of 32 bits, comes from the operating system.

    `torch.Generator().seed()` and `manual_seed` leave 2^32 possible states on the CPU, which can be tried
    one after the other. This start cannot be guessed, but a Mersenne Twister is no cryptographic
    generator: 624 outputs in full give its state, and with that all others.
    """
    return generator_from(fresh_words())


def fresh_words() -> NDArray[np.uint32]:
    """Return a state for `generator_from` from the operating system, [WORDS]."""
    return np.frombuffer(os.urandom(4 * WORDS), dtype=np.uint32)


def generator_from(words: NDArray[np.uint32]) -> torch.Generator:
    """Return a CPU generator in the state of the given 624 words, none of them used yet.

    torch takes a state as bytes: the seed (u64), numbers left before the next twist and whether it is
    seeded (two i32), the place in the state (u64), the words (each a u64), and cached normals.
    """
    generator = torch.Generator()
    layout = torch.zeros_like(generator.get_state()).numpy()  # zeros: no seed to tell, no cached normals
    layout[8:16].view(np.int32)[:] = 1, 1  # the first number twists the whole state, as in numpy
    layout[24 : 24 + 8 * WORDS].view(np.uint64)[:] = words
    generator.set_state(torch.from_numpy(layout))
    return generator


def uniform(count: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1) by the operating system's cryptographic generator: for who is drawn, [count]."""
    words = np.frombuffer(os.urandom(8 * count), np.uint64)
    return np.ldexp((words >> np.uint64(11)).astype(np.float64), -53)


def standard_normal(shape: Sequence[int], randomness: Literal["torch", "secure"]) -> Tensor:
    """Return float32 standard normal numbers on the CPU, from fresh entropy of the operating system at each call.

    torch: a Mersenne Twister from `fresh_generator`: fast, and no cryptographic generator. What lies far out is
    drawn again, from 53 bits: torch makes float32 normals from 24, so that none is beyond 5.77 and a noised number
    that is tells for certain that a unit is there. With the noise of epsilon 8 (2000 steps at q = 0.01) that is up
    to once in 4,000 runs, where delta = 1e-5 allows one in 100,000.
    secure: AES-256 in counter mode, and half the sum of four normals, which hides the gaps between
    floating-point numbers from who would read a sum's digits (Holohan and Braghin 2021,
    arXiv:2107.10138); takes 20 to 30 times as long, 0.1 microseconds a number.
    """
    if randomness == "torch":
        generator = fresh_generator()
        drawn = torch.randn(tuple(shape), generator=generator)
        flat = drawn.numpy().reshape(-1)  # the same memory
        far = np.flatnonzero(np.abs(flat) > _FAR)
        flat[far] = np.copysign(_far_out(len(far), generator), flat[far])
        return drawn
    out = np.empty(math.prod(shape), np.float32)
    keystream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    for start in range(0, len(out), _CHUNK):
        part = out[start : start + _CHUNK]
        bits = np.frombuffer(keystream.update(bytes(32 * len(part))), np.uint64).reshape(4, len(part))
        part[:] = _box_muller(bits).sum(axis=0) / 2
    return torch.from_numpy(out.reshape(tuple(shape)))


def _far_out(count: int, generator: torch.Generator) -> NDArray[np.float64]:
    """Return normal numbers from _FAR on, by the inverse of the tail, up to 9.37: [count]."""
    share = 1.0 - torch.rand(count, dtype=torch.float64, generator=generator)  # of the tail beyond, in (0, 1]
    return np.asarray(-torch.special.ndtri(share * _BEYOND))


def _box_muller(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return as many normal numbers as there are words of 64 random bits, [2k, n], in float64."""
    uniform = ((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # in (0, 1]: the logarithm is finite
    radius = np.sqrt(-2.0 * np.log(uniform[::2]))
    angle = (2.0 * np.pi) * uniform[1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
