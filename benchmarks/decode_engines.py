"""Time of a whole rollout with each decode engine, at equal responses: all of full length, and of very unequal lengths.

    python benchmarks/decode_engines.py [--shape smollm2-135m] [--device cpu] [--quick]

Weights are random, so every token is about equally likely; where many ids count as stop tokens, lengths are geometric.
Engines run in turns, and must give the same tokens. Prints one JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from bench_recipe import bench_recipe, only_the_last_line
from torch import Tensor

from hydra_rlhf.benchmark.subject import build_model
from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.sample import ENGINES, sample_tokens
from hydra_rlhf.model.sampling import SampledTokens


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts of evenly spread lengths and how they are decoded."""

    prompts: int = 16
    shortest: int = 16
    longest: int = 128
    response: int = 64
    """The most tokens of a response."""
    rows: int = 8
    """Decoded at a time."""
    mean_length: int = 16
    """About that many tokens come before a stop token where lengths are unequal."""


def prompt_lengths(work: Workload) -> list[int]:
    """From the shortest to the longest, in equal steps."""
    steps = max(1, work.prompts - 1)
    return [work.shortest + (work.longest - work.shortest) * i // steps for i in range(work.prompts)]


def random_prompts(model: HydraModel, work: Workload) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on the left, in an order that is not that of their lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(prompt_lengths(work))[torch.randperm(work.prompts, generator=generator)]
    mask = torch.arange(work.longest) >= work.longest - lengths[:, None]
    ids = torch.randint(3, model.vocab_size, mask.shape, generator=generator)
    return torch.where(mask, ids, model.pad_id).to(model.device), mask.to(model.device)


def rollout(model: HydraModel, engine: str, work: Workload, *, unequal: bool) -> SampledTokens:
    """One whole rollout of the actor."""
    actor = model.table["actor"]
    prompts, mask = random_prompts(model, work)
    uniforms = torch.rand(work.prompts, work.response, generator=torch.Generator().manual_seed(1))
    least = 1 if unequal else work.response
    stops = tuple(range(3, 3 + model.vocab_size // work.mean_length)) if unequal else model.stop_ids(None)
    return sample_tokens(
        model.trunk(actor.trunk),
        actor.adapter,
        prompts,
        mask,
        uniforms.to(model.device),
        SamplingConfig(max_response_tokens=work.response, min_response_tokens=least, engine=engine),  # pyright: ignore
        num_rows=work.rows,
        stop_ids=stops,
        pad_id=model.pad_id,
    )


def timed(work: Callable[[], SampledTokens], device: torch.device) -> tuple[float, SampledTokens]:
    """Seconds of one call, the device's part included, and what it gave."""
    start = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, found


def measure(model: HydraModel, work: Workload, *, unequal: bool, repeats: int) -> dict[str, Any]:
    """One row: every engine in turns, medians of `repeats` rounds after one that warms up."""
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    sampled: dict[str, SampledTokens] = {}
    for _ in range(repeats + 1):
        for engine in ENGINES:
            taken, sampled[engine] = timed(lambda e=engine: rollout(model, e, work, unequal=unequal), model.device)
            seconds[engine].append(taken)
    first = sampled["slots"]
    equal = {engine: same_share(first, found) for engine, found in sampled.items()}
    return {
        "responses": "unequal" if unequal else "full",
        "mean_length": float(first.mask.sum(1).float().mean()),
        "engines": {
            engine: {"median_s": median(taken[1:]), "rounds_s": taken[1:], "same_responses": equal[engine]}
            for engine, taken in seconds.items()
        },
    }


def same_share(first: SampledTokens, second: SampledTokens) -> float:
    """The share of responses that are the same ids; a draw within rounding of a boundary makes one differ."""
    rows = zip(first.tokens, first.mask, second.tokens, second.mask, strict=True)
    return sum(a[m].tolist() == b[n].tolist() for a, m, b, n in rows) / len(first.tokens)


def main(argv: Sequence[str] | None = None) -> None:
    """Full responses, then unequal ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", help="a known shape, or what model.path takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 4 prompts, one round")
    args = parser.parse_args(argv)
    quick = Workload(prompts=4, shortest=2, longest=8, response=6, rows=2, mean_length=3)
    work, repeats = (quick, 1) if args.quick else (Workload(), args.repeats)
    named = args.shape if ":" in args.shape else f"shape:{args.shape}"
    shape = "scratch:tiny" if args.quick else named
    with only_the_last_line():
        recipe = bench_recipe(
            shape,
            batch=work.prompts,
            prompt=work.longest,
            response=work.response,
            iterations=1,
            dtype=args.dtype,
            device=args.device,
        )
        model = build_model(recipe)
        rows = [measure(model, work, unequal=unequal, repeats=repeats) for unequal in (False, True)]
    print(json.dumps({"shape": shape, "dtype": args.dtype, "settings": vars(work), "rows": rows}))


if __name__ == "__main__":
    main()
