"""What is sampled and what of it is there already; whichever engine decodes, tokens are drawn and kept here.

Each draw uses one uniform number that belongs to (sequence, position), so a response does not depend on what shares its
batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hydra_rlhf.config import SamplingConfig
from hydra_rlhf.errors import ModelError
from hydra_rlhf.model.draw import GivenLogits, draw_in_tiles
from hydra_rlhf.model.heads import LMHead
from hydra_rlhf.model.logprobs import LOGIT_TILE_BYTES
from hydra_rlhf.model.stop_strings import StopStrings
from hydra_rlhf.model.trunk import Trunk


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """Responses as ids, padded on the right to the longest."""

    tokens: Int[Tensor, "b r"]
    """`pad_id` where masked."""
    mask: Bool[Tensor, "b r"]
    """True at sampled tokens, the stop token included."""
    logprobs: Float[Tensor, "b r"]
    """Log-prob of each token at the sampling temperature, before top-k, top-p and min-p; 0 where masked."""
    ended: Bool[Tensor, " b"]
    """True where the response ends in a stop token or a stop string."""


@dataclass(kw_only=True)
class Sampling:
    """What is sampled, and what of it is there: rows are finished one by one, and stay so if memory runs out."""

    trunk: Trunk
    adapter: str | None
    prompts: Int[Tensor, "b p"]
    """Padded on the left."""
    prompt_mask: Bool[Tensor, "b p"]
    uniforms: Float[Tensor, "b n"]
    """One number per response token; n is the most tokens a response has."""
    config: SamplingConfig
    stop_ids: tuple[int, ...]
    pad_id: int
    same_prompt: Sequence[int] | None = None
    """Rows with the same number have the same prompt, and share the pass over it where they start together."""
    stop_strings: StopStrings | None = None
    after_token: Callable[[], None] = lambda: None
    """Called between decode steps; may raise to stop."""
    tile_bytes: int = LOGIT_TILE_BYTES
    """Logits live in tiles of so many bytes."""
    finished: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        (num_rows, limit), device = self.uniforms.shape, self.prompts.device
        # One column more than a response has: what ended rows draw while they wait to leave goes there.
        self.tokens = torch.full((num_rows, limit + 1), self.pad_id, device=device)
        self.logprobs = torch.zeros((num_rows, limit + 1), dtype=wide(self.trunk.dtype), device=device)
        self.num_tokens = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.stops = torch.tensor(self.stop_ids, device=device)
        self.prompt_tokens: list[int] = self.prompt_mask.sum(dim=1).tolist()
        self.finished = [False] * num_rows

    @property
    def limit(self) -> int:
        """The most tokens a response has."""
        return self.uniforms.shape[1]

    def left(self) -> list[int]:
        """The rows that are not finished, longest prompts first, those of one prompt together."""
        same = self.same_prompt or range(len(self.finished))
        rows = [row for row, finished in enumerate(self.finished) if not finished]
        return sorted(rows, key=lambda row: (-self.prompt_tokens[row], same[row], row))

    def start_over(self) -> None:
        """Forget what there is of rows that are not finished."""
        rows = torch.tensor([not finished for finished in self.finished], device=self.tokens.device)
        self.num_tokens[rows] = 0
        self.ended[rows] = False

    def draw(
        self,
        rows: Int[Tensor, " n"],
        steps: Int[Tensor, " n"],
        running: Bool[Tensor, " n"],
        states: Float[Tensor, "n h"],
        head: LMHead | GivenLogits | None = None,
    ) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"], Bool[Tensor, ""]]:
        """Draw token `steps` of each row from what `head` (the trunk's) makes of `states`; keep those of rows that run.

        Returns what was drawn, which rows still run, and whether all logits were finite.
        """
        some_forbidden = self.config.min_response_tokens > 1
        drawn = draw_in_tiles(
            head or self.trunk.lm_head,
            states,
            self.uniforms[rows, steps.clamp(max=self.limit - 1)],
            self.config,
            forbidden=self.stops if some_forbidden else self.stops[:0],
            forbids=steps + 1 < self.config.min_response_tokens,
            tile_bytes=self.tile_bytes,
        )
        at = torch.where(running, steps, self.limit)
        self.tokens[rows, at] = drawn.tokens
        self.logprobs[rows, at] = drawn.logprobs
        self.num_tokens[rows] += running.long()
        stopped = running & torch.isin(drawn.tokens, self.stops)
        self.ended[rows] |= stopped
        return drawn.tokens, running & ~stopped & (steps + 1 < self.limit), drawn.finite

    def ends_in_string(self, row: int, num_known: int) -> bool:
        """Whether a row's text has come to a stop string since its first `num_known` tokens; it ends there then."""
        if self.stop_strings is None:
            return False
        ids = self.tokens[row, : self.num_tokens[row]].tolist()
        num = self.stop_strings.first_end(ids, num_known, least=self.config.min_response_tokens)
        if num is None:
            return False
        self.num_tokens[row] = num
        self.ended[row] = True
        return True

    def result(self) -> SampledTokens:
        """All responses, when all rows are finished."""
        assert all(self.finished)
        width = int(self.num_tokens.max())
        mask = torch.arange(width, device=self.tokens.device) < self.num_tokens[:, None]
        return SampledTokens(
            tokens=torch.where(mask, self.tokens[:, :width], self.pad_id),
            mask=mask,
            logprobs=torch.where(mask, self.logprobs[:, :width], 0.0),
            ended=self.ended,
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what log-probs are kept in."""
    return torch.promote_types(dtype, torch.float32)


def refusal(why: str, engine: str = "generate_batch") -> ModelError:
    """The error of what an engine cannot do."""
    return ModelError(f"ppo.sampling.engine={engine}: {why}; use ppo.sampling.engine=slots")
