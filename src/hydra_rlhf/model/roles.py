"""The method tables: every "model" of RLHF is one row, a method is up to four (Santacroce et al. 2023, Table 2).

Everything that has to know what a method is (trainer, planner, checkpointer, benchmark, report) reads these tables,
so they cannot disagree, and nothing else in the package asks for a method by name. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hydra_rlhf.config import Recipe


@dataclass(frozen=True, slots=True)
class Role:
    """Where one of the four RLHF models lives: which weights, which LoRA set on them, which head reads them out."""

    trunk: str
    """Name of the decoder whose weights this role uses; roles with the same trunk share one copy."""
    adapter: str | None
    """Name of the LoRA set active in this role's passes; None = LoRA off."""
    head: str
    """`lm`, `value` or `reward`."""


RoleTable = Mapping[str, Role]

PPO: RoleTable = MappingProxyType(
    {
        "actor": Role("actor", None, "lm"),
        "critic": Role("critic", None, "value"),
        "reference": Role("reference", None, "lm"),
        "reward": Role("reward", None, "reward"),
    }
)
LORA_PPO: RoleTable = MappingProxyType(
    {
        "actor": Role("actor", "actor", "lm"),
        "critic": Role("critic", "critic", "value"),
        "reference": Role("reference", None, "lm"),
        "reward": Role("reward", None, "reward"),
    }
)
D_LORA_PPO: RoleTable = MappingProxyType(
    {
        "actor": Role("sft", "actor", "lm"),
        "critic": Role("reward_model", "critic", "value"),
        "reference": Role("sft", None, "lm"),
        "reward": Role("reward_model", None, "reward"),
    }
)
HYDRA_PPO: RoleTable = MappingProxyType(
    {
        "actor": Role("hydra", "actor", "lm"),
        "critic": Role("hydra", "critic", "value"),
        "reference": Role("hydra", None, "lm"),
        "reward": Role("hydra", None, "reward"),
    }
)
J_HYDRA_PPO: RoleTable = MappingProxyType({**HYDRA_PPO, "critic": Role("hydra", "actor", "value")})
DPO: RoleTable = MappingProxyType(
    {
        "actor": Role("sft", "actor", "lm"),
        "reference": Role("sft", None, "lm"),
    }
)
SIMPO: RoleTable = DPO
"""The same models. Its loss has no reference, but what the actor is measured against is there for nothing."""

ROLES: Mapping[str, RoleTable] = MappingProxyType(
    {
        "ppo": PPO,
        "lora-ppo": LORA_PPO,
        "d-lora-ppo": D_LORA_PPO,
        "j-hydra-ppo": J_HYDRA_PPO,
        "hydra-ppo": HYDRA_PPO,
        "dpo": DPO,
        "simpo": SIMPO,
    }
)
"""Every method, by the name a recipe uses."""

STAGE2: Mapping[str, str] = MappingProxyType(
    {**dict.fromkeys(ROLES, "ppo"), "dpo": "preference", "simpo": "preference"}
)
"""How each method's actor learns: by `ppo`, or from pairs as they are (`preference`). Also the recipe's section."""

PAIR_READERS: Mapping[str, tuple[str, ...]] = MappingProxyType({"dpo": ("reference",), "simpo": ()})
"""Of the methods that learn from pairs: who reads them besides the actor, without learning."""

STAGE1_OF_TRUNK: Mapping[str, str] = MappingProxyType(
    {
        "hydra": "hydra_sft",
        "sft": "sft",
        "actor": "sft",
        "reference": "sft",
        "reward_model": "reward_model",
        "critic": "reward_model",
        "reward": "reward_model",
    }
)
"""Which stage-1 model a trunk starts as a copy of."""

STAGE1_ORDER = ("sft", "reward_model", "hydra_sft")
"""The order in which stage-1 models are trained; the reward model starts from the SFT model."""

STAGE1_TABLES: Mapping[str, RoleTable] = MappingProxyType(
    {
        "sft": MappingProxyType({"reference": D_LORA_PPO["reference"]}),
        "reward_model": MappingProxyType({"reward": D_LORA_PPO["reward"]}),
        "hydra_sft": MappingProxyType({name: HYDRA_PPO[name] for name in ("reference", "reward")}),
    }
)
"""What each stage-1 model trains: the roles that stage 2 only reads, with LoRA off."""

TRAINABLE_ROLES = ("actor", "critic")
"""Roles that learn in stage 2: their adapter where they have one, else their trunk. The others never change."""


def trunks(table: RoleTable) -> tuple[str, ...]:
    """The distinct static models of a method, in table order (4, 4, 2, 1, 1 in the paper's ladder)."""
    return tuple(dict.fromkeys(role.trunk for role in table.values()))


def passes(table: RoleTable) -> dict[tuple[str, str | None], dict[str, Role]]:
    """Roles grouped by (trunk, adapter): one trunk forward serves each group (4, 4, 4, 2, 3 in the ladder)."""
    groups: dict[tuple[str, str | None], dict[str, Role]] = {}
    for name, role in table.items():
        groups.setdefault((role.trunk, role.adapter), {})[name] = role
    return groups


def adapters(table: RoleTable) -> dict[str, str]:
    """LoRA sets of a method as {adapter: trunk} (0, 2, 2, 1, 2 sets in the ladder)."""
    return {role.adapter: role.trunk for role in table.values() if role.adapter is not None}


def methods_with(stage2: str) -> tuple[str, ...]:
    """The methods whose actors learn this way."""
    return tuple(method for method in ROLES if STAGE2[method] == stage2)


def stage1_source(table: RoleTable, trunk: str) -> str:
    """The stage-1 model that `trunk` starts as a copy of; without a reward row nothing needs a trained reward head."""
    return STAGE1_OF_TRUNK[trunk] if "reward" in table else "sft"


def stage1_models(table: RoleTable) -> tuple[str, ...]:
    """The stage-1 models a method starts from, in training order."""
    needed = {stage1_source(table, trunk) for trunk in trunks(table)}
    return tuple(stage for stage in STAGE1_ORDER if stage in needed)


def without_roles(table: RoleTable, *names: str) -> RoleTable:
    """The same table without some rows, e.g. without `reward` where a reward function alone gives the scores."""
    return MappingProxyType({name: role for name, role in table.items() if name not in names})


def rows_in_use(table: RoleTable, *, with_reward: bool, with_critic: bool) -> RoleTable:
    """A method's table without the rows that nothing needs."""
    used = {"reward": with_reward, "critic": with_critic}
    return without_roles(table, *(name for name, is_used in used.items() if not is_used))


def method_table(recipe: Recipe) -> RoleTable:
    """The table of a recipe's run: without a reward role where the reward head has no say, and without a critic where
    advantages are estimated without one."""
    return rows_in_use(
        ROLES[recipe.method],
        with_reward=recipe.ppo.reward.reward_model_coef != 0,
        with_critic=recipe.ppo.advantage_estimator == "gae",
    )
