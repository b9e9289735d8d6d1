"""Decoding by `generate` of transformers: the same draws as in slots, in groups of rows on a cache that grows."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from hydra_rlhf.errors import NonFiniteError
from hydra_rlhf.model.draw import GivenLogits
from hydra_rlhf.model.sampling import Sampling


@torch.no_grad()
def generate(sampling: Sampling, num_rows: int) -> None:
    """Finish all rows that are not finished, in groups of `num_rows`."""
    sampling.start_over()
    rows = sampling.left()
    for start in range(0, len(rows), num_rows):
        group = rows[start : start + num_rows]
        _generate_group(sampling, torch.tensor(group, device=sampling.prompts.device))
        for row in group:
            sampling.finished[row] = True


def _generate_group(sampling: Sampling, rows: Int[Tensor, " n"]) -> None:
    width = int(sampling.prompt_mask[rows].sum(dim=1).max())
    draws = Draws(sampling, rows)
    trunk = sampling.trunk
    with trunk.switch.use(sampling.adapter):
        trunk.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=sampling.prompts[rows, -width:],
            attention_mask=sampling.prompt_mask[rows, -width:].long(),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.limit,
                eos_token_id=list(sampling.stop_ids),
                pad_token_id=sampling.pad_id,
            ),
            logits_processor=LogitsProcessorList([draws]),
            stopping_criteria=StoppingCriteriaList([Ended(draws)]),
        )
    if not draws.finite:
        raise NonFiniteError("the model's logits are not finite, so nothing can be sampled; its weights are damaged")


class Draws(LogitsProcessor):
    """Draws a token from each row's logits and leaves nothing else to choose."""

    def __init__(self, sampling: Sampling, rows: Int[Tensor, " n"]) -> None:
        self.sampling, self.rows = sampling, rows
        self.head = GivenLogits(sampling.trunk.lm_head.vocab_size)
        self.step = 0
        self.running = torch.ones_like(rows, dtype=torch.bool)
        self.finite = torch.ones((), dtype=torch.bool, device=rows.device)

    def __call__(self, input_ids: Int[Tensor, "n s"], scores: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """Logits of the next tokens -> 0 at the token that was drawn, -inf elsewhere."""
        del input_ids
        self.sampling.after_token()
        steps = torch.full_like(self.rows, self.step)
        drawn, self.running, finite = self.sampling.draw(self.rows, steps, self.running, scores, self.head)
        self.finite &= finite
        self.step += 1
        for i, row in enumerate(self.rows.tolist() if self.sampling.stop_strings is not None else ()):
            if self.running[i] and self.sampling.ends_in_string(row, self.step - 1):
                self.running[i] = False
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


class Ended(StoppingCriteria):
    """Says which rows have ended, by what `Draws` knows."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Int[Tensor, "n s"], scores: Any, **_: Any
    ) -> Bool[Tensor, " n"]:
        """True where a row needs no further token."""
        del input_ids, scores
        return ~self.draws.running
