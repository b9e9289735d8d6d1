"""Counter-based randomness: every random stream is a fresh generator seeded by what it is for.

No stream outlives its use and no global generator is touched, so a resumed or replayed step draws the same numbers
without any saved generator state, whatever ran before it and in however many workers.
"""

import hashlib
import json

import torch
from jaxtyping import Float64
from torch import Tensor


def seed_for(*parts: int | str) -> int:
    """A seed in [0, 2**63) for the stream named by `parts`, e.g. `seed_for(run_seed, "ppo", step, "minibatches")`.

    The parts are hashed (SHA-256) as a JSON list, which keeps their borders and types: `("a", "bc")`, `("ab", "c")`,
    `(1,)` and `("1",)` are four different streams. The same on every machine, process and Python version.
    """
    assert parts, "a random stream needs a name"
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator for the stream named by `parts`.

    torch's CPU generator keeps the low 32 bits of its seed: enough for some thousands of streams, too few for one
    stream per drawn number (two of 65,000 random streams are equal with probability 0.4).
    """
    return torch.Generator().manual_seed(seed_for(*parts))


def uniforms(n: int, *parts: int | str) -> Float64[Tensor, " n"]:
    """n numbers in [0, 1) of the stream named by `parts`; number i does not depend on n.

    In double precision, because steps of 2**-24 would never draw the rare tokens of a large vocabulary.
    """
    return torch.rand(n, generator=generator(*parts), dtype=torch.float64)


def permutation(n: int, *parts: int | str) -> list[int]:
    """The numbers 0 to n - 1 in the random order of the stream named by `parts`."""
    return torch.randperm(n, generator=generator(*parts)).tolist()
