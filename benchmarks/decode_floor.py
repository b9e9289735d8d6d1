"""Time of one decode step against a floor that is looped in the same run.

    python benchmarks/decode_floor.py [--shape smollm2-135m] [--batch 16 64] [--dtype float32 bfloat16] [--quick]

The floor is what a step cannot do without: the model's bare matrix products at that batch size, LoRA and head included,
one read of the keys and values so far, one pass over the logits. Prints one JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from bench_recipe import bench_recipe, only_the_last_line
from torch import Tensor

from hydra_rlhf.benchmark.subject import build_model, sizes_for_work
from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.sample import sample_tokens
from hydra_rlhf.model.shapes import find_config, meta_trunk

PROMPT_TOKENS = 64


def decode(model: HydraModel, prompts: Tensor, num_tokens: int) -> None:
    """Sample `num_tokens` tokens for each prompt with the actor: the one place that calls the decode engine."""
    actor = model.table["actor"]
    sample_tokens(
        model.trunk(actor.trunk),
        actor.adapter,
        prompts,
        torch.ones_like(prompts, dtype=torch.bool),
        torch.rand(len(prompts), num_tokens, device=prompts.device),
        SamplingConfig(max_response_tokens=num_tokens, min_response_tokens=num_tokens),
        stop_ids=model.stop_ids(None),
        pad_id=model.pad_id,
    )


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, the device's part included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class Floor:
    """The bare work of one decode step of a model's actor, ready to be looped."""

    def __init__(self, model: HydraModel, batch: int, cache_bytes: int) -> None:
        """`cache_bytes` is what the keys and values of the whole batch take in the middle of the response."""
        actor = model.table["actor"]
        trunk = model.trunk(actor.trunk)
        assert actor.adapter is not None
        self.products: list[tuple[Tensor, Tensor, Tensor]] = [
            (wrapped.linear.weight, wrapped.lora_A[actor.adapter].to(trunk.dtype), b.to(trunk.dtype))
            for wrapped in trunk.lora_linears.values()
            for b in (wrapped.lora_B[actor.adapter],)
        ]
        self.head = trunk.lm_head.weight
        widths = {weight.shape[1] for weight, _, _ in self.products} | {self.head.shape[1]}
        self.inputs = {width: torch.randn(batch, width, device=model.device).to(trunk.dtype) for width in widths}
        self.cache = torch.zeros(cache_bytes // 4, device=model.device)
        self.logits = torch.zeros(batch, len(self.head), dtype=trunk.dtype, device=model.device)

    @torch.no_grad()
    def matrices(self) -> None:
        """Every linear of the decoder with its LoRA set, and the LM head."""
        for weight, a, b in self.products:
            x = self.inputs[weight.shape[1]]
            F.linear(x, weight)
            F.linear(F.linear(x, a), b)
        F.linear(self.inputs[self.head.shape[1]], self.head)

    def read_cache(self) -> None:
        """Keys and values, once; as float32, since bytes are bytes."""
        self.cache.sum()

    def read_logits(self) -> None:
        """The logits, once."""
        self.logits.amax(dim=-1)


def measure(shape: str, dtype: str, batch: int, *, device: str, num_tokens: int, repeats: int) -> dict[str, Any]:
    """One row: step and floor in turns, medians of `repeats` rounds after one that warms up."""
    recipe = bench_recipe(
        shape, batch=batch, prompt=PROMPT_TOKENS, response=num_tokens, iterations=1, dtype=dtype, device=device
    )
    model = build_model(recipe)
    config = find_config(recipe.model)
    sizes = sizes_for_work(config, meta_trunk(config, recipe.model), recipe.lora)
    floor = Floor(model, batch, round(batch * (PROMPT_TOKENS + num_tokens / 2) * sizes.cache_bytes))
    prompts = torch.randint(3, model.vocab_size, (batch, PROMPT_TOKENS), device=model.device)
    parts: dict[str, Callable[[], object]] = {
        "long": lambda: decode(model, prompts, num_tokens),
        "first": lambda: decode(model, prompts, 1),
        "matrices": floor.matrices,
        "cache": floor.read_cache,
        "logits": floor.read_logits,
    }
    rounds = [{name: seconds(part, model.device) for name, part in parts.items()} for _ in range(repeats + 1)]
    taken = {name: median(found[name] for found in rounds[1:]) for name in parts}
    return {"dtype": dtype, "batch": batch, **against_floor(taken, num_tokens)}


def against_floor(taken: dict[str, float], num_tokens: int) -> dict[str, float]:
    """Seconds of a decode step (what the tokens after the first took, each) and of its floor, part by part."""
    step = (taken["long"] - taken["first"]) / (num_tokens - 1)
    parts = {f"{name}_s": taken[name] for name in ("matrices", "cache", "logits")}
    floor = sum(parts.values())
    return {"step_s": step, "floor_s": floor, "ratio": step / floor, **parts}


def main(argv: Sequence[str] | None = None) -> None:
    """Every dtype at every batch size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", help="a known shape, or what model.path takes")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=33, help="of each response; the first comes from the prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2 rows, 3 tokens, one round")
    args = parser.parse_args(argv)
    batches = [2] if args.quick else args.batch
    num_tokens, repeats = (3, 1) if args.quick else (args.tokens, args.repeats)
    shape = args.shape if ":" in args.shape else f"shape:{args.shape}"
    with only_the_last_line():
        rows = [
            measure(shape, dtype, batch, device=args.device, num_tokens=num_tokens, repeats=repeats)
            for dtype in args.dtype
            for batch in batches
        ]
    print(json.dumps({"shape": shape, "prompt": PROMPT_TOKENS, "tokens": num_tokens, "rows": rows}))


if __name__ == "__main__":
    main()
