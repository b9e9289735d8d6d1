"""Judges by name: `gold`, `reward-head[:RUN]`, `classifier:PATH`, `rule:module:function`, `llm:MODEL@URL`.

A spec may end in options, `,name=value` each. Specs are read, and what they name is looked for, before any policy is
loaded; models are loaded when the judge is asked, one after the other.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_rlhf.config_rewards import ClassifierSource
from hydra_rlhf.data.world import gold_score
from hydra_rlhf.errors import ConfigError, RewardFunctionError
from hydra_rlhf.evaluation.answers import Answers, Questions
from hydra_rlhf.evaluation.llm_judge import PLACES, PROMPTS, LLMJudge
from hydra_rlhf.model.classifier import Classifier
from hydra_rlhf.runtime.endpoint import Endpoint
from hydra_rlhf.stages.finished import Finished, load_finished
from hydra_rlhf.stages.reward_fn import RewardFunction, columns_taken, import_function
from hydra_rlhf.stages.score_texts import score_texts
from hydra_rlhf.stages.scoring.outcomes import Failure, check_returned, failures

KEY_VARIABLE = "HYDRA_RLHF_JUDGE_KEY"
"""Environment variable of an endpoint's key, unless the judge names another one."""
LLM_OPTIONS = {
    "prompt": "helpfulness",
    "key": KEY_VARIABLE,
    "parallel": "8",
    "retries": "5",
    "timeout": "60",
    "temperature": "0",
    "max-tokens": "512",
    "cache": "",
}
"""Options of an LLM judge and what they are without being given."""

Score = Callable[[Questions, Sequence[Answers]], list[list[float]]]
"""One number per answer of each player; only differences mean anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJudge:
    """A judge that gives every answer a score; the higher one wins, equal ones tie."""

    name: str
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class PairJudge:
    """A judge that looks at two answers at once."""

    name: str
    llm: LLMJudge


Judge = ScoreJudge | PairJudge
JOINS = ("auto", "template", "pair", "text")
"""As `join` of a classifier among the reward sources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where judges are asked from."""

    run: Path
    """The run whose reward head `reward-head` is, and whose folder keeps answers of LLM judges."""
    is_world: bool
    """Whether the prompts are the built-in world's, which has a gold score."""
    has_reward: bool = True
    """Whether `run` has a reward head."""
    loaded: Finished | None = None
    """`run`, where it is in memory anyway."""
    trust_remote_code: bool = False
    """Whether code of a model's repository may run."""


def default_judges(setting: Setting) -> list[str]:
    """What judges where no judge is named: the gold score where there is one, and the reward head."""
    found = ["gold"] * setting.is_world + ["reward-head"] * setting.has_reward
    if not found:
        raise ConfigError("this run has neither a gold score nor a reward head; name a judge with --judge")
    return found


def read_judge(spec: str, setting: Setting) -> Judge:
    """The judge that a spec names. Raises `ConfigError`."""
    kind, _, rest = spec.partition(":")
    if spec == "gold":
        if not setting.is_world:
            raise ConfigError("--judge gold: only the built-in world (data.train=world) has a gold score")
        return ScoreJudge(name=spec, score=score_by_gold)
    if spec == "reward-head":
        if not setting.has_reward:
            raise ConfigError(
                f"--judge reward-head: {setting.run} has no reward head; name a run that has one (reward-head:RUN), or "
                "another judge"
            )
        return ScoreJudge(name=spec, score=partial(score_by_head, setting.run, setting))
    if kind == "reward-head" and rest:
        return ScoreJudge(name=spec, score=partial(score_by_head, Path(rest), replace(setting, loaded=None)))
    if kind == "classifier" and rest:
        return ScoreJudge(name=spec, score=partial(score_by_classifier, read_classifier(spec, rest), setting))
    if kind == "rule" and rest:
        return ScoreJudge(name=spec, score=partial(score_by_rule, import_function(rest, setting=f"--judge {spec}")))
    if kind == "llm" and rest:
        return read_llm(spec, rest, setting)
    raise ConfigError(
        f"--judge {spec}: there is no such judge; use gold, reward-head, reward-head:RUN, classifier:PATH, "
        "rule:module:function or llm:MODEL@URL"
    )


def read_classifier(spec: str, rest: str) -> ClassifierSource:
    """`PATH[,option=value...]` as the settings of a reward model of others. Raises `ConfigError`."""
    path, options = split_options(rest, {"join": "auto", "label": "", "device": "auto"}, spec)
    label = int(number(spec, "label", options["label"], least=0)) if options["label"] else None
    if options["join"] not in JOINS:
        raise ConfigError(f"--judge {spec}: join={options['join']} is not one of {', '.join(JOINS)}")
    join: Any = options["join"]
    return ClassifierSource(
        name="judge", kind="classifier", path=path, label=label, join=join, device=options["device"]
    )


