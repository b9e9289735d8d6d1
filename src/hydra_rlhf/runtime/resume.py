"""Which settings a run may be resumed with: those it was made with, and others that change nothing it has computed.

`RULES` is the whole list, with the reason of each. What is not in it cannot be changed once a run has done a step.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.recipes import recipe_differences
from hydra_rlhf.runtime.files import read_json, read_yaml, write_file

CHANGES = "changes.json"
"""In the run folder: settings that a resumed run went on with instead of its own, and how far it was then."""
STAGE1 = ("sft", "reward_model", "hydra_sft")
Settings = Mapping[str, Any]
"""A recipe as nested mappings."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """How far a run is."""

    begun: frozenset[str]
    """Stages that have begun; some of them may be done."""
    done: frozenset[str]
    ppo_steps: int
    """PPO steps in the newest checkpoint."""


def always(name: str, old: Settings, new: Settings, past: Past) -> str | None:
    """Nothing stands against it."""
    del name, old, new, past
    return None


def before_evaluation(name: str, old: Settings, new: Settings, past: Past) -> str | None:
    """Against it once the run is measured."""
    del name, old, new
    return "the run is measured already; measure it again with `hydra-rlhf eval`" if "evaluation" in past.done else None


def before_its_stage(name: str, old: Settings, new: Settings, past: Past) -> str | None:
    """Against it once the stage of the setting has begun, and where it changes which models stage 1 trains."""
    stage = name.partition(".")[0]
    if stage in past.begun:
        return f"stage {stage} has begun with it"
    if stage == "ppo" and "evaluation" in past.begun:  # of a method without PPO
        return "the evaluation has begun with it"
    if name == "ppo.reward.reward_model_coef" and has_reward_model(old) != has_reward_model(new):
        return "without a reward model stage 1 is another one"
    return None


def has_reward_model(settings: Settings) -> bool:
    """Whether stage 1 trains a reward model."""
    return bool(settings["ppo"]["reward"].get("reward_model_coef", 1.0))


def further_steps(name: str, old: Settings, new: Settings, past: Past) -> str | None:
    """Against it where learning rates of steps that are done depend on it, or where these would be too many."""
    del name
    if "ppo" not in past.begun:
        return None
    if new["ppo"]["num_steps"] < past.ppo_steps:
        return f"{past.ppo_steps} steps are done"
    if (old["ppo"]["schedule"], new["ppo"]["schedule"]) != ("constant", "constant"):
        return "with ppo.schedule=linear or cosine every learning rate depends on it"
    if past.ppo_steps < (warm := max(warmup_steps(old), warmup_steps(new))):
        return f"learning rates rise for {warm} steps with it, and {past.ppo_steps} are done; resume without it first"
    return None


def warmup_steps(settings: Settings) -> int:
    """PPO steps in which learning rates rise."""
    ppo = settings["ppo"]
    return math.ceil(ppo["warmup_frac"] * ppo["num_steps"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Settings that may change, and when."""

    settings: tuple[str, ...]
    """Dotted names; `*` stands for anything."""
    why: str
    """Why nothing that was computed depends on them."""
    against: Callable[[str, Settings, Settings, Past], str | None] = always
    """What stands against a change at this point of the run; None = nothing."""


RULES = (
    Rule(
        settings=("*.save_every", "runtime.keep_checkpoints", "ppo.num_logged_samples"),
        why="they say what is written down and when, not what it is",
    ),
    Rule(
        settings=("*.eval_every", "*.max_eval_rows"),
        why="looks at held-out data teach nothing and draw from random streams of their own",
    ),
    Rule(
        settings=("memory.*", "*.micro_batch_tokens", "ppo.sampling.batch_rows"),
        why="they cut the work and do not change it; what is not done is planned anew, and limits only ever shrink "
        "(sums may be taken in another order, so later steps need not repeat bit for bit)",
    ),
    Rule(settings=("evaluation.*",), why="the evaluation alone reads them", against=before_evaluation),
    Rule(
        settings=("ppo.num_steps", "ppo.warmup_frac"),
        why="a step does not depend on how many follow it, at a constant learning rate after its warm-up",
        against=further_steps,
    ),
    Rule(
        settings=(*(f"{stage}.*" for stage in STAGE1), "ppo.*", "preference.*"),
        why="a stage that has not begun has computed nothing",
        against=before_its_stage,
    ),
)


def refusals(old: Settings, new: Settings, past: Past) -> list[str]:
    """Changes that a run cannot be resumed with, each as `setting: old -> new`, with the reason where there is one."""
    return [reason for line in recipe_differences(old, new) if (reason := refusal(line, old, new, past)) is not None]


def refusal(line: str, old: Settings, new: Settings, past: Past) -> str | None:
    """The line with why it is refused; None where it is not."""
    name = line.partition(":")[0]
    rules = [rule for rule in RULES if any(fnmatchcase(name, pattern) for pattern in rule.settings)]
    reasons = [rule.against(name, old, new, past) for rule in rules]
    if None in reasons:
        return None
    return f"{line} ({reasons[0]})" if reasons else line


def reopened(stages: Mapping[str, Any], old: Settings, new: Settings) -> dict[str, Any]:
    """The content of stages.json for these settings: a finished PPO that has further steps to do is not done, and what
    was measured after it has to be measured again."""
    if "ppo" not in stages or new["ppo"]["num_steps"] <= old["ppo"]["num_steps"]:
        return dict(stages)
    kept = {name: stage for name, stage in stages.items() if name != "evaluation"}
    return {**kept, "ppo": {**stages["ppo"], "done": False}}


def change_settings(folder: Path, settings: str, *, ppo_steps: int) -> None:
    """Let a run go on with these settings (YAML) where they differ from its own in nothing that it has computed with.

    Raises `CheckpointError` for any other change. `ppo_steps` are in its newest checkpoint.
    """
    old, new = read_yaml(folder / "recipe.yaml"), yaml.safe_load(settings)
    changes = recipe_differences(old, new)
    if not changes:
        return
    stages = read_json(folder / "stages.json") if (folder / "stages.json").exists() else {}
    done = frozenset(name for name, stage in stages.items() if stage["done"])
    refused = refusals(old, new, Past(begun=frozenset(stages), done=done, ppo_steps=ppo_steps))
    if refused:
        raise CheckpointError(
            f"{folder} was made with other settings (run -> now): {'; '.join(refused)}; continue it with the "
            "recipe it was made with, or choose another name"
        )
    log.warning("%s goes on with changed settings: %s", folder, "; ".join(changes))
    known = read_json(folder / CHANGES) if (folder / CHANGES).exists() else []
    write_json(folder / CHANGES, [*known, {"changed": changes, "begun": sorted(stages), "ppo_steps": ppo_steps}])
    if (now := reopened(stages, old, new)) != stages:
        write_json(folder / "stages.json", now)
        for name in ("summary.json", "memory.json"):
            (folder / name).unlink(missing_ok=True)
    write_file(folder / "recipe.yaml", settings.encode())


def write_json(path: Path, content: Any) -> None:
    """Write or replace a JSON file in one step."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())
