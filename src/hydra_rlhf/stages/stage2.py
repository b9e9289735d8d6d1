"""Stage 2 of a run by the name that a method's entry in `STAGE2` has."""

from collections.abc import Callable, Mapping

from hydra_rlhf.data.formats import ChatFormat
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.stages.datasets import Datasets
from hydra_rlhf.stages.held_out import HeldOut
from hydra_rlhf.stages.job import Job
from hydra_rlhf.stages.ppo import train_ppo_stage
from hydra_rlhf.stages.preference import STAGE as PREFERENCE
from hydra_rlhf.stages.preference import train_preference_stage
from hydra_rlhf.stages.settle import settle_ppo, settle_supervised


def ppo(job: Job, model: HydraModel, chat: ChatFormat, data: Datasets) -> None:
    """The actor answers prompts and learns from the scores of its answers."""
    train_ppo_stage(
        job.session,
        model,
        chat,
        data.train_prompts,
        job.recipe.ppo,
        seed=job.recipe.seed,
        reward_fn=job.sources,
        held_out=held_out_of(job, data),
        limits=settle_ppo(job.recipe, model, data.train_prompts, job.run),
    )


def preference(job: Job, model: HydraModel, chat: ChatFormat, data: Datasets) -> None:
    """The actor learns from the training pairs."""
    train_preference_stage(
        job.session,
        model,
        chat,
        data.train_pairs,
        job.recipe.preference,
        method=job.recipe.method,
        ppo=job.recipe.ppo,
        seed=job.recipe.seed,
        held_out_pairs=data.test_pairs,
        held_out=held_out_of(job, data),
        limits=settle_supervised(job.recipe, model, PREFERENCE, data.train_pairs, job.run),
    )


TRAIN: Mapping[str, Callable[[Job, HydraModel, ChatFormat, Datasets], None]] = {"ppo": ppo, PREFERENCE: preference}
"""How each kind of stage 2 trains the actor, in place."""


def held_out_of(job: Job, data: Datasets) -> HeldOut:
    """The held-out prompts, and what their responses are judged by."""
    return HeldOut(prompts=data.test_prompts, reward_fn=job.sources, gold=job.raw.gold)
