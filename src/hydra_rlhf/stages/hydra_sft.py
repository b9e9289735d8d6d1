"""The loss of Hydra-SFT: one decoder, two heads, loss = sft + reward_loss_coef * reward (Santacroce et al. 2023)."""

from functools import partial

from hydra_rlhf.algorithms.losses import sft_loss
from hydra_rlhf.records import LossOutput, RoleOutput, TokenBatch
from hydra_rlhf.stages import reward_model
from hydra_rlhf.stages.examples import BatchCounts, chosen_mask
from hydra_rlhf.stages.supervised import Loss


def loss(
    outputs: dict[str, RoleOutput], batch: TokenBatch, counts: BatchCounts, *, reward_loss_coef: float
) -> LossOutput:
    """Cross entropy on chosen responses plus the weighted ranking loss of chosen against rejected."""
    logprobs = outputs["reference"].logprobs
    assert logprobs is not None
    sft = sft_loss(logprobs, chosen_mask(batch), num_tokens=counts.num_lm_tokens)
    reward = reward_model.loss(outputs, batch, counts)
    return LossOutput(
        loss=sft.loss + reward_loss_coef * reward.loss,
        metrics=reward.metrics | {"loss/sft": sft.loss.detach()},
    )


def with_coef(reward_loss_coef: float) -> Loss:
    """The loss with its coefficient filled in."""
    return partial(loss, reward_loss_coef=reward_loss_coef)