def read_llm(spec: str, rest: str, setting: Setting) -> PairJudge:
    """`MODEL@URL[,option=value...]` as a judge."""
    where, options = split_options(rest, LLM_OPTIONS, spec)
    model, at, url = where.rpartition("@")
    if not at or not model:
        raise ConfigError(f"--judge {kind_only(spec)}: write llm:MODEL@URL, e.g. llm:my-model@http://127.0.0.1:8000/v1")
    body: dict[str, Any] = {}
    if options["temperature"] != "default":
        body["temperature"] = number(spec, "temperature", options["temperature"], least=0.0)
    if options["max-tokens"] != "default":
        body["max_tokens"] = int(number(spec, "max-tokens", options["max-tokens"], least=1))
    key = os.environ.get(options["key"])
    if key is None and options["key"] != KEY_VARIABLE:
        raise ConfigError(f"--judge {spec}: the environment has no variable {options['key']} to take the key from")
    endpoint = Endpoint(
        url=url,
        key=key or None,
        cache=Path(options["cache"] or setting.run / "judge_cache"),
        timeout_s=number(spec, "timeout", options["timeout"], least=0.01),
        num_retries=int(number(spec, "retries", options["retries"], least=0)),
    )
    judge = LLMJudge(
        model=model,
        endpoint=endpoint,
        template=read_template(spec, options["prompt"]),
        options=body,
        num_parallel=int(number(spec, "parallel", options["parallel"], least=1)),
    )
    return PairJudge(name=spec, llm=judge)


def kind_only(spec: str) -> str:
    """A spec that may hold a secret where an address was meant, cut to its kind."""
    return f"{spec.partition(':')[0]}:..."


def read_template(spec: str, name: str) -> str:
    """A ready prompt, or the text of a file with all three places."""
    if name in PROMPTS:
        return PROMPTS[name]
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        ready = ", ".join(PROMPTS)
        raise ConfigError(f"--judge {spec}: prompt={name} is neither {ready} nor a file to read: {error}") from None
    missing = [place for place in PLACES if f"{{{place}}}" not in text]
    if missing:
        raise ConfigError(f"--judge {spec}: {name} has no place {', '.join(f'{{{place}}}' for place in missing)}")
    return text


def split_options(rest: str, known: dict[str, str], spec: str) -> tuple[str, dict[str, str]]:
    """(what is before the options, every known option with its value). Raises `ConfigError` for others."""
    parts = re.split(r",(?=[a-z-]+=)", rest)
    options = dict(known)
    for part in parts[1:]:
        name, _, value = part.partition("=")
        if name not in known:
            raise ConfigError(f"--judge {kind_only(spec)}: {name} is no option; there are {', '.join(known)}")
        options[name] = value
    return parts[0], options


def number(spec: str, name: str, text: str, *, least: float) -> float:
    """A finite number that is at least `least`. Raises `ConfigError`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise ConfigError(f"--judge {spec}: {name}={text} is not a number of at least {least:g}")
    return value


def score_by_gold(questions: Questions, answers: Sequence[Answers]) -> list[list[float]]:
    """The world's gold score."""
    prompts = questions.bare_texts
    return [[gold_score(prompt, text) for prompt, text in zip(prompts, a.texts, strict=True)] for a in answers]


def score_by_head(run: Path, setting: Setting, questions: Questions, answers: Sequence[Answers]) -> list[list[float]]:
    """A run's reward head, which reads prompts and answers by that run's tokenizer and template."""
    finished = setting.loaded or load_finished(run, "last", trust_remote_code=setting.trust_remote_code)
    if "reward" not in finished.model.table:
        raise ConfigError(f"{run} has no reward head to judge with: name a run that has one (reward-head:RUN)")
    model, chat, limits = finished.model, finished.chat, finished.limits
    return [score_texts(model, chat, questions.prompts, a.texts, a.ended, limits=limits) for a in answers]


def score_by_classifier(
    config: ClassifierSource, setting: Setting, questions: Questions, answers: Sequence[Answers]
) -> list[list[float]]:
    """A reward model of others, loaded once."""
    classifier = Classifier(config, trust_remote_code=setting.trust_remote_code)
    return [classifier.score(questions.texts, questions.prompts, a.texts) for a in answers]


def score_by_rule(rule: RewardFunction, questions: Questions, answers: Sequence[Answers]) -> list[list[float]]:
    """A Python function `(prompts, responses, **columns) -> one float per response`. Raises `RewardFunctionError`."""
    names = sorted({name for row in questions.columns for name in row})
    columns = columns_taken(rule, {name: [row.get(name) for row in questions.columns] for name in names})
    found: list[list[float]] = []
    for a in answers:
        try:
            outcomes = check_returned(rule(questions.texts, list(a.texts), **columns), a.num_tokens)
        except Exception as error:  # whatever the user's function raises
            raise RewardFunctionError(f"the rule raised {type(error).__name__}: {error}") from error
        for row, reason in failures(outcomes):
            raise RewardFunctionError(f"row {row}: the rule {reason}")
        found.append([sum(o) if isinstance(o, list) else o for o in outcomes if not isinstance(o, Failure)])
    return found
