"""Decoding by continuous batching of transformers, behind `generate_batch` of its models; refusals by name."""

import torch
import transformers

from hydra_rlhf.model import attention
from hydra_rlhf.model.sampling import Sampling, refusal

OLDEST = (5, 24)
"""The first transformers this was tried with; what its continuous batching offers changes from version to version."""
AVAILABLE = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= OLDEST


@torch.no_grad()
def generate_batch(sampling: Sampling, num_rows: int) -> None:
    """Finish all rows that are not finished, at most `num_rows` at a time, on a paged cache.

    Raises `ModelError` for a model that continuous batching does not compute as this project does.
    """
    model = sampling.trunk.model
    if not AVAILABLE:
        oldest = ".".join(map(str, OLDEST))
        raise refusal(f"it needs transformers {oldest} or newer, and this is {transformers.__version__}")
    if model.config._attn_implementation != attention.NAME:
        raise refusal(f"{type(model).__name__} has attention of its own, which a paged cache would leave out")
    from hydra_rlhf.model.continuous import decode_continuously

    sampling.start_over()
    rows = sampling.left()
    if rows:
        decode_continuously(sampling, rows, min(num_rows, len(rows)))
