"""Four questions to a freshly loaded model: a family that answers one of them wrong would train silently wrong."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from hydra_rlhf.errors import ModelError
from hydra_rlhf.model.trunk import Trunk

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.15, torch.float64: 1e-2}
"""Largest difference allowed, as a share of the largest entry. Wrong families are off by far more."""


@torch.no_grad()
def check_trunk(trunk: Trunk, path: str) -> None:
    """Raise `ModelError` where a model does not do with left padding, a cache and its head what this package needs.

    Six tokens through the model a few times: its own logits equal ours; a later token does not change earlier states;
    left padding changes nothing; a cached step equals the full pass.
    """
    num_ids = trunk.num_embeddings
    ids = (torch.arange(6, device=trunk.device)[None] * 7 + 5) % num_ids
    mask = torch.ones_like(ids, dtype=torch.bool)
    try:
        states = trunk.hidden_states(ids, mask, adapter=None)
        other = trunk.hidden_states(torch.cat([ids[:, :5], (ids[:, 5:] + 1) % num_ids], 1), mask, adapter=None)
        left = torch.cat([torch.zeros_like(mask[:, :3]), mask], 1)
        padded = trunk.hidden_states(torch.cat([ids[:, :3], ids], 1), left, adapter=None)[:, 3:]
        cache = DynamicCache()
        trunk.hidden_states(ids[:, :5], mask[:, :5], adapter=None, cache=cache)
        step = trunk.hidden_states(ids[:, 5:], mask, adapter=None, cache=cache)
        answers = {
            "sees later tokens": (other[:, :5], states[:, :5]),
            "gives other states under left padding": (padded, states),
            "gives other states with a key/value cache": (step, states[:, 5:]),
        }
        if not isinstance(trunk.model.get_output_embeddings(), nn.Identity):
            with trunk.switch.use(None):
                logits = trunk.model(input_ids=ids).logits
            answers["does more to its logits than its head"] = (trunk.lm_head.logits(states[0])[None], logits)
    except Exception as error:
        raise ModelError(
            f"{path}: {type(trunk.model).__name__} cannot be used as a decoder here ({type(error).__name__}: {error})"
        ) from error
    for failing, (found, expected) in answers.items():
        if not close(found, expected):
            raise ModelError(f"{path}: {type(trunk.model).__name__} {failing}; this family is not supported")


def close(found: Float[Tensor, "*n"], expected: Float[Tensor, "*n"]) -> bool:
    """Equal within the tolerance of the model's dtype; NaN on both sides is the weights' matter and passes."""
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference.isnan()) or bool(difference <= TOLERANCE[found.dtype] * expected.float().abs().max())
