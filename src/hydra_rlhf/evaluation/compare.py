"""`hydra-rlhf compare`: runs answer the same held-out prompts, and judges hold a round robin over them and their start.

Runs whose settings differ in nothing but name and seed are one player with several seeds, unless they are named:
`LABEL=RUN` makes every run of one label one player.
"""

import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra_rlhf.config import Recipe
from hydra_rlhf.data.rows import Prompt
from hydra_rlhf.errors import ConfigError
from hydra_rlhf.evaluation.answers import Answers, Questions, answers_of, questions_of
from hydra_rlhf.evaluation.best_of import NO_HEAD, best_of_n
from hydra_rlhf.evaluation.judges import Setting, default_judges, read_judge
from hydra_rlhf.evaluation.texts import distinct_n, rouge
from hydra_rlhf.evaluation.tournament import hold_tournament
from hydra_rlhf.model.roles import method_table
from hydra_rlhf.runtime.environment import redact
from hydra_rlhf.runtime.metrics import strict_json
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages.datasets import WORLD, load_raw
from hydra_rlhf.stages.finished import load_finished
from hydra_rlhf.stages.held_out import sample_and_score

START = "start"
NUM_SAMPLES = 8
"""Prompts whose answers are kept as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A run that is compared."""

    folder: Path
    recipe: Recipe
    player: str


