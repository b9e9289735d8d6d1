"""The Python functions: the stages on a model in memory, without a recipe or a run folder."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra_rlhf.config import DataConfig, HydraSFTConfig, MemoryConfig, PPOConfig, PreferenceConfig
from hydra_rlhf.data.formats import ChatFormat, chat_format
from hydra_rlhf.data.sources import PreferencePair, Prompt, PromptValue, Rows
from hydra_rlhf.errors import ConfigError
from hydra_rlhf.model.export import save_stage1
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import methods_with
from hydra_rlhf.runtime.measure import PhaseMemory
from hydra_rlhf.stages import hydra_sft
from hydra_rlhf.stages.finish import save_policy
from hydra_rlhf.stages.fits_model import check_examples, check_prompts
from hydra_rlhf.stages.held_out import HeldOut
from hydra_rlhf.stages.ppo import train_ppo_stage
from hydra_rlhf.stages.preference import STAGE, train_preference_stage
from hydra_rlhf.stages.reward_fn import RewardFunction
from hydra_rlhf.stages.scoring.kinds import open_sources
from hydra_rlhf.stages.session import Session
from hydra_rlhf.stages.settle import recipe_of, settle_ppo, settle_supervised
from hydra_rlhf.stages.supervised import train_supervised

Pairs = Rows[PreferencePair] | Sequence[PreferencePair]
Prompts = Iterable[Prompt | PromptValue]


def train_hydra_sft(
    model: HydraModel,
    pairs: Pairs,
    config: HydraSFTConfig | None = None,
    *,
    held_out: Pairs = (),
    data: DataConfig | None = None,
    memory: MemoryConfig | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Stage 1 in place: train the shared decoder with both heads, then start the critic as the reward model.

    `data` holds lengths and the chat template. Returns one dict of metrics per optimizer step. Raises `ConfigError` for
    a method whose reference and reward model are not one trunk.
    """
    reference, reward = model.table.get("reference"), model.table.get("reward")
    if reference is None or reward is None or reference.trunk != reward.trunk:
        raise ConfigError(
            "train_hydra_sft needs a method whose reference and reward model share one trunk (hydra-ppo, j-hydra-ppo); "
            "train separate models with a recipe: hydra-rlhf run"
        )
    config = config or HydraSFTConfig()
    rows = list(pairs.rows if isinstance(pairs, Rows) else pairs)
    test_rows = list(held_out.rows if isinstance(held_out, Rows) else held_out)
    chat = chat_for(model, [Prompt(row.prompt) for row in rows], data)
    examples, _ = chat.tokenize_pairs(rows)
    test_examples, _ = chat.tokenize_pairs(test_rows)
    check_examples(model, [*examples, *test_examples])
    memory = memory or MemoryConfig()
    session = Session(memory=PhaseMemory(track_tensors=memory.track_tensors))
    train_supervised(
        session,
        model,
        examples,
        config,
        stage="hydra_sft",
        loss=hydra_sft.with_coef(config.reward_loss_coef),
        lora=model.lora,
        seed=seed,
        held_out=test_examples,
        limits=settle_supervised(recipe_of(model, memory, hydra_sft=config), model, "hydra_sft", examples, None),
    )
    model.reset_critic()
    return session.history


