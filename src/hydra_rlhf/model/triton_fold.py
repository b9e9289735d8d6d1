"""`RunningSoftmax.fold_` as one Triton kernel, which reads a tile once where plain torch goes over it six times.

Imported only when there is a tile on a CUDA device: Triton is optional.
"""

import logging
import subprocess
from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from hydra_rlhf.model.online_softmax import LogitShaping, RunningSoftmax

log = logging.getLogger(__name__)

BLOCK = 1024
"""Columns of a row that are looked at together."""


def fold_in_one_read(
    softmax: RunningSoftmax, tile: Float[Tensor, "n c"], targets: Int[Tensor, " n"], shaping: LogitShaping
) -> None:
    """Fold in the columns of one tile of products (float32 or half precision), which stays as it is."""
    assert tile.stride(1) == 1
    with torch.cuda.device_of(tile):
        _fold[(tile.shape[0],)](
            tile,
            tile.stride(0),
            tile.shape[1],
            targets,
            softmax.peak,
            softmax.total,
            softmax.weighted,
            softmax.target_logit,
            float(shaping.scale),
            float(shaping.softcap or 1.0),
            float(shaping.temperature),
            has_softcap=shaping.softcap is not None,
            block=BLOCK,
            # Named, because its default differs between versions of Triton.
            enable_fp_fusion=True,  # pyright: ignore[reportCallIssue]
        )


@cache
def works_on(device: torch.device) -> bool:
    """Whether the kernel can be built and run here; says why where it cannot. Triton needs a C compiler, for one."""
    softmax = RunningSoftmax.empty(1, dtype=torch.float32, device=device)
    tile, targets = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device)
    try:
        fold_in_one_read(softmax, tile, targets, LogitShaping(scale=1.0, softcap=None, temperature=1.0))
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError, triton.TritonError) as error:
        log.warning("no Triton kernel on %s, log-probs are computed by plain torch instead: %s", device, error)
        return False
    return True


@triton.jit
@no_type_check
def _fold(
    tile,
    row_stride,
    num_columns,
    targets,
    peaks,
    totals,
    weighteds,
    target_logits,
    scale,
    softcap,
    temperature,
    has_softcap: tl.constexpr,
    block: tl.constexpr,
):
    """One row of the tile; the formulas are those of `RunningSoftmax.fold_`."""
    row = tl.program_id(0)
    tile += row.to(tl.int64) * row_stride
    target = tl.load(targets + row)
    peak, total = tl.load(peaks + row), tl.load(totals + row)
    weighted, target_logit = tl.load(weighteds + row), tl.load(target_logits + row)
    for start in range(0, num_columns, block):
        column = start + tl.arange(0, block)
        inside = column < num_columns
        logit = tl.load(tile + column, mask=inside, other=0.0).to(tl.float32) * scale
        if has_softcap:
            logit = softcap * _tanh(tl.div_rn(logit, softcap))
        logit = tl.div_rn(logit, temperature)
        target_logit += tl.sum(tl.where(inside & (column == target), logit, 0.0))
        logit = tl.where(inside, logit, -float("inf"))
        old_peak = peak
        peak = tl.maximum(peak, tl.max(logit))
        shift = old_peak - peak
        below = tl.where(inside, logit - peak, 0.0)
        exponential = tl.where(inside, tl.exp(below), 0.0)
        weighted = (weighted + shift * total) * tl.exp(shift) + tl.sum(exponential * below)
        total = total * tl.exp(shift) + tl.sum(exponential)
    tl.store(peaks + row, peak)
    tl.store(totals + row, total)
    tl.store(weighteds + row, weighted)
    tl.store(target_logits + row, target_logit)


@triton.jit
@no_type_check
def _tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|); near zero, where that would cancel, the series up to x^7."""
    magnitude = tl.abs(x)
    decay = tl.exp(-2.0 * magnitude)
    square = x * x
    series = magnitude * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    tanh = tl.where(magnitude < 0.2, series, tl.div_rn(1.0 - decay, 1.0 + decay))
    return tl.where(x < 0.0, -tanh, tanh)
