"""The settings of reward sources, one class per kind: what a recipe lists under `ppo.reward.sources`. No torch."""

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, dataclasses

from hydra_rlhf.config_checks import STRICT, Count, Finite, Positive, PositiveInt
from hydra_rlhf.errors import ConfigError

RESERVED_NAMES = ("head", "reward_fn")
"""How the reward head and `ppo.reward.reward_fn` are named beside the sources."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """What every source of scores has, whatever its kind."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name in the log (`reward/NAME_mean`); lower case, each name once."""
    weight: Finite = 1.0
    """Weight of its scores in the sum."""
    normalize: bool = False
    """Divide its scores by their running standard deviation before they are weighed (the mean is kept)."""
    on_failure: Literal["raise", "mask", "value"] = "raise"
    """A response it cannot score ends the run, is left out of all learning, or gets `failure_value`."""
    failure_value: Finite = 0.0
    """The score of such a response with `on_failure: value`, before normalisation and weight."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class LengthSource(SourceConfig):
    """Rule: 0 at the wanted length, and less the further a response is from it."""

    kind: Literal["length"]
    """`length`."""
    unit: Literal["tokens", "words", "characters"] = "tokens"
    """What is counted: response tokens (the stop token included), words, or characters."""
    target: PositiveInt | None = None
    """Score -|length - target| / target."""
    maximum: PositiveInt | None = None
    """Score -(length - maximum) / maximum above the maximum, 0 up to it; with `target` both are added."""

    def __post_init__(self) -> None:
        if self.target is None and self.maximum is None:
            raise ConfigError(f"the length source {self.name!r} has neither a target nor a maximum; set one")


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class RegexSource(SourceConfig):
    """Rule: 1 where a response has the wanted form, else 0."""

    kind: Literal["regex"]
    """`regex`."""
    pattern: str
    """Python regular expression; `.` matches line ends too."""
    whole: bool = True
    """The whole response has to match, or (false) any part of it."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"the pattern {self.pattern!r} of the regex source {self.name!r} is no regular expression: {error}"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class RepetitionSource(SourceConfig):
    """Rule: minus the share of a response's token n-grams that have occurred in it before; 0 is best, above -1."""

    kind: Literal["repetition"]
    """`repetition`."""
    ngram: PositiveInt = 3
    """n: how many tokens make one n-gram."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class KeywordsSource(SourceConfig):
    """Rule: share of the wanted words that occur minus share of the unwanted ones that do; case does not matter."""

    kind: Literal["keywords"]
    """`keywords`."""
    wanted: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Words or phrases that should occur."""
    unwanted: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Words or phrases that should not."""

    def __post_init__(self) -> None:
        if not self.wanted and not self.unwanted:
            raise ConfigError(f"the keywords source {self.name!r} has neither wanted nor unwanted words; name some")


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class FunctionSource(SourceConfig):
    """A Python function `(prompts, responses, **columns) -> floats (or per-token lists)`."""

    kind: Literal["function"]
    """`function`."""
    function: str
    """`module:function`; the folder you start in is searched."""
    batch_rows: PositiveInt | None = None
    """Responses per call, and so how many fail together; none = all of a step in one call."""
    isolate: bool = False
    """Run it in a process of its own, which is killed and started again where it hangs or ends."""
    timeout_s: Positive | None = None
    """Seconds one call may take (needs `isolate`: a thread cannot be stopped from outside); none = no limit."""

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.isolate:
            raise ConfigError(
                f"timeout_s={self.timeout_s} of the function source {self.name!r} needs a process that can be killed; "
                "set its isolate: true, or remove timeout_s"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class HttpSource(SourceConfig):
    """A reward service: POST {prompts, responses, columns} as JSON, answered by {"scores": [...]}."""

    kind: Literal["http"]
    """`http`."""
    url: Annotated[str, Field(pattern=r"^https?://[^\s/@]+(/[^\s@]*)?$")]
    """Where to post; without user name and password."""
    columns: tuple[str, ...] = ()
    """Columns of the data that are sent along."""
    batch_rows: PositiveInt | None = None
    """Responses per request; none = all of a step in one."""
    timeout_s: Positive = 60.0
    """Seconds one request may take, its retries included."""
    num_retries: Count = 2
    """Further attempts where it cannot be reached or answers 429 or 5xx, after 0.5 s, 1 s, 2 s, ..."""
    token_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable whose value is sent as bearer token; the value itself is written nowhere."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class ClassifierSource(SourceConfig):
    """Any sequence-classification model of transformers, with its own tokenizer and base (safetensors only)."""

    kind: Literal["classifier"]
    """`classifier`."""
    path: str
    """Hub name or local folder."""
    revision: str | None = None
    """Hub revision to pin."""
    label: Count | None = None
    """Which output is the score; needed where the model has several."""
    join: Literal["auto", "template", "pair", "text"] = "auto"
    """How prompt and response meet: its chat template, a text pair, one text; `auto`: its template, else one text."""
    max_tokens: PositiveInt = 1024
    """Longer inputs lose tokens on the left."""
    batch_rows: PositiveInt = 8
    """Responses per forward, a memory knob only."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of its weights."""
    device: str = "auto"
    """As `model.device`. Its memory comes on top of what `memory.budget` names."""


Source: TypeAlias = Annotated[
    LengthSource | RegexSource | RepetitionSource | KeywordsSource | FunctionSource | HttpSource | ClassifierSource,
    Field(discriminator="kind"),
]
"""One entry of `ppo.reward.sources`; `kind` says which."""


def check_names(sources: tuple[SourceConfig, ...]) -> None:
    """Raise `ConfigError` where two sources share a name, or one has a name that is taken."""
    seen: set[str] = set(RESERVED_NAMES)
    for source in sources:
        if source.name in seen:
            raise ConfigError(
                f"ppo.reward.sources has a source named {source.name!r}, but that name is taken "
                f"({', '.join(RESERVED_NAMES)} are the reward head and reward_fn); name each source once"
            )
        seen.add(source.name)
