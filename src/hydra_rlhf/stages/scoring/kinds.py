"""From the settings of a source to a source that can be asked, for every kind there is."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from hydra_rlhf.config import ModelConfig, RewardConfig
from hydra_rlhf.config_rewards import ClassifierSource, FunctionSource, HttpSource
from hydra_rlhf.model.classifier import Classifier
from hydra_rlhf.stages.reward_fn import RewardFunction, call_reward_fn, import_function, load_reward_fn
from hydra_rlhf.stages.scoring.isolated import IsolatedFunction
from hydra_rlhf.stages.scoring.outcomes import Outcome, ScoreRequest, check_returned
from hydra_rlhf.stages.scoring.reward_sources import OpenSource, RewardSources, function_source
from hydra_rlhf.stages.scoring.rules import score_keywords, score_length, score_regex, score_repetition
from hydra_rlhf.stages.scoring.service import RewardService


@contextmanager
def open_sources(
    reward: RewardConfig,
    *,
    reward_fn: RewardFunction | None = None,
    model: ModelConfig | None = None,
    trust_remote_code: bool = False,
) -> Iterator[RewardSources]:
    """The sources that the settings name, and a function given in Python (else that of the settings), as long as the
    `with` lasts. Checks what can be checked without weights: raises `ConfigError` or `ModelError`."""
    function = reward_fn or load_reward_fn(reward.reward_fn)
    first = [] if function is None else [function_source(function, reward)]
    offline = model is not None and model.offline
    with ExitStack() as stack:
        opened = [
            OPENERS[config.kind](config, stack, offline=offline, trust_remote_code=trust_remote_code)
            for config in reward.sources
        ]
        yield RewardSources(sources=(*first, *opened))


def open_rule(config: Any, stack: ExitStack, **_: bool) -> OpenSource:
    """One of the built-in rules."""
    del stack
    rules: Mapping[str, Callable[..., list[Outcome]]] = {
        "length": score_length,
        "regex": score_regex,
        "repetition": score_repetition,
        "keywords": score_keywords,
    }
    return OpenSource(config=config, call=partial(rules[config.kind], config))


def open_function(config: FunctionSource, stack: ExitStack, **_: bool) -> OpenSource:
    """A function, in this process or in one of its own."""
    if not config.isolate:
        setting = f"function={config.function!r} of the reward source {config.name!r}"
        call = partial(call_reward_fn, import_function(config.function, setting=setting))
        return OpenSource(config=config, call=call, batch_rows=config.batch_rows)
    isolated = IsolatedFunction(config.function, timeout_s=config.timeout_s)
    stack.callback(isolated.close)
    isolated.wait_until_ready()
    return OpenSource(config=config, call=isolated, batch_rows=config.batch_rows)


def open_http(config: HttpSource, stack: ExitStack, **_: bool) -> OpenSource:
    """A remote reward service; it is first asked when there is something to score."""
    del stack
    return OpenSource(config=config, call=RewardService(config), batch_rows=config.batch_rows)


def open_classifier(config: ClassifierSource, stack: ExitStack, **options: bool) -> OpenSource:
    """An external reward model; its weights are loaded by `prepare`, or when it is first asked."""
    del stack
    classifier = Classifier(config, **options)

    def call(request: ScoreRequest) -> list[Outcome]:
        scores = classifier.score(request.prompts, request.originals, request.responses)
        return check_returned(scores, request.lengths)

    return OpenSource(config=config, call=call, prepare=classifier.load)


OPENERS: Mapping[str, Callable[..., OpenSource]] = {
    **dict.fromkeys(("length", "regex", "repetition", "keywords"), open_rule),
    "function": open_function,
    "http": open_http,
    "classifier": open_classifier,
}
"""How each kind is opened."""
