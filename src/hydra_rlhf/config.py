"""Every setting, once: a recipe (YAML) fills a `Recipe`. Docstrings of fields are their `--help`. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, dataclasses

from hydra_rlhf.config_checks import STRICT, Betas, Count, Finite, NonNegative, Positive, PositiveInt, Share, check_ppo


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Where rows come from, how they are cut and what happens to bad ones."""

    train: str = "world"
    """Preference data: a local file (JSONL, JSON, CSV, Parquet; also .gz), a hub dataset name, or `world`."""
    test: str | None = None
    """Held-out data in the same form; without it `test_frac` of the prompts of `train` is held out."""
    format: str = "auto"
    """Row format of `train` and `test`; `auto` detects it. `hydra-rlhf data formats` lists the names."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Other column names, as {ours: theirs}, e.g. {prompt: question}; on the command line `prompt question`."""
    prompts: str | None = None
    """Prompt-only data for PPO; without it PPO uses the prompts of `train`."""
    demonstrations: str | None = None
    """Demonstrations (prompt, response) for the plain SFT stage; without it SFT trains on chosen responses."""
    hub_split: str = "train"
    """Which split of a hub dataset to read."""
    hub_test_split: str = "test"
    """Which split of a hub dataset `test` reads."""
    test_frac: Share = 0.1
    """Share of prompts held out by their hash when `test` is not given; no prompt is in both splits."""
    max_rows: PositiveInt | None = None
    """Read at most this many usable rows of each file, in file order."""
    max_prompt_tokens: PositiveInt = 256
    """Longer prompts lose tokens on the left (counted)."""
    max_response_tokens: PositiveInt = 256
    """Longer responses in the data lose tokens on the right, and then their EOS (counted)."""
    max_row_bytes: PositiveInt = 1_000_000
    """A row larger than this is a bad row."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: stop with file and line before any weight is loaded, or be skipped and counted."""
    chat_template: Literal["auto", "tokenizer", "plain", "none"] = "auto"
    """`auto`: the tokenizer's; without one `plain` (`User:`/`Assistant:`) for messages, `none` (as is) for strings."""
    world_pairs: PositiveInt = 6000
    """Number of preference pairs drawn from the built-in world (train and test together)."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The base model that every role starts from."""

    path: str = "scratch:tiny"
    """Hub name, local folder, or `scratch:tiny` / `scratch:small` (a Llama from nothing, with its own tokenizer)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) to pin."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the base's weights; heads and their statistics are always float32."""
    device: str = "auto"
    """`auto` (CUDA if there is one, else CPU), `cpu`, `cuda` or `cuda:N`."""
    offline: bool = False
    """Never contact the hub; use local folders and its cache only."""
    gradient_checkpointing: bool = False
    """Recompute each layer in backward instead of keeping its activations: less memory, one more forward."""
    scratch_vocab_size: Annotated[int, Field(ge=300)] = 512
    """Vocabulary of the byte-level BPE that `scratch:` models train on the data."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """The low-rank adapters of stage 2 (and of stage 1 where `tuning` is `lora`)."""

    rank: PositiveInt = 16
    """Rank r of each update (the paper's runs used 128)."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank; learning rates are stated for a scale of 2."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("all-linear",)
    """`all-linear`, or the last names of the linears to adapt, e.g. [q_proj, v_proj]."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype the adapters are stored and trained in; they compute in the base's dtype."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class StartConfig:
    """Finished stage-1 models to start from instead of training them; a stage given here is not run."""

    sft: str | None = None
    """Folder or hub name of an SFT model."""
    sft_adapter: str | None = None
    """PEFT adapter folder, merged once into the base at load; counts as the SFT model."""
    reward_model: str | None = None
    """Reward model folder: ours, or any sequence-classification model with one label and the same tokenizer."""
    hydra_sft: str | None = None
    """A `hydra_sft` folder of another run."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """What all stages say about their forwards and their optimizer (AdamW)."""

    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens per forward; a memory knob only, never changes a loss."""
    warmup_frac: Share = 0.05
    """Share of the steps in which learning rates rise linearly from zero."""
    adam_betas: Betas = (0.9, 0.95)
    """Adam's two decay rates."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, applied to every trained tensor."""
    max_grad_norm: Positive = 1.0
    """Each optimizer's gradients are scaled down to this global norm."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class SupervisedConfig(OptimizerConfig):
    """One supervised stage: SFT or reward model."""

    tuning: Literal["full", "lora"] = "full"
    """Train all weights, or one LoRA set that is merged into a new base when the stage ends."""
    num_epochs: Positive = 1.0
    """Passes over the training pairs; fractions are allowed."""
    learning_rate: Positive | None = None
    """Peak learning rate; default 1e-5 for `full`, 2e-4 for `lora`."""
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
class HydraSFTConfig(SupervisedConfig):
    """Joint SFT and reward training: loss = cross entropy + reward_loss_coef * ranking loss."""

    reward_loss_coef: NonNegative = 0.1
    """Weight of the ranking loss (the paper's gamma)."""


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
    stop_token_ids: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Ids that end a response; default: the model's generation config, else the tokenizer's EOS."""
    batch_rows: Count = 0
    """Responses decoded together; 0 = the whole rollout batch. A memory knob only."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardConfig:
    """Where scores come from and what is done to them before they become rewards."""

    reward_fn: str | None = None
    """Python function `(prompts, responses, **columns) -> floats (or per-token lists)`, as `module:function`."""
    reward_fn_coef: Finite = 1.0
    """Weight of the reward function's scores."""
    reward_model_coef: Finite = 1.0
    """Weight of the reward head's scores; 0 leaves the reward role out (needs `reward_fn`)."""
    clip: Positive | None = None
    """Scores are held in [-clip, clip] after normalisation; none = not clipped."""
    normalize: bool = False
    """Divide scores by their running standard deviation over the run (the mean is kept)."""
    missing_eos_penalty: Finite = 0.0
    """Subtracted from the score of a response that has no stop token."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class PPOConfig(OptimizerConfig):
    """Stage 2."""

    num_steps: PositiveInt = 100
    """PPO steps; each samples, scores and learns from one rollout batch."""
    rollout_batch_size: PositiveInt = 64
    """Prompts per PPO step."""
    samples_per_prompt: PositiveInt = 1
    """Responses drawn for each prompt."""
    num_epochs: PositiveInt = 2
    """Passes over each rollout."""
    minibatch_size: PositiveInt = 32
    """Sequences per optimizer step; must divide rollout_batch_size * samples_per_prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""
    reward: RewardConfig = RewardConfig()
    """Where scores come from."""
    kl_coef: NonNegative = 0.02
    """Reward lost (or loss added) per nat of KL(actor || reference)."""
    kl_estimator: Literal["k1", "k2", "k3", "none"] | None = None
    """Per-token KL (Schulman 2020), l = log-ratio: k1 = l, k2 = l^2 / 2, k3 = e^-l - 1 + l; default k1 (loss: k2)."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Subtract the KL from each token's reward, or add it to the policy loss."""
    kl_target: Positive | None = None
    """Nats per response that an adaptive kl_coef steers to (Ziegler et al. 2019); none = fixed coefficient."""
    kl_horizon: PositiveInt = 10_000
    """Sequences over which the adaptive coefficient reacts."""
    max_update_kl: Positive | None = None
    """End a step's update early when the mean KL(old actor || new actor) per token passes this; none = never."""
    discount: Share = 1.0
    """Gamma of the returns."""
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
    """Rollout samples written to samples.jsonl each step."""
    __post_init__ = check_ppo


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """The evaluation at the end of a run (and of `hydra-rlhf eval`)."""

    num_prompts: PositiveInt = 256
    """Held-out prompts for which actor and reference both sample a response."""
    checkpoint: Literal["last", "best"] = "last"
    """Which actor is evaluated: the last one, or the one with the best held-out score during PPO."""
    num_samples: Count = 32
    """Pairs of responses kept as text for the report."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class RuntimeConfig:
    """The machine's side of a run; nothing here changes what is learned, except by summation order."""

    num_threads: PositiveInt | None = None
    """CPU threads of torch; none = its own default. Stored in the run, because it changes summation order."""
    deterministic: bool = True
    """Ask torch for deterministic kernels, so that a resumed run repeats bit for bit."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept per stage (the best one is kept besides)."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """One complete run: data, model, stage 1, stage 2, evaluation, report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run folder inside `output_dir`."""
    output_dir: str = "runs"
    """Folder that holds run folders."""
    method: Literal["ppo", "lora-ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo"] = "hydra-ppo"
    """Which table of roles: ppo, lora-ppo, d-lora-ppo, j-hydra-ppo or hydra-ppo."""
    seed: Count = 0
    """Seed of every random stream of the run."""
    data: DataConfig = DataConfig()
    """Where rows come from."""
    model: ModelConfig = ModelConfig()
    """The base model."""
    lora: LoraConfig = LoraConfig()
    """The adapters."""
    start: StartConfig = StartConfig()
    """Finished stage-1 models to start from."""
    sft: SupervisedConfig = SupervisedConfig()
    """Stage 1 of methods with a separate reward model: the SFT model."""
    reward_model: SupervisedConfig = SupervisedConfig()
    """Stage 1 of methods with a separate reward model: the reward model, started from the SFT model."""
    hydra_sft: HydraSFTConfig = HydraSFTConfig()
    """Stage 1 of the hydra methods: one model with two heads."""
    ppo: PPOConfig = PPOConfig()
    """Stage 2."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The evaluation at the end."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Threads, determinism, checkpoints kept."""