def train_ppo(
    model: HydraModel,
    prompts: Prompts,
    config: PPOConfig | None = None,
    *,
    reward_fn: RewardFunction | None = None,
    held_out: Prompts = (),
    data: DataConfig | None = None,
    memory: MemoryConfig | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Stage 2 in place. Returns one dict of metrics per PPO step.

    What `config` leaves open (micro-batches, rows decoded together, checkpointing) is planned to fit `memory`.

    The score is the reward head's plus those of `reward_fn` and `config.reward.sources`, weighted as in
    `config.reward`; a model built with `with_reward=False` has no reward head. Raises `ConfigError` where nothing
    scores.
    """
    config = config or PPOConfig()
    if "reward" not in model.table and reward_fn is None and not config.reward.sources:
        raise ConfigError("this model has no reward role (with_reward=False); give train_ppo a reward_fn")
    train = [as_prompt(prompt) for prompt in prompts]
    test = [as_prompt(prompt) for prompt in held_out]
    chat = chat_for(model, train, data)
    tokenized, _ = chat.tokenize_prompts(train)
    seen, _ = chat.tokenize_prompts(test)
    check_prompts(model, [*tokenized, *seen], config.sampling.max_response_tokens)
    memory = memory or MemoryConfig()
    session = Session(memory=PhaseMemory(track_tensors=memory.track_tensors))
    with open_sources(config.reward, reward_fn=reward_fn) as sources:
        sources.prepare()
        train_ppo_stage(
            session,
            model,
            chat,
            tokenized,
            config,
            seed=seed,
            reward_fn=sources,
            held_out=HeldOut(prompts=seen, reward_fn=sources) if seen else None,
            limits=settle_ppo(recipe_of(model, memory, ppo=config), model, tokenized, None),
        )
    return session.history


def train_preferences(
    model: HydraModel,
    pairs: Pairs,
    config: PreferenceConfig | None = None,
    *,
    method: str = "dpo",
    held_out: Pairs = (),
    data: DataConfig | None = None,
    memory: MemoryConfig | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Stage 2 from pairs in place, on a model built with `method` dpo or simpo: its actor's LoRA set learns.

    Returns one dict of metrics per optimizer step, with looks at the pairs of `held_out`. Raises `ConfigError` for
    another method, and for a model with a critic.
    """
    known = methods_with(STAGE)
    if method not in known or "critic" in model.table:
        raise ConfigError(
            f"train_preferences needs method={' or '.join(known)}, here and in HydraModel.from_pretrained"
        )
    config = config or PreferenceConfig()
    rows = list(pairs.rows if isinstance(pairs, Rows) else pairs)
    chat = chat_for(model, [Prompt(row.prompt) for row in rows], data)
    examples, _ = chat.tokenize_pairs(rows)
    test_examples, _ = chat.tokenize_pairs(list(held_out.rows if isinstance(held_out, Rows) else held_out))
    check_examples(model, [*examples, *test_examples])
    memory = memory or MemoryConfig()
    session = Session(memory=PhaseMemory(track_tensors=memory.track_tensors))
    recipe = recipe_of(model, memory, method=method, preference=config)
    train_preference_stage(
        session,
        model,
        chat,
        examples,
        config,
        method=method,
        ppo=recipe.ppo,
        seed=seed,
        held_out_pairs=test_examples,
        limits=settle_supervised(recipe, model, STAGE, examples, None),
    )
    return session.history


def save_model(model: HydraModel, folder: str | Path) -> None:
    """Write everything a trained model is made of: `base/` (transformers folder, reward head, tokenizer) and, as a run
    leaves it, `actor/`, `critic/` and the value head. Adapters name `base/` as their base; where the base is quantised
    `base/` holds what stage 1 trained, and all adapters belong on the model that was loaded."""
    folder = Path(folder).resolve()
    role = model.table["reference"]
    trunk = model.trunk(role.trunk)
    reward = model.table.get("reward")
    head = model.scalar_head(role.trunk, "reward") if reward is not None and reward.trunk == role.trunk else None
    save_stage1(folder / "base", trunk, model.tokenizer, head)
    if trunk.quantized is None:
        trunk.model.config.name_or_path = str(folder / "base")
    save_policy(model, folder)


def chat_for(model: HydraModel, prompts: Sequence[Prompt], data: DataConfig | None) -> ChatFormat:
    """The chat format of a model's tokenizer for these prompts."""
    return chat_format(data or DataConfig(), model.tokenizer, prompts, eos_id=model.eos_id)


def as_prompt(prompt: Prompt | PromptValue) -> Prompt:
    """A prompt record from a record, a string or messages."""
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)
