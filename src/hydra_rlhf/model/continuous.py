"""A rollout on the continuous batching of transformers: its thread runs the model, `Sampling` draws the tokens."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from hydra_rlhf.errors import NonFiniteError
from hydra_rlhf.model import attention
from hydra_rlhf.model.draw import GivenLogits
from hydra_rlhf.model.sampling import Sampling, refusal
from hydra_rlhf.model.trunk import Trunk

PAGE_TOKENS = 16
"""Tokens of a page of the cache; what a row leaves free of its last page is wasted."""
SPARE_PAGES = 2
"""Pages that a row may have beside those its tokens need."""
PASS_TOKENS = 512
"""Tokens of a forward; longer prompts are cut. The mask has so many rows, and a column per token of the cache."""
POLL_S = 0.1
"""Between two looks at whether the thread is still there."""
UNSUPPORTED = (AttributeError, LookupError, TypeError, ValueError)
"""What a family raises whose modelling code does not know the paged cache."""
LOGGER = logging.getLogger("ContinuousBatchingLogger")


def decode_continuously(sampling: Sampling, rows: Sequence[int], num_rows: int) -> None:
    """Finish these rows, at most `num_rows` at a time."""
    draws = Draws(sampling)
    try:
        with quiet(), sdpa(sampling.trunk), sampling.trunk.switch.use(sampling.adapter):
            _serve(_manager(sampling, rows, num_rows, draws), sampling, rows, draws)
    except UNSUPPORTED as error:
        if error is draws.error or draws.num_steps:
            raise
        raise refusal(f"{type(sampling.trunk.model).__name__} cannot run on a paged cache ({error})") from error


def _manager(sampling: Sampling, rows: Sequence[int], num_rows: int, draws: "Draws") -> ContinuousBatchingManager:
    """A manager whose cache holds `num_rows` of the longest of these rows, and which draws by `draws` alone."""
    longest = max(sampling.prompt_tokens[row] for row in rows) + sampling.limit
    manager = sampling.trunk.model.init_continuous_batching(  # pyright: ignore[reportCallIssue]
        GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.limit,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=sampling.pad_id,
        ),
        ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=num_rows * (-(-longest // PAGE_TOKENS) + SPARE_PAGES),
            max_batch_tokens=max(PASS_TOKENS, num_rows),
            max_requests_per_batch=num_rows,
            max_memory_percent=1.0,  # only held against the size above
            safety_margin=0.0,  # every row has room for all its tokens
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        ),
    )
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([draws]))
    processors.tensors_required = 1
    manager.logit_processor = processors
    return manager


def _serve(manager: ContinuousBatchingManager, sampling: Sampling, rows: Sequence[int], draws: "Draws") -> None:
    """Hand the rows over and wait for them; what went wrong in the thread is raised here."""
    for row in rows:
        prompt = sampling.prompts[row, sampling.prompt_mask[row]].tolist()
        manager.add_request(prompt, request_id=str(row), max_new_tokens=sampling.limit)
    left, reason = len(rows), "it ended before its time"
    manager.start()
    try:
        while left:
            result = manager.get_result(timeout=POLL_S)
            if result is not None and result.error is None:
                sampling.finished[int(result.request_id)] = True
                left -= 1
            elif result is not None:
                reason = result.error
                break
            elif not manager.is_running():
                break
    finally:
        manager.stop(hard_stop=left > 0)
    error = draws.error or manager.background_thread_status.fatal_error
    if error is not None:
        raise error
    if left:
        raise refusal(f"a request failed: {reason}")


class Draws(ContinuousBatchingLogitsProcessor):
    """Draws a token from each row's logits and leaves nothing else to choose. Called in the manager's thread."""

    def __init__(self, sampling: Sampling) -> None:
        self.supported_kwargs: dict[str, type] = {}
        self.ignored_kwargs: tuple[str, ...] = ()
        self.sampling = sampling
        self.head = GivenLogits(sampling.trunk.lm_head.vocab_size)
        self.num_rows = 0
        """Of the logits at hand, how many are rows': behind them come some of prompts that a pass has cut."""
        self.num_steps = 0
        self.error: BaseException | None = None
        """What was raised here: the thread knows only some errors."""
        self.unchecked = {0, min(1, sampling.limit - 1)}
        """Steps whose logits nobody has compared yet: one from the prompt's pass, one that reads the cache."""

    def fill_defaults(self, int32_tensor: Int[Tensor, " n"]) -> None:
        """Nothing is read where no row is."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Int[Tensor, " n"]:
        """Which row each request is; called before each forward."""
        rows = [int(request.state.request_id) for request in requests_with_new_token]
        self.num_rows = len(rows)
        return torch.tensor(rows, dtype=torch.int32)

    def __call__(self, scores: Float[Tensor, "n v"], tensor_arg: Int[Tensor, " m"]) -> Float[Tensor, "n v"]:
        """Logits of the next tokens -> 0 at the token that was drawn, -inf elsewhere."""
        num = self.num_rows
        if num == 0:
            return scores
        try:
            drawn = self._draw(tensor_arg[:num].long(), scores[:num])
        except BaseException as error:
            self.error = error
            raise RuntimeError("stopped by what is raised in the caller's thread") from None
        self.num_steps += 1
        only = torch.full_like(scores, -torch.inf)
        only[:num].scatter_(1, drawn[:, None], 0.0)
        return only

    def _draw(self, rows: Int[Tensor, " n"], scores: Float[Tensor, "n v"]) -> Int[Tensor, " n"]:
        sampling = self.sampling
        sampling.after_token()
        steps = sampling.num_tokens[rows]
        running = torch.ones_like(rows, dtype=torch.bool)
        drawn, running, finite = sampling.draw(rows, steps, running, scores, self.head)
        if not finite:
            raise NonFiniteError(
                "the model's logits are not finite, so nothing can be sampled; its weights are damaged"
            )
        for step in tuple(self.unchecked):
            at = (steps == step).nonzero()
            if len(at):
                self._compare(int(rows[at[0, 0]]), step, scores[at[0, 0]])
        for i, row in enumerate(rows.tolist() if sampling.stop_strings is not None else ()):
            if running[i] and sampling.ends_in_string(row, int(steps[i])):
                drawn[i] = sampling.stop_ids[0]  # which ends the request; what the row has is kept by then
        return drawn

    def _compare(self, row: int, step: int, scores: Float[Tensor, " v"]) -> None:
        """Raise unless `scores` are what a pass of the trunk over the row so far says.

        A family's code may ignore what it does not know, so that nothing fails and the logits are wrong.
        """
        sampling, trunk = self.sampling, self.sampling.trunk
        prompt = sampling.prompts[row, sampling.prompt_mask[row]]
        tokens = torch.cat([prompt, sampling.tokens[row, :step]])[None]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        hidden = trunk.hidden_states(tokens, mask, adapter=sampling.adapter)
        expected = trunk.lm_head.logits(hidden[:, -1])[0].to(scores.dtype)
        tolerance = torch.finfo(trunk.dtype).eps ** 0.5 * expected.abs().max()
        if (scores - expected).abs().max() > tolerance:
            raise refusal(f"{type(trunk.model).__name__} gives other logits on a paged cache than without one")
        self.unchecked.discard(step)


@contextmanager
def sdpa(trunk: Trunk) -> Iterator[None]:
    """Inside the block attention is transformers' `sdpa`, which its paged cache knows; afterwards this project's."""
    try:
        trunk.model.set_attn_implementation("sdpa")
        yield
    finally:
        trunk.model.set_attn_implementation(attention.NAME)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block the thread prints no traceback of its own: what it meets is raised."""
    before = LOGGER.level
    LOGGER.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        LOGGER.setLevel(before)
