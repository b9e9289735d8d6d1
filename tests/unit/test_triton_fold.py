"""The Triton kernel against `RunningSoftmax.fold_`, in Triton's interpreter; and compiled for a GPU that is not here.

Triton decides at import whether it interprets, so each half runs this file as a program in a process of its own.
"""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

SHAPINGS = {
    "plain": {"scale": 1.0, "softcap": None, "temperature": 1.0},
    "scale and temperature": {"scale": 1.3, "softcap": None, "temperature": 0.7},
    "softcap": {"scale": 1.0, "softcap": 3.0, "temperature": 1.0},
    "all, as whole numbers": {"scale": 1, "softcap": 5, "temperature": 2},
}
DTYPES = ["float32", "bfloat16"]
STATISTICS = ("peak", "total", "weighted", "target_logit")
BOUND = 1e-6
"""Relative to the larger of 1 and the number."""

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def interpret() -> dict[str, Any]:
    """Fold three tiles with the kernel and in plain torch; the worst difference of every statistic, by case."""
    from hydra_rlhf.model.online_softmax import LogitShaping, RunningSoftmax
    from hydra_rlhf.model.tiled_logprobs import fold_for
    from hydra_rlhf.model.triton_fold import BLOCK, fold_in_one_read, works_on

    # One tile of a full block and a bit, and one of less than a block.
    borders = [0, BLOCK + 5, BLOCK + 45]
    # In the first and last column of each tile; and just behind the first tile, where the kernel's last block reaches.
    targets = torch.tensor([0, borders[1] - 1, borders[1], borders[1] + 3, borders[2] - 1])
    found: dict[str, Any] = {}
    for name, settings in SHAPINGS.items():
        shaping = LogitShaping(**settings)
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(0)
            products = (4 * torch.randn(len(targets), borders[-1], generator=generator)).to(getattr(torch, dtype))
            products[0, :50] = torch.linspace(-0.01, 0.01, 50)  # near zero, where tanh is delicate
            ours, plain = (RunningSoftmax.empty(len(targets), dtype=torch.float32, device=CPU) for _ in range(2))
            for start, end in pairwise(borders):
                tile = products[:, start:end]  # rows are further apart than the tile is wide
                before = tile.clone()
                fold_in_one_read(ours, tile, targets - start, shaping)
                assert torch.equal(tile, before)
                plain.fold_(tile.float(), targets - start, shaping)
            pairs = {key: (getattr(ours, key), getattr(plain, key)) for key in STATISTICS}
            pairs |= {"logprobs": (ours.logprobs(), plain.logprobs()), "entropy": (ours.entropy(), plain.entropy())}
            found[f"{name}, {dtype}"] = {
                key: ((a - b).abs() / b.abs().clamp(min=1.0)).max().item() for key, (a, b) in pairs.items()
            }
    nan = RunningSoftmax.empty(1, dtype=torch.float32, device=CPU)
    fold_in_one_read(nan, torch.tensor([[0.0, float("nan")]]), torch.tensor([0]), LogitShaping(1.0, None, 1.0))
    found["a NaN stays one"] = bool(nan.logprobs().isnan().all())
    found["works"] = works_on(CPU)
    found["chosen on CUDA"] = fold_for(torch.zeros(1, 1).as_subclass(PretendsCuda)) is fold_in_one_read
    found["chosen in float64"] = fold_for(torch.zeros(1, 1).double().as_subclass(PretendsCuda)) is fold_in_one_read
    return found


def compile_for_hopper() -> dict[str, Any]:
    """Compile the kernel down to machine code for compute capability 9.0, and ask whether it runs here (no)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hydra_rlhf.model import triton_fold
    from hydra_rlhf.model.online_softmax import RunningSoftmax
    from hydra_rlhf.model.tiled_logprobs import fold_for

    integers, scalars = dict.fromkeys(("row_stride", "num_columns"), "i32"), ("scale", "softcap", "temperature")
    found: dict[str, Any] = {}
    for has_softcap in (False, True):
        for dtype, tile in (("float32", "*fp32"), ("bfloat16", "*bf16")):
            signature = {"tile": tile, **integers, "targets": "*i64"}
            signature |= dict.fromkeys(("peaks", "totals", "weighteds", "target_logits"), "*fp32")
            signature |= dict.fromkeys(scalars, "fp32") | dict.fromkeys(("has_softcap", "block"), "constexpr")
            source = ASTSource(triton_fold._fold, signature, {"has_softcap": has_softcap, "block": triton_fold.BLOCK})
            options = {"enable_fp_fusion": True}
            kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            found[f"{dtype}, softcap {has_softcap}"] = len(kernel.asm["cubin"])
    found["works"] = triton_fold.works_on(CPU)
    found["falls back"] = fold_for(torch.zeros(1, 1).as_subclass(PretendsCuda)) is RunningSoftmax.fold_
    return found


CPU = torch.device("cpu")


class PretendsCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@cache
def run_this_file(part: str, interpreter: str) -> tuple[dict[str, Any], str]:
    """What a part of this file finds in a new process, and what it says on stderr."""
    paths = os.pathsep.join(str(Path(__file__).resolve().parents[2] / name) for name in ("src", "tests"))
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": interpreter, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, part], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_the_kernel_gives_the_same_statistics(shaping, dtype):
    differences = run_this_file("interpret", "1")[0][f"{shaping}, {dtype}"]
    assert len(differences) == len(STATISTICS) + 2
    assert all(worst <= BOUND for worst in differences.values()), differences


def test_the_kernel_is_used_where_it_works():
    found, _ = run_this_file("interpret", "1")
    assert found["works"]
    assert found["chosen on CUDA"]
    assert not found["chosen in float64"]
    assert found["a NaN stays one"]


def test_the_kernel_compiles_for_a_gpu():
    found, _ = run_this_file("compile_for_hopper", "0")
    sizes = [size for name, size in found.items() if "softcap" in name]
    assert len(sizes) == 4
    assert all(size > 1000 for size in sizes)


def test_where_the_kernel_cannot_run_plain_torch_does_and_says_so():
    found, messages = run_this_file("compile_for_hopper", "0")
    assert not found["works"]
    assert found["falls back"]
    assert messages.count("no Triton kernel on cpu, log-probs are computed by plain torch instead: ") == 1


if __name__ == "__main__":
    from jaxtyping import install_import_hook

    # As in the other tests: the shape checks must leave the kernel alone.
    install_import_hook("hydra_rlhf", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
    print(json.dumps({"interpret": interpret, "compile_for_hopper": compile_for_hopper}[sys.argv[1]]()))
