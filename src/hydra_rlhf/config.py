"""Every setting, once: a recipe (YAML) fills a `Recipe`. Docstrings of fields are their `--help`. Imports no torch.

Those of the training stages are in `config_stages.py`.
"""

from typing import Annotated, Literal

from pydantic import Field, dataclasses

from hydra_rlhf.config_checks import STRICT, Bytes, BytesOrAuto, Count, Positive, PositiveInt, Share
from hydra_rlhf.config_stages import HydraSFTConfig as HydraSFTConfig
from hydra_rlhf.config_stages import OptimizerConfig as OptimizerConfig
from hydra_rlhf.config_stages import PPOConfig as PPOConfig
from hydra_rlhf.config_stages import PreferenceConfig as PreferenceConfig
from hydra_rlhf.config_stages import RewardConfig as RewardConfig
from hydra_rlhf.config_stages import SamplingConfig as SamplingConfig
from hydra_rlhf.config_stages import SupervisedConfig as SupervisedConfig
from hydra_rlhf.config_stages import SupervisedLoopConfig as SupervisedLoopConfig


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
    """Share of prompts held out when `test` is not given, by their hash (`world`: by what they ask); never in both."""
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
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base's weights; `auto`: bfloat16 where the device has units for it, else and for `scratch:` float32."""
    device: str = "auto"
    """`auto` (CUDA if there is one, else CPU), `cpu`, `cuda` or `cuda:N`."""
    offline: bool = False
    """Never contact the hub; use local folders and its cache only."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Hold the base's linears in 4 bits (NF4, needs the `quant` extra) or 8 bits; stage 1 then trains a LoRA set."""
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
class MemoryConfig:
    """How much memory a run may use, and what it does to stay within it; nothing here changes what is learned."""

    budget: BytesOrAuto = "auto"
    """Bytes the run may use, e.g. 24GiB; `auto` is most of what is free on the device when the run starts."""
    checkpointing: Literal["none", "layers", "auto"] = "auto"
    """Layers recomputed in backward instead of kept: none, all, or as few as the budget needs."""
    offload: bool = False
    """Keep what checkpointed layers save in pinned host memory (CUDA only): less memory for some transfer."""
    logit_tile: Bytes = "32MiB"
    """Largest block of logits (tokens x vocabulary, float32) that may exist at once."""
    track_tensors: bool = False
    """Count the exact bytes of all tensors in each phase, into memory.json; slows a run down."""


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

    num_threads: Annotated[int, Field(gt=0, le=1024)] | None = None
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
    method: Literal["ppo", "lora-ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo", "dpo", "simpo"] = "hydra-ppo"
    """Which table of roles: ppo, lora-ppo, d-lora-ppo, j-hydra-ppo, hydra-ppo, dpo or simpo."""
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
    """Stage 1 of methods without a joint reward model: the SFT model."""
    reward_model: SupervisedConfig = SupervisedConfig()
    """Stage 1 of methods with a separate reward model: the reward model, started from the SFT model."""
    hydra_sft: HydraSFTConfig = HydraSFTConfig()
    """Stage 1 of the hydra methods: one model with two heads."""
    ppo: PPOConfig = PPOConfig()
    """Stage 2 of the PPO methods; how responses are drawn and scored, of every method."""
    preference: PreferenceConfig = PreferenceConfig()
    """Stage 2 of dpo and simpo."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The evaluation at the end."""
    memory: MemoryConfig = MemoryConfig()
    """How much memory it may use."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Threads, determinism, checkpoints kept."""
