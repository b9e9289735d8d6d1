"""The loss of plain SFT: cross entropy on the response tokens and their EOS."""

from hydra_rlhf.algorithms.losses import sft_loss
from hydra_rlhf.records import LossOutput, RoleOutput, TokenBatch
from hydra_rlhf.stages.examples import BatchCounts


def loss(outputs: dict[str, RoleOutput], batch: TokenBatch, counts: BatchCounts) -> LossOutput:
    """Mean cross entropy over the whole batch's response tokens, in nats."""
    logprobs = outputs["reference"].logprobs
    assert logprobs is not None
    output = sft_loss(logprobs, batch.response_mask, num_tokens=counts.num_lm_tokens)
    return LossOutput(loss=output.loss, metrics={"loss/sft": output.loss.detach()})