def compare_runs(
    names: Sequence[str],
    *,
    judges: Sequence[str],
    num_prompts: int | None,
    checkpoint: str,
    best_of: int | None,
    seed: int,
    with_rouge: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The content of compare.json. Runs, prompts and judges are checked before any policy is loaded; then one policy is
    in memory at a time. Raises `ConfigError` for runs that hold out other prompts."""
    contenders = read_contenders(names)
    first = contenders[0]
    setting = Setting(
        run=first.folder,
        is_world=first.recipe.data.train == WORLD,
        has_reward="reward" in method_table(first.recipe),
        trust_remote_code=trust_remote_code,
    )
    specs = list(dict.fromkeys(judges)) or default_judges(setting)
    for spec in specs:
        read_judge(spec, setting)
    if best_of and not any("reward" in method_table(contender.recipe) for contender in contenders):
        raise ConfigError(NO_HEAD)
    questions = shared_questions(contenders, num_prompts or first.recipe.evaluation.num_prompts)
    entries = collect_answers(
        contenders,
        questions,
        checkpoint=checkpoint,
        best_of=best_of,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    players = list(dict.fromkeys(entry.player for entry in entries))
    held: list[dict[str, Any]] = []
    for spec in specs:
        held.append(hold_tournament(read_judge(spec, setting), questions, entries, seed=seed))
        gc.collect()  # a judge's model is gone before the next one's comes
    content = {
        "players": [
            describe_player(player, entries, questions if with_rouge else None, seed=seed) for player in players
        ],
        "num_prompts": len(questions.prompts),
        "prompts_sha256": hashlib.sha256(json.dumps(list(questions.prompts)).encode()).hexdigest(),
        "seed": seed,
        "judges": held,
        "samples": [
            {"prompt": questions.texts[k], "responses": [[entry.player, entry.texts[k]] for entry in entries]}
            for k in range(min(NUM_SAMPLES, len(questions.prompts)))
        ],
    }
    return redact(strict_json(content))


def read_contenders(names: Sequence[str]) -> list[Contender]:
    """The runs that are named, each with the player it belongs to. Raises `ConfigError` and `CheckpointError`."""
    found: list[tuple[str | None, Path, Recipe]] = []
    for name in names:
        label, separator, path = name.partition("=")
        labelled = bool(separator) and not Path(name).exists()
        folder = Path(path if labelled else name)
        found.append((label if labelled else None, folder, Run.load(folder).recipe))
    folders = [folder.resolve() for _, folder, _ in found]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice; name each run once")
    players: list[str] = []
    for number, (label, _, recipe) in enumerate(found):
        alike = [
            i for i, (other, _, known) in enumerate(found[:number]) if other is None and same_but_seed(known, recipe)
        ]
        players.append(label or (players[alike[0]] if alike else unused(recipe.name, players)))
    if any(player == START or player.startswith((f"{START} of ", "best of ")) for player in players):
        raise ConfigError(f"{START} and best of N are players of their own; give such a run a label: LABEL=RUN")
    return [
        Contender(folder=folder, recipe=recipe, player=player)
        for player, (_, folder, recipe) in zip(players, found, strict=True)
    ]


def same_but_seed(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes differ in nothing but name, folder, seed and the finished models they start from."""
    plain = replace(one, name=other.name, output_dir=other.output_dir, seed=other.seed, start=other.start)
    return plain == other and one.seed != other.seed


def unused(name: str, taken: Sequence[str]) -> str:
    """The name, numbered where another player has it."""
    number, found = 1, name
    while found in taken:
        number, found = number + 1, f"{name} ({number + 1})"
    return found


def shared_questions(contenders: Sequence[Contender], num_prompts: int) -> Questions:
    """The first run's held-out prompts, if all the others hold out the same. Raises `ConfigError`.

    The built-in world holds prompts out by a rule and not by a run's seed: no run of it trains on another one's.
    """
    first = contenders[0]
    raw = load_raw(first.recipe.data, seed=first.recipe.seed)
    ours = [row.prompt for row in raw.test.prompts]
    for other in contenders[1:]:
        if first.recipe.data.train == other.recipe.data.train == WORLD:
            continue
        theirs = [row.prompt for row in load_raw(other.recipe.data, seed=other.recipe.seed).test.prompts]
        if ours != theirs:
            raise ConfigError(
                f"{first.folder} and {other.folder} hold out different prompts ({len(ours)} and {len(theirs)}, "
                f"{sum(prompt in theirs for prompt in ours)} in common); compare runs with the same data settings"
            )
    return questions_of(raw, num_prompts)


def collect_answers(
    contenders: Sequence[Contender],
    questions: Questions,
    *,
    checkpoint: str,
    best_of: int | None,
    seed: int,
    trust_remote_code: bool = False,
) -> list[Answers]:
    """Every run's answers, those of the start first; policies are loaded one after the other."""
    starts: list[Answers] = []
    actors: list[Answers] = []
    extra: list[Answers] = []
    for contender in contenders:
        finished = load_finished(contender.folder, checkpoint, trust_remote_code=trust_remote_code)
        rows = [Prompt(p, columns) for p, columns in zip(questions.prompts, questions.columns, strict=True)]
        prompts, _ = finished.chat.tokenize_prompts(rows)
        for role, collected in (("reference", starts), ("actor", actors)):
            # All starts draw from one stream, so that equal ones give equal answers; actors draw apart.
            own = () if role == "reference" else (contender.recipe.name, contender.recipe.seed)
            rollout = sample_and_score(
                finished.model,
                finished.chat,
                role,
                prompts,
                contender.recipe.ppo,
                stream=(seed, "compare", role, *own),
                reward_fn=None,
                limits=finished.limits,
            )
            is_actor = role == "actor"
            answers = answers_of(
                rollout,
                player=contender.player,
                run=str(contender.folder),
                checkpoint=finished.checkpoint if is_actor else START,
                is_actor=is_actor,
            )
            collected.append(answers)
        if best_of and not extra and "reward" in finished.model.table:
            extra.append(best_of_n(finished, prompts, best_of, seed=seed))
        del finished
        gc.collect()
    return [*name_starts(starts), *actors, *extra]


def name_starts(starts: Sequence[Answers]) -> list[Answers]:
    """The different starts: `start` if there is one for all runs or all are seeds of one player, else each with the
    player whose start it is. Starts that answered everything alike are one."""
    different: list[Answers] = []
    for answers in starts:
        if all(list(answers.texts) != list(known.texts) for known in different):
            different.append(answers)
    if len({answers.player for answers in different}) == 1:
        return [replace(answers, player=START) for answers in different]
    return [replace(answers, player=f"{START} of {answers.player}") for answers in different]


def describe_player(
    player: str, entries: Sequence[Answers], questions: Questions | None, *, seed: int
) -> dict[str, Any]:
    """What a player is and what its answers look like; means over its runs. ROUGE where `questions` are given."""
    own = [entry for entry in entries if entry.player == player]
    tokens = [count for entry in own for count in entry.num_tokens]
    characters = [len(text) for entry in own for text in entry.texts]
    known_kl = [entry.kl for entry in own if entry.kl is not None]
    found: dict[str, Any] = {
        "name": player,
        "runs": [entry.run for entry in own],
        "checkpoints": [entry.checkpoint for entry in own],
        "kl": sum(known_kl) / len(known_kl) if known_kl else None,
        "response_tokens_mean": sum(tokens) / len(tokens),
        "response_characters_mean": sum(characters) / len(characters),
        "eos_frac": sum(sum(entry.ended) for entry in own) / len(tokens),
        **{f"distinct_{n}": mean_known([distinct_n(entry.texts, n) for entry in own]) for n in (1, 2)},
        **{name: value for entry in own for name, value in entry.notes.items()},
    }
    if questions is not None:
        texts = [text for entry in own for text in entry.texts]
        found |= rouge(texts, [*questions.references] * len(own), seed=seed)
    return found


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
