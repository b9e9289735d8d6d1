"""The loss of a plain reward model: Bradley–Terry on pairs (rows: the chosen ones, then the rejected ones)."""

from hydra_rlhf.algorithms.losses import ranking_loss
from hydra_rlhf.records import LossOutput, RoleOutput, TokenBatch
from hydra_rlhf.stages.examples import BatchCounts


def loss(outputs: dict[str, RoleOutput], _batch: TokenBatch, counts: BatchCounts) -> LossOutput:
    """Mean of -log sigmoid(r(chosen) - r(rejected)) over the whole batch's pairs."""
    scores = outputs["reward"].scores
    assert scores is not None
    chosen, rejected = scores.chunk(2)
    output = ranking_loss(chosen, rejected, num_pairs=counts.num_examples)
    return LossOutput(loss=output.loss, metrics=output.metrics | {"loss/reward": output.loss.detach()})
