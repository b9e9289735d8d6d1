"""What can be done with a finished run: measure it again, sample from it, export it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra_rlhf.config import Recipe
from hydra_rlhf.data.formats import ChatFormat, TokenizedPrompt, chat_format
from hydra_rlhf.data.sources import Prompt
from hydra_rlhf.errors import CheckpointError, ConfigError
from hydra_rlhf.model.export import save_merged, save_peft_adapter, save_reward_model
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import STAGE2, method_table
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages.datasets import load_raw
from hydra_rlhf.stages.finish import load_trained
from hydra_rlhf.stages.fits_model import check_prompts
from hydra_rlhf.stages.held_out import sample_and_score, score_of
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.pipeline import stage1_folders
from hydra_rlhf.stages.rollout import sequence_kl
from hydra_rlhf.stages.scoring.kinds import open_sources
from hydra_rlhf.stages.scoring.reward_sources import SourceMoments, with_moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A run whose stage 2 is done, loaded."""

    run: Run
    model: HydraModel
    chat: ChatFormat
    checkpoint: str
    """Which policy is in the model, in words."""
    limits: StageLimits
    """What training could hold at once."""
    moments: SourceMoments
    """The unit of its held-out scores."""


def load_finished(folder: Path, checkpoint: str, *, trust_remote_code: bool = False) -> Finished:
    """A run whose stage 2 is done, with its `last` or `best` policy.

    Raises `CheckpointError` for a folder without a finished stage 2.
    """
    run = Run.load(folder)
    recipe = run.recipe
    stage2 = STAGE2[recipe.method]
    if not run.stage_done(stage2):
        raise CheckpointError(
            f"{folder} has not finished the stage {stage2}; continue it with `hydra-rlhf run RECIPE --resume`"
        )
    model = HydraModel.from_stage1(
        method_table(recipe),
        stage1_folders(recipe, run),
        model=recipe.model,
        lora=recipe.lora,
        seed=recipe.seed,
        trust_remote_code=trust_remote_code,
    )
    _, loaded, limits, moments = load_trained(run, model, checkpoint)
    chat = known_chat_format(run, recipe, model)
    return Finished(run=run, model=model, chat=chat, checkpoint=loaded, limits=limits, moments=moments)


def known_chat_format(run: Run, recipe: Recipe, model: HydraModel) -> ChatFormat:
    """The chat format the run trained with; its template is in the run folder, so the data need not be."""
    template = run.read_json("chat.json")["template"]
    return chat_format(replace(recipe.data, chat_template=template), model.tokenizer, [], eos_id=model.eos_id)


def sample_side_by_side(
    folder: Path,
    *,
    prompts: Sequence[str] | None,
    num_prompts: int,
    checkpoint: str,
    seed: int,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Each prompt with the reference's and the actor's response and their scores; held-out prompts where none is given.

    A reward function's columns are not known for prompts given by hand, so with one only held-out prompts can be used.
    """
    finished = load_finished(folder, checkpoint, trust_remote_code=trust_remote_code)
    model, chat, config = finished.model, finished.chat, finished.run.recipe.ppo
    if prompts:
        tokenized, _ = chat.tokenize_prompts(Prompt(prompt) for prompt in prompts)
    else:
        tokenized = held_out_prompts(finished.run.recipe, chat)[:num_prompts]
    check_prompts(model, tokenized, config.sampling.max_response_tokens)
    with open_sources(config.reward, model=finished.run.recipe.model, trust_remote_code=trust_remote_code) as sources:
        rollouts = {
            role: sample_and_score(
                model,
                chat,
                role,
                tokenized,
                config,
                stream=(seed, "sample", role),
                reward_fn=with_moments(sources, finished.moments),
                limits=finished.limits,
            )
            for role in ("reference", "actor")
        }
    kl = sequence_kl(rollouts["actor"])
    return [
        {
            "prompt": rollouts["actor"].prompts.texts[i],
            "reference_response": rollouts["reference"].responses[i],
            "reference_score": score_of(rollouts["reference"], i),
            "response": rollouts["actor"].responses[i],
            "score": score_of(rollouts["actor"], i),
            "kl": kl[i].item(),
        }
        for i in range(len(tokenized))
    ]


def held_out_prompts(recipe: Recipe, chat: ChatFormat) -> list[TokenizedPrompt]:
    """The run's held-out prompts, read from its data again."""
    tokenized, _ = chat.tokenize_prompts(load_raw(recipe.data, seed=recipe.seed).test.prompts)
    return tokenized


def export_run(folder: Path, out: Path, *, format: str, checkpoint: str, trust_remote_code: bool = False) -> None:
    """Write the policy as a PEFT adapter (`peft`) or whole (`merged`), or the reward model (`reward-model`).

    Raises `ConfigError` for a format that the run's method has not, and for a folder that is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; name a new folder")
    model = load_finished(folder, checkpoint, trust_remote_code=trust_remote_code).model
    actor = model.table["actor"]
    trunk = model.trunk(actor.trunk)
    if format == "merged":
        save_merged(trunk, actor.adapter, model.tokenizer, out)
    elif format == "peft":
        if actor.adapter is None:
            raise ConfigError("this run trained whole models and has no adapter; export it with --format merged")
        save_peft_adapter(trunk, actor.adapter, out)
        model.tokenizer.save_pretrained(out)
    else:
        if "reward" not in model.table:
            raise ConfigError(
                f"{folder} has no reward model to export: it learned from a reward function alone, or from pairs as "
                "they are; export its policy with --format merged"
            )
        role = model.table["reward"]
        save_reward_model(model.trunk(role.trunk), model.scalar_head(role.trunk, "reward"), model.tokenizer, out)
