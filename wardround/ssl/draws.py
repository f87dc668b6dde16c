"""Where randomness comes from: every draw is a function of names, never of what was drawn before.

So a round that is cut and started again, in any process, draws the same. DP noise is not drawn here.
"""

import hashlib

import torch


def generator(*names: str | int) -> torch.Generator:
    """Return a CPU generator seeded by the names, such as (seed, site, round, step, purpose).

    It draws on the CPU whatever the device, so that a GPU sees the same views and masks.
    """
    text = "|".join(str(name) for name in names)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)
