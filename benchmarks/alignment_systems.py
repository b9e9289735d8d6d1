"""The systems of the alignment study as one table: a name, which stage-1 models it starts from, and recipe settings.

Everything runs on the built-in world with a Llama of 0.68 M parameters trained from nothing. Settings are chosen
on the development seeds (`--part tuning`) and reported on others. Imports nothing heavy: see `memory_workload.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]
"""Nested settings of a recipe, or a part of them."""

SEEDS = (0, 1, 2)
"""What is reported. A seed draws the pairs, the stage-1 models, the LoRA sets and the rollouts."""
DEVELOPMENT_SEEDS = (100,)
"""What settings are chosen on; nothing of them is reported but the choice itself."""
NUM_PROMPTS = 300
"""Held-out prompts that every system of every seed answers, the same for all."""
PROMPT_SEED = 777
"""Draws them; the world holds prompts out by a rule, so no seed trains on any of them."""
BEST_OF = 16
"""Samples of best-of-n."""
NUM_STEPS, ROLLOUT_SEQUENCES = 48, 64
"""PPO steps and responses of each: 3,072 samples for every method that samples."""
TUNING_STEPS = 32
"""PPO steps of every grid point on the development seeds."""

STAGE1 = {"num_epochs": 2, "learning_rate": 2e-3, "batch_size": 16, "eval_every": 0}
BASE: Settings = {
    "data": {"train": "world", "world_pairs": 6000, "max_prompt_tokens": 96, "max_response_tokens": 64},
    "model": {"path": "scratch:tiny", "scratch_vocab_size": 512, "device": "cpu"},
    "lora": {"rank": 16, "alpha": 32},
    "sft": STAGE1,
    "reward_model": STAGE1,
    "hydra_sft": {**STAGE1, "reward_loss_coef": 0.5},
    "ppo": {
        "num_steps": NUM_STEPS,
        "rollout_batch_size": ROLLOUT_SEQUENCES,
        "minibatch_size": 32,
        "num_epochs": 2,
        "kl_coef": 0.1,
        "actor_learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "value_head_learning_rate": 1e-3,
        "sampling": {"max_response_tokens": 64},
        "eval_every": 3,
        "num_eval_prompts": 128,
        "save_every": 0,
    },
    "evaluation": {"num_prompts": 256},
    "runtime": {"num_threads": 1},
}
"""The demo's settings, with separate stage-1 models trained as long as the joined one."""

STARTS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "hydra": ("hydra-sft", "hydra-ppo", ("hydra_sft",)),
    "separate": ("reward-model", "lora-ppo", ("sft", "reward_model")),
}
"""{kind of start: (command that trains it, method that needs it, its stage-1 models)}; one of each for every seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One system that is trained, by a run of its own for each seed."""

    name: str
    start: str
    """Key of `STARTS`."""
    takes: tuple[str, ...]
    """Which models of that start it begins from."""
    settings: Settings
    """Laid over `BASE`."""
    grid: tuple[Settings, ...] = ()
    """What was tried on the development seeds, laid over `settings`."""


def merged(*parts: Settings) -> dict[str, Any]:
    """Nested settings laid over one another, the last one on top."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            known = found.get(name)
            found[name] = merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return found


def rates(rate: float) -> dict[str, float]:
    """One learning rate for all that PPO trains."""
    return dict.fromkeys(("actor_learning_rate", "critic_learning_rate", "value_head_learning_rate"), rate)


GRID: tuple[Settings, ...] = tuple(
    {"ppo": {**rates(rate), "kl_coef": kl_coef}} for rate in (1e-3, 2e-3) for kl_coef in (0.05, 0.1)
)
"""The same for every system that samples, TRL's included."""


def ppo(method: str, start: str, chosen: Settings) -> System:
    """One of the five methods, with the grid point that was best on the development seeds."""
    settings = merged({"method": method}, chosen)
    return System(name=method, start=start, takes=STARTS[start][2], settings=settings, grid=GRID)


