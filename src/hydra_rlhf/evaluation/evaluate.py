"""`hydra-rlhf eval`: a finished run measured again, by any judges, with best of n beside it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra_rlhf.errors import ConfigError
from hydra_rlhf.evaluation.answers import answers_of, questions_of
from hydra_rlhf.evaluation.best_of import NO_HEAD, best_of_n
from hydra_rlhf.evaluation.judges import Judge, Setting, default_judges, read_judge
from hydra_rlhf.evaluation.texts import rouge
from hydra_rlhf.evaluation.tournament import hold_tournament
from hydra_rlhf.model.roles import method_table
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages.datasets import WORLD, load_raw, tokenize
from hydra_rlhf.stages.finish import measure
from hydra_rlhf.stages.finished import load_finished
from hydra_rlhf.stages.scoring.kinds import open_sources
from hydra_rlhf.stages.scoring.reward_sources import with_moments


def evaluate_again(
    folder: Path,
    *,
    checkpoint: str,
    num_prompts: int | None,
    judges: Sequence[str] = (),
    best_of: int | None = None,
    with_rouge: bool = False,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], Path]:
    """The numbers of `summary.json` for one checkpoint, what each judge says, and the file they are written to.

    Judges are read before a weight is loaded. With `best_of`, the judges (by default gold and the reward head) also
    compare the best of so many samples of the start with both.
    """
    recipe = Run.load(folder).recipe
    setting = Setting(
        run=folder,
        is_world=recipe.data.train == WORLD,
        has_reward="reward" in method_table(recipe),
        trust_remote_code=trust_remote_code,
    )
    specs = list(dict.fromkeys(judges)) or (default_judges(setting) if best_of else [])
    for spec in specs:
        read_judge(spec, setting)
    if best_of and not setting.has_reward:
        raise ConfigError(NO_HEAD)
    finished = load_finished(folder, checkpoint, trust_remote_code=trust_remote_code)
    run = finished.run
    raw = load_raw(recipe.data, seed=recipe.seed)
    data = tokenize(raw, finished.chat)
    count = num_prompts or recipe.evaluation.num_prompts
    with open_sources(recipe.ppo.reward, model=recipe.model, trust_remote_code=trust_remote_code) as sources:
        measured = measure(
            recipe,
            finished.model,
            finished.chat,
            data,
            raw,
            checkpoint=finished.checkpoint,
            num_prompts=count,
            reward_fn=with_moments(sources, finished.moments),
            limits=finished.limits,
        )
    numbers = dict(measured.summary)
    questions = questions_of(raw, count)
    if with_rouge:
        for side, rollout in (("", measured.actor), ("reference_", measured.reference)):
            found = rouge(rollout.responses, questions.references, seed=recipe.seed)
            numbers |= {f"{side}{name}": value for name, value in found.items()}
    if specs:
        entries = [
            answers_of(rollout, player=player, run=str(folder), checkpoint=name, is_actor=player == "actor")
            for player, name, rollout in (
                ("start", "start", measured.reference),
                ("actor", finished.checkpoint, measured.actor),
            )
        ]
        if best_of:
            entries.append(best_of_n(finished, data.test_prompts[:count], best_of, seed=recipe.seed))
            numbers["best_of_n_kl_bound"] = entries[-1].notes["kl_bound"]
        loaded = replace(setting, loaded=finished)
        held: list[Judge] = [read_judge(spec, loaded) for spec in specs]
        numbers["players"] = [entry.player for entry in entries]
        numbers["judges"] = [hold_tournament(judge, questions, entries, seed=recipe.seed) for judge in held]
    file = run.folder / f"evaluation-{checkpoint}.json"
    run.write_json(file.name, numbers)
    return numbers, file
