"""What a report knows of a run: a typed, frozen record that `collect.py` fills and the rest of the report reads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hydra_rlhf.model.roles import Role

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One metric of one stage over its steps, in step order."""

    steps: tuple[int, ...]
    """Steps at which the metric was logged; evaluation metrics skip most of them."""
    values: tuple[float, ...]
    """One value per step; NaN and infinities are kept as the run logged them."""

    def finite(self) -> list[tuple[int, float]]:
        """(step, value) without the values that are not finite."""
        return [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]

    def start(self) -> float | None:
        """Mean of the first tenth of the finite values (at least one); None where there are none."""
        values = [value for _, value in self.finite()]
        return _mean(values[: math.ceil(len(values) / 10)])

    def end(self) -> float | None:
        """Mean of the last tenth of the finite values (at least one); None where there are none."""
        values = [value for _, value in self.finite()]
        return _mean(values[len(values) - math.ceil(len(values) / 10) :])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of one response, with what roles and learning said of each (docs/metrics.md, Samples)."""

    pieces: tuple[str, ...]
    """What each token adds to the text; they join to the response."""
    names: Mapping[str, str]
    """Names of tokens that their piece does not show, by position."""
    ids: tuple[int, ...]
    """Ids in the vocabulary; empty where they were not kept."""
    numbers: Mapping[str, tuple[float, ...]]
    """One number per token, by name; NaN where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response kept as text; `reference_*` only in the final comparison (kind `evaluation`)."""

    stage: str
    step: int
    kind: str
    """`rollout`, `held_out` or `evaluation`."""
    prompt: str
    response: str
    score: float | None
    kl: float | None
    """Nats over the response."""
    reference_response: str | None
    reference_score: float | None
    gold: float | None
    reference_gold: float | None
    ended: bool | None = None
    """Whether the response ends by itself, and not at the length limit."""
    reference_ended: bool | None = None
    sources: Mapping[str, float] = field(default_factory=dict)
    """What each source of the reward says of the response, where there are several."""
    tokens: Tokens | None = None
    reference_tokens: Tokens | None = None

    @property
    def gain(self) -> float | None:
        """Actor's score minus the reference's, where both exist."""
        return None if self.score is None or self.reference_score is None else self.score - self.reference_score

    @property
    def gold_gain(self) -> float | None:
        """Actor's gold score minus the reference's, where both exist."""
        return None if self.gold is None or self.reference_gold is None else self.gold - self.reference_gold


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodBytes:
    """Counted bytes of one method's tensors."""

    trunks: float
    adapters: float
    heads: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Sum of the parts, in bytes."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to cut a stage's work that the memory plan looked at."""

    micro_batch_tokens: float
    rollout_rows: float
    checkpointed_layers: float
    peak: float
    """Planned bytes of the stage's largest phase."""
    relative_time: float
    """Of an update, against large micro-batches without recomputation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a stage was cut to fit its budget."""

    stage: str
    fits: bool
    budget: float
    """Bytes that tensors could take."""
    chosen: Option
    options: tuple[Option, ...]
    """All that were looked at, the chosen one among them."""
    phases: Mapping[str, Mapping[str, float]]
    """Planned bytes, {phase: {part: bytes}}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What was read of one data split, and what was dropped or cut."""

    name: str
    source: str
    format: str
    rows_read: float | None
    rows_used: float | None
    dropped: Mapping[str, float]
    """Rows by the reason they were left out."""
    cut: Mapping[str, float]
    """Rows that lost tokens, by `prompt_tokens_cut` and `response_tokens_cut`."""
    longer_wins: float | None
    """Share of pairs whose longer side is the chosen one."""
    prompt_tokens: Mapping[str, float]
    """Percentiles `p10`, `p50`, `p90` and `max`."""
    response_tokens: Mapping[str, float]
    """Percentiles `p10`, `p50`, `p90` and `max`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one judge of `hydra-rlhf eval --judge` says of the actor against its start."""

    file: str
    """The evaluation's file in the run folder."""
    judge: str
    rate: float
    """Share of prompts where the actor wins, ties half."""
    interval: Interval | None
    controlled_rate: float | None
    """The same at equal length."""
    controlled_interval: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The few numbers of a finished run (docs/metrics.md, Summary); None where they do not apply."""

    checkpoint: str | None = None
    num_prompts: float | None = None
    gold_win_rate: float | None = None
    gold_win_rate_ci: Interval | None = None
    gold_length_controlled_win_rate: float | None = None
    gold_length_controlled_win_rate_ci: Interval | None = None
    score_win_rate: float | None = None
    score_win_rate_ci: Interval | None = None
    score_length_controlled_win_rate: float | None = None
    score_length_controlled_win_rate_ci: Interval | None = None
    reward_accuracy: float | None = None
    reward_accuracy_ci: Interval | None = None
    longer_wins_accuracy: float | None = None
    gold_accuracy: float | None = None
    perplexity: float | None = None
    calibration_error: float | None = None
    calibration_error_ci: Interval | None = None
    kl: float | None = None
    score_mean: float | None = None
    reference_score_mean: float | None = None
    gold_mean: float | None = None
    reference_gold_mean: float | None = None
    response_tokens_mean: float | None = None
    reference_response_tokens_mean: float | None = None
    eos_frac: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    reference_distinct_1: float | None = None
    reference_distinct_2: float | None = None
    peak_rss_bytes: float | None = None
    wall_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Everything a report says about a run, as read from its folder."""

    name: str
    finished: bool
    """True where the run wrote its summary."""
    method: str | None
    recipe_text: str | None
    """`recipe.yaml` as it is."""
    recipe: Mapping[str, Any]
    """`recipe.yaml`, parsed; empty where missing."""
    environment: Mapping[str, Any]
    curves: Mapping[str, Mapping[str, Series]]
    """{stage: {metric: series}}, stages in the order in which they ran."""
    samples: tuple[Sample, ...]
    roles: Mapping[str, Role]
    """The run's role table, from memory.json or from the method's name; empty where neither is known."""
    bytes_trained: Mapping[str, float]
    """Bytes of the tensors each role trains."""
    memory_dtype: str | None
    methods: Mapping[str, MethodBytes]
    """Counted bytes of every method at this run's model and settings."""
    plan: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Planned bytes of methods with this run's settings, {method: {phase: {part: bytes}}}; its own alone until it has
    finished."""
    decisions: tuple[Decision, ...]
    """How the memory plan cut each stage of this run."""
    measured: Mapping[str, Mapping[str, float]]
    """Measured bytes, {phase: {what: bytes}}."""
    splits: tuple[Split, ...]
    summary: Summary
    verdicts: tuple["Verdict", ...] = field(default=())
    """What judges said in evaluations after the run."""
    problems: tuple[str, ...] = field(default=())
    """What could not be read, in words."""

    def setting(self, name: str) -> Any:
        """The recipe's value at a dotted name such as `ppo.kl_coef`; None where the recipe does not say."""
        value: Any = self.recipe
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def measured_bytes(self, phase: str) -> float | None:
        """Bytes of tensors at the worst moment of a phase, as the plan counts them; None where they were not counted.

        Exact ones where all tensors were tracked, else those of the CUDA allocator; resident memory is another thing.
        """
        seen = self.measured.get(phase, {})
        return seen.get("peak_tensor_bytes", seen.get("cuda_peak_allocated_bytes"))

    def series(self, stage: str, metric: str) -> Series | None:
        """One metric's series, where it holds at least one finite value."""
        series = self.curves.get(stage, {}).get(metric)
        return series if series is not None and series.finite() else None

    def comparison(self) -> tuple[Sample, ...]:
        """The samples worth showing: the final before/after comparison, else what an unfinished run sampled last."""
        for kind in ("evaluation", "held_out", "rollout"):
            of_kind = [sample for sample in self.samples if sample.kind == kind]
            if of_kind:
                last = max(sample.step for sample in of_kind)
                return tuple(sample for sample in of_kind if sample.step == last)
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something a reader should know before trusting the run."""

    title: str
    text: str
    remedy: str


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
