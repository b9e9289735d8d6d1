"""Every batch that crosses a file border, with shapes: b batch, p prompt, r response, s = p + r."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Prompts and responses as one block. Column t of the last r columns is response token t.

    Prompts are padded on the left and responses on the right, in training and in rollouts alike, so that the
    response starts at the same column in every row. Which entries count is carried here and never read off pad ids.
    """

    tokens: Int[Tensor, "b s"]
    """Token ids; any valid id where `attention_mask` is False."""
    attention_mask: Bool[Tensor, "b s"]
    """True at real tokens of prompt and response."""
    response_mask: Bool[Tensor, "b r"]
    """True at response tokens that count, the stop token included; a prefix of each row."""

    @property
    def num_prompt_columns(self) -> int:
        """p: the columns before the response."""
        return self.tokens.shape[1] - self.response_mask.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleOutput:
    """What one role's head says about one batch; the fields its head does not give are None."""

    logprobs: Float[Tensor, "b r"] | None = None
    """`lm` head: log-prob of each response token; 0 where masked."""
    entropy: Float[Tensor, "b r"] | None = None
    """`lm` head: entropy in nats of the distribution each response token was drawn from; 0 where masked."""
    values: Float[Tensor, "b r"] | None = None
    """`value` head: value of the state before each response token."""
    scores: Float[Tensor, " b"] | None = None
    """`reward` head: score at the last counted response token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Prompts of one PPO step or evaluation, padded on the left."""

    tokens: Int[Tensor, "b p"]
    """Token ids; any valid id where `attention_mask` is False."""
    attention_mask: Bool[Tensor, "b p"]
    """True at real tokens."""
    prompt_index: Int[Tensor, " b"]
    """Row of each prompt in its dataset; seeds its sampling."""
    sample_index: Int[Tensor, " b"]
    """Which of a prompt's several samples a row is; seeds its sampling."""
    texts: list[str]
    """The prompts as the model reads them, templates included."""
    originals: list[Any]
    """The prompts as the data has them: strings, or messages."""
    columns: dict[str, list[Any]]
    """Further columns of the dataset, handed to reward functions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """Sampled responses joined to their prompts."""

    batch: TokenBatch
    logprobs: Float[Tensor, "b r"]
    """Log-prob of each response token as it was sampled, at the sampling temperature; 0 where masked."""
    texts: list[str]
    """The responses as text, without the stop token."""
    ended: Bool[Tensor, " b"]
    """True where the response ends in a stop token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One batch of sampled responses with what every role says about them.

    Example with b = 2, p = 2, r = 3: prompts `a b` and `c`, responses `x <eos>` and `y z w` (cut, no eos):
    tokens [[a, b, x, eos, .], [., c, y, z, w]], response_mask [[1, 1, 0], [1, 1, 1]], ended [1, 0].
    """

    batch: TokenBatch
    """Prompts and sampled responses."""
    prompts: PromptBatch
    """Where the rows come from."""
    responses: list[str]
    """The responses as text, without the stop token."""
    ended: Bool[Tensor, " b"]
    """True where the response ends in a stop token."""
    logprobs: Float[Tensor, "b r"]
    """Log-prob of each response token under the actor that sampled it; 0 where masked. From the training path where
    the actor has scored the rollout, else from sampling."""
    ref_logprobs: Float[Tensor, "b r"]
    """The same under the reference."""
    values: Float[Tensor, "b r"]
    """The critic's value of the state before response token t."""
    entropy: Float[Tensor, "b r"]
    """Entropy in nats of the actor's distribution that response token t was drawn from; 0 where masked."""
    scores: Float[Tensor, " b"]
    """Score of each response before shaping: all sources, weighted; only differences count. NaN where not `valid`."""
    dense_rewards: Float[Tensor, "b r"]
    """Per-token rewards of a reward function that returns lists; 0 elsewhere. Their sum is part of `scores`."""
    valid: Bool[Tensor, " b"]
    """False where a source failed whose failures are masked: such a row is no part of anything that is learned."""
    baselines: Float[Tensor, " b"]
    """What the greedy response to each row's prompt scored, as shaped as rewards are, where the advantage estimator
    compares with it (ReMax); 0 elsewhere."""
    source_scores: dict[str, Tensor]
    """What each source (`head`, `reward_fn`, those of the recipe) says by itself, {name: [b]}; NaN where it failed."""

    @property
    def is_scored(self) -> bool:
        """Whether there is anything that scores; else `scores` are zeros that mean nothing."""
        return bool(self.source_scores)

    @property
    def learn_mask(self) -> Bool[Tensor, "b r"]:
        """True at response tokens that are learned from: those that count, of valid rows."""
        return self.batch.response_mask & self.valid[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOTargets:
    """What a rollout is learned from."""

    rewards: Float[Tensor, "b r"]
    """Score at the last counted token, per-token rewards, minus the KL where it belongs to the reward."""
    advantages: Float[Tensor, "b r"]
    """As the policy loss takes them (GAE: standardised once over all counted tokens of the rollout); 0 where masked."""
    returns: Float[Tensor, "b r"]
    """The critic's target; 0 where there is no critic."""
    kl_coef: float
    """Weight of a KL term in the loss; 0 where the KL is in the rewards, or nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What every loss returns: a scalar to differentiate and detached numbers to log.

    Metrics are already divided by the whole minibatch's count, so micro-batches add up; a key that ends in `_max` or
    `_min` is combined by that instead.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
