"""What every stage of a run needs."""

from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hydra_rlhf.config import Recipe
from hydra_rlhf.model.roles import RoleTable, method_table
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
