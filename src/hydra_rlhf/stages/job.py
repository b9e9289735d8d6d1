"""What every stage of a run needs."""

from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hydra_rlhf.config import Recipe
from hydra_rlhf.model.roles import ROLES, RoleTable, without_roles
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages.datasets import RawData
from hydra_rlhf.stages.scoring.reward_sources import RewardSources
from hydra_rlhf.stages.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every stage of a run needs."""

    recipe: Recipe
    run: Run
    session: Session
    raw: RawData
    tokenizer: PreTrainedTokenizerBase
    sources: RewardSources
    trust_remote_code: bool

    @property
    def table(self) -> RoleTable:
        """The role table of this run."""
        return method_table(self.recipe)


def method_table(recipe: Recipe) -> RoleTable:
    """The recipe's table, without a reward role where only a reward function scores."""
    table = ROLES[recipe.method]
    return table if recipe.ppo.reward.reward_model_coef else without_roles(table, "reward")
