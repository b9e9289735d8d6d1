"""The settings of the stages that train; `config.py` has the rest and the recipe that holds them all. No torch."""

from typing import Annotated, Literal

from pydantic import Field, dataclasses

from hydra_rlhf.config_checks import STRICT, Betas, Count, Finite, NonNegative, Positive, PositiveInt, Share, check_ppo
from hydra_rlhf.config_rewards import Source, check_names


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """What all stages say about their forwards and their optimizer (AdamW)."""

    micro_batch_tokens: PositiveInt | None = None
    """Padded tokens per forward, a memory knob that never changes a loss; none = what the memory plan finds."""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """AdamW with float32 moments, or with moments in 8-bit blocks (bitsandbytes, `pip install hydra-rlhf[quant]`)."""
    warmup_frac: Share = 0.05
    """Share of the steps in which learning rates rise linearly from zero."""
    adam_betas: Betas = (0.9, 0.95)
    """Adam's two decay rates."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, applied to every trained tensor."""
    max_grad_norm: Positive = 1.0
    """Each optimizer's gradients are scaled down to this global norm."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class SupervisedLoopConfig(OptimizerConfig):
    """What all supervised stages say about their passes over the data."""

    num_epochs: Positive = 1.0
    """Passes over the training pairs; fractions are allowed."""
    batch_size: PositiveInt = 32
    """Pairs (or demonstrations) per optimizer step."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up; linear and cosine end at zero."""
    eval_every: Count = 50
    """Optimizer steps between evaluations on held-out data; 0 = only at the end."""
    max_eval_rows: PositiveInt = 512
    """Held-out pairs used for evaluation during training."""
    save_every: Count = 100
    """Optimizer steps between checkpoints; 0 = only at the end of the stage."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class SupervisedConfig(SupervisedLoopConfig):
    """One stage-1 model: SFT or reward model."""

    tuning: Literal["full", "lora"] = "full"
    """Train all weights, or one LoRA set that is merged into a new base when the stage ends."""
    learning_rate: Positive | None = None
    """Peak learning rate; default 1e-5 for `full`, 2e-4 for `lora`."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class HydraSFTConfig(SupervisedConfig):
    """Joint SFT and reward training: loss = cross entropy + reward_loss_coef * ranking loss."""

    reward_loss_coef: NonNegative = 0.1
    """Weight of the ranking loss (the paper's gamma)."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class PreferenceConfig(SupervisedLoopConfig):
    """Preference training: the actor's LoRA set learns from the training pairs themselves."""

    learning_rate: Positive = 5e-5
    """Peak learning rate of the actor's LoRA set."""
    dpo_beta: Positive = 0.1
    """Of dpo: reward per nat of log-ratio between actor and reference; small = far from the reference (its beta)."""
    simpo_beta: Positive = 2.0
    """Of simpo: reward per nat of mean log-prob of a response's tokens (its beta)."""
    simpo_gamma: NonNegative = 1.0
    """Of simpo: the reward by which chosen should be ahead of rejected (its gamma); about half of simpo_beta."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs whose sides are taken to be the wrong way round (conservative DPO); 0 = trust the labels."""
    num_eval_prompts: PositiveInt = 64
    """Held-out prompts that the actor answers at each evaluation during training, as `ppo.sampling` says."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplingConfig:
    """How responses are drawn; log-probs are taken at the same temperature."""

    max_response_tokens: PositiveInt = 128
    """Responses end here at the latest."""
    min_response_tokens: PositiveInt = 1
    """Stop tokens cannot be drawn before this many tokens, the stop token included; above 1 biases the ratio."""
    temperature: Annotated[float, Field(ge=1e-3, allow_inf_nan=False)] = 1.0
    """Logits are divided by this in sampling and in log-probs; must be positive."""
    top_k: Count = 0
    """Keep the k likeliest tokens; 0 = all. Anything else biases the PPO ratio."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens with this much probability; 1 = all. Anything else biases the PPO ratio."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Keep tokens at least this share as likely as the likeliest; 0 = all. Anything else biases the PPO ratio."""
    stop_token_ids: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Ids that end a response; default: the model's generation config, else the tokenizer's EOS."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a response as well; what it is judged by is the text before them."""
    engine: Literal["slots", "graphs", "generate", "generate_batch"] = "slots"
    """`slots`: this project's decoding; `graphs`: that in CUDA graphs; `generate`, `generate_batch`: of transformers.

    All draw the same tokens. `graphs` refuses models that look back less far than a rollout is wide; `generate_batch`
    (transformers 5.24 or newer) those whose attention cannot read its paged cache.
    """
    batch_rows: PositiveInt | None = None
    """Responses decoded together, a memory knob only; none = as many of the rollout batch as the memory plan allows."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardConfig:
    """Where scores come from and what is done to them before they become rewards."""

    reward_fn: str | None = None
    """Python function `(prompts, responses, **columns) -> floats (or per-token lists)`, as `module:function`."""
    reward_fn_coef: Finite = 1.0
    """Weight of the reward function's scores."""
    reward_model_coef: Finite = 1.0
    """Weight of the reward head's scores; 0 leaves the reward role out (needs `reward_fn` or `sources`)."""
    sources: tuple[Source, ...] = ()
    """Further sources of scores, each with a name, a kind and a weight; listed in a recipe only (docs/rewards.md)."""
    max_failed_frac: Share = 0.25
    """A step raises where more than this share of its responses could not be scored by every source."""
    clip: Positive | None = None
    """Scores are held in [-clip, clip] after normalisation; none = not clipped."""
    normalize: bool = False
    """Divide scores by their running standard deviation over the run (the mean is kept)."""
    missing_eos_penalty: Finite = 0.0
    """Subtracted from the score of a response that has no stop token."""

    def __post_init__(self) -> None:
        check_names(self.sources)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class PPOConfig(OptimizerConfig):
    """Stage 2."""

    num_steps: PositiveInt = 100
    """PPO steps; each samples, scores and learns from one rollout batch."""
    rollout_batch_size: PositiveInt = 64
    """Prompts per PPO step."""
    samples_per_prompt: PositiveInt = 1
    """Responses drawn for each prompt; `rloo`, `grpo` and `dr-grpo` compare them and need at least 2."""
    num_epochs: PositiveInt = 2
    """Passes over each rollout."""
    minibatch_size: PositiveInt = 32
    """Sequences per optimizer step; must divide rollout_batch_size * samples_per_prompt."""
    advantage_estimator: Literal["gae", "rloo", "grpo", "dr-grpo", "remax", "reinforce++"] = "gae"
    """`gae` learns from a critic; the others have none, and no memory or time for one (docs/estimators.md)."""
    scoring: Literal["auto", "separate"] = "auto"
    """`auto`: with one epoch and one minibatch actor and critic learn from the forward that scores; or always apart."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""
    reward: RewardConfig = RewardConfig()
    """Where scores come from."""
    kl_coef: NonNegative = 0.02
    """Reward lost (or loss added) per nat of KL(actor || reference)."""
    kl_estimator: Literal["k1", "k2", "k3", "none"] | None = None
    """Per-token KL, l = log-ratio: k1 = l, k2 = l^2 / 2, k3 = e^-l - 1 + l; default k1, in the loss k2 or k3."""
    kl_in: Literal["reward", "loss"] | None = None
    """Subtract the KL from each token's reward, or add it to the policy loss; default reward (GRPO, Dr. GRPO: loss)."""
    kl_target: Positive | None = None
    """Nats per response that an adaptive kl_coef steers to (Ziegler et al. 2019); none = fixed coefficient."""
    kl_horizon: PositiveInt = 10_000
    """Sequences over which the adaptive coefficient reacts."""
    max_update_kl: Positive | None = None
    """End a step's update early when the mean KL(old actor || new actor) per token passes this; none = never."""
    discount: Share = 1.0
    """Gamma of the returns; estimators that take a response's rewards as one sum have none."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation."""
    clip_range: Positive = 0.2
    """Epsilon of the clipped surrogate: the ratio is held in [1 - epsilon, 1 + epsilon]."""
    value_clip_range: Positive | None = 0.2
    """New values are held within this distance of the old ones in the value loss; none = not clipped."""
    value_coef: NonNegative = 0.5
    """Weight of the value loss where actor and critic share one LoRA set; unused elsewhere (own optimizers)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    critic_warmup_steps: Count = 0
    """First PPO steps in which only the critic learns (with a joined LoRA set: only the value head)."""
    actor_learning_rate: Positive = 1e-4
    """Peak rate of the actor's LoRA set."""
    critic_learning_rate: Positive = 1e-4
    """Peak rate of the critic's LoRA set."""
    value_head_learning_rate: Positive = 1e-4
    """Peak rate of the value head."""
    full_learning_rate_scale: Positive = 0.1
    """A role without a LoRA set trains its whole trunk at its rate times this."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rates after warm-up; linear and cosine end at zero."""
    eval_every: Count = 10
    """PPO steps between evaluations on held-out prompts; 0 = never."""
    num_eval_prompts: PositiveInt = 64
    """Held-out prompts used for evaluation during training."""
    save_every: Count = 10
    """PPO steps between checkpoints; 0 = only at the end."""
    num_logged_samples: Count = 4
    """Rollout samples written to samples.jsonl each step, with their tokens; the actor looks at them once more."""
    __post_init__ = check_ppo

    @property
    def single_pass(self) -> bool:
        """One epoch of one minibatch: the policy that learns is the one that scored."""
        return self.num_epochs == 1 and self.minibatch_size == self.rollout_batch_size * self.samples_per_prompt