def critic_free(name: str, chosen: Settings) -> System:
    """A method without a critic on the hydra's base: a quarter of the prompts, four responses to each."""
    grouped = {
        "advantage_estimator": name,
        "samples_per_prompt": 4,
        "rollout_batch_size": ROLLOUT_SEQUENCES // 4,
    }
    settings = merged({"method": "hydra-ppo", "ppo": grouped}, chosen)
    return System(name=name, start="hydra", takes=("hydra_sft",), settings=settings, grid=GRID)


DPO: Settings = {
    "method": "dpo",
    "preference": {"num_epochs": 1, "batch_size": 32, "learning_rate": 5e-4, "dpo_beta": 0.1, "eval_every": 0},
}
DPO_GRID: tuple[Settings, ...] = tuple(
    {"preference": {"learning_rate": rate, "dpo_beta": beta}} for rate in (2e-4, 5e-4, 1e-3) for beta in (0.05, 0.1)
)

SYSTEMS: Mapping[str, System] = {
    system.name: system
    for system in (
        ppo("ppo", "separate", GRID[3]),
        ppo("lora-ppo", "separate", GRID[1]),
        ppo("d-lora-ppo", "separate", GRID[1]),
        ppo("j-hydra-ppo", "hydra", GRID[3]),
        ppo("hydra-ppo", "hydra", GRID[0]),
        critic_free("rloo", GRID[0]),
        critic_free("grpo", GRID[1]),
        System(name="dpo", start="separate", takes=("sft",), settings=DPO, grid=DPO_GRID),
    )
}
"""Every system that this package trains. What follows from them without training is in `PLAYERS`."""

TRL = "trl-ppo"
TRL_GRID: tuple[Settings, ...] = tuple(
    {"learning_rate": point["ppo"]["actor_learning_rate"], "kl_coef": point["ppo"]["kl_coef"]} for point in GRID
)
TRL_SETTINGS: Settings = {"learning_rate": 1e-3, "kl_coef": 0.1}
"""TRL has one rate for policy and value model; the rest is the workload's and in `peers/trl_study.py`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """Somebody who answers the held-out prompts."""

    name: str
    run: str
    """The system whose run holds the policy."""
    role: str = "actor"
    """`actor`, or `reference` for what a run starts from."""
    best_of: int | None = None
    """Pick the best of so many samples by the run's reward head."""
    adapter: bool = False
    """The actor is TRL's LoRA set, on the run's base."""
    start: str | None = field(default=None)
    """The player this one is measured against; None for a start itself."""


def players(systems: tuple[str, ...], *, with_trl: bool) -> list[Player]:
    """Everybody who answers, given which systems were trained; starts first."""
    found: list[Player] = []
    for name, reference in (("sft", "lora-ppo"), ("hydra-sft", "hydra-ppo")):
        if reference in systems:
            found.append(Player(name=name, run=reference, role="reference"))
    for name in systems:
        start = "hydra-sft" if SYSTEMS[name].start == "hydra" else "sft"
        found.append(Player(name=name, run=name, start=start))
    if "hydra-ppo" in systems:
        best = Player(name=f"best-of-{BEST_OF}", run="hydra-ppo", role="reference", best_of=BEST_OF, start="hydra-sft")
        found.append(best)
        if with_trl:
            found.append(Player(name=TRL, run="hydra-ppo", adapter=True, start="hydra-sft"))
    return found


WEAK_REWARD = {"num_epochs": 0.1}
"""A reward model that has seen a tenth of the pairs, once."""
OVEROPTIMISED: Settings = {
    "method": "d-lora-ppo",
    "ppo": {**rates(3e-3), "num_steps": 40, "eval_every": 1},
}
"""A high rate against a weak reward model, with gold looked at after every step."""
KL_SETTINGS: Mapping[str, Settings] = {
    "without KL": {"ppo": {"kl_estimator": "none"}},
    "with KL": {"ppo": {"kl_coef": 0.3}},
}
"""What the two runs of a pair differ in."""
