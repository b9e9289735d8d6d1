"""What the page's inspector reads: kept samples with their tokens, the colours' scales, and the curves beside them."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_rlhf.reporting import plots
from hydra_rlhf.reporting.record import RunRecord, Sample, Tokens

MAX_CHARACTERS = 4000
"""Longer texts are cut in the page: prompts on the left, responses on the right, at a token."""
MAX_SAMPLE_BYTES = 6_500_000
"""Samples beyond this much JSON are left out of the page, which then stays under 8 MB."""
MAX_CURVE_POINTS = 150
"""Points of a curve in the strip above the samples."""
DIGITS = 3
"""Significant digits of a token's numbers; their text is most of the page."""
FULL_COLOUR = 0.98
"""Share of the tokens whose colour is not yet at its strongest, so that one odd token does not pale all others."""
CONTROL_CHARACTERS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
"""Control characters are shown as their Unicode pictures."""
KIND_ORDER = ("evaluation", "held_out", "rollout")
"""Kinds of samples, those first that the page should not lose."""
STRIP = {
    "Score": "Score",
    "KL from the reference": "KL",
    "Entropy": "Entropy",
    "Response length": "Length",
    "Explained variance": "Expl. variance",
    "Held back by the clip": "Clipped",
}
"""The curves beside the samples: titles of the large ones, and shorter ones."""
SPECS = {spec.title: spec for spec in plots.PPO}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A number of every token that the page can colour by."""

    key: str
    """Its name in the token records."""
    label: str
    unit: str
    words: str
    """What it is and how its colours read."""
    around_median: bool = False
    """Whether colours start at the median of all tokens; else at zero."""


QUANTITIES = (
    Quantity(
        key="kl",
        label="KL",
        unit="nats",
        words="Log-prob of the actor minus that of the reference. Orange: the actor finds the token likelier than the "
        "reference does; blue: less likely. Over the actor's own response the tokens add up to its KL.",
    ),
    Quantity(
        key="advantage",
        label="Advantage",
        unit="standard deviations",
        words="What the update was told about the token, standardised over the rollout. Orange: better than expected, "
        "made likelier; blue: worse, made less likely.",
    ),
    Quantity(
        key="value",
        label="Value",
        unit="score",
        words="What the critic expected before the token, as shaped score still to come. White is the median of all "
        "tokens; a step in colour is where the critic changed its mind.",
        around_median=True,
    ),
    Quantity(
        key="reward",
        label="Reward",
        unit="score",
        words="What the token was paid: the shaped score at the last one, per-token rewards, minus the KL where it is "
        "part of the reward.",
    ),
    Quantity(
        key="change",
        label="Log-prob change",
        unit="nats",
        words="In rollouts: log-prob after this step's update minus log-prob when sampled. Before and after: the final "
        "actor's minus the reference's, what all of training did. Orange: likelier now.",
    ),
)


def inspector_data(record: RunRecord) -> dict[str, Any] | None:
    """Everything the inspector shows, ready for JSON; None where no sample was kept."""
    entries = [(sample, sample_entry(sample)) for sample in record.samples if sample.kind in KIND_ORDER]
    kept = within_budget(entries)
    if not kept:
        return None
    values = {quantity.key: values_of((sample for sample, _ in kept), quantity.key) for quantity in QUANTITIES}
    return {
        "samples": [entry for _, entry in kept],
        "numLeftOut": len(entries) - len(kept),
        "quantities": [
            {
                "key": quantity.key,
                "label": quantity.label,
                "unit": quantity.unit,
                "words": quantity.words,
                **scale_of(found, around_median=quantity.around_median),
            }
            for quantity in QUANTITIES
            if (found := values[quantity.key])
        ],
        "curves": [curve for title in STRIP if (curve := strip_curve(record, SPECS[title])) is not None],
    }


def sample_entry(sample: Sample) -> dict[str, Any]:
    """One sample as the page has it; what is not known is not there."""
    prompt = sample.prompt[-MAX_CHARACTERS:]
    sides = {"actor": side_entry(sample.response, sample.tokens, sample.score, sample.gold, sample.ended)}
    if sample.reference_response is not None:
        sides["reference"] = side_entry(
            sample.reference_response,
            sample.reference_tokens,
            sample.reference_score,
            sample.reference_gold,
            sample.reference_ended,
        )
    entry = {
        "kind": sample.kind,
        "step": sample.step,
        "prompt": prompt.translate(CONTROL_CHARACTERS),
        "promptCut": len(sample.prompt) - len(prompt) or None,
        "kl": short(sample.kl),
        "sources": {name: short(score) for name, score in sample.sources.items()} or None,
    }
    return known(entry) | sides


def side_entry(
    text: str, tokens: Tokens | None, score: float | None, gold: float | None, ended: bool | None
) -> dict[str, Any]:
    """One response with its tokens, or as plain text where they were not kept or are not this text's."""
    entry: dict[str, Any] = {"score": short(score, 5), "gold": short(gold, 5), "ended": ended}
    if tokens is None or "".join(tokens.pieces) != text:
        shown = text[:MAX_CHARACTERS]
        entry |= {"text": shown.translate(CONTROL_CHARACTERS)}
        num_shown = len(shown)
    else:
        count, num_shown = fitting(tokens.pieces, MAX_CHARACTERS)
        entry |= {
            "pieces": [piece.translate(CONTROL_CHARACTERS) for piece in tokens.pieces[:count]],
            "names": {place: name for place, name in tokens.names.items() if place.isdigit() and int(place) < count},
            "ids": list(tokens.ids[:count]) or None,
            "numTokens": len(tokens.pieces),
            "numbers": {name: short_list(values[:count]) for name, values in tokens.numbers.items()},
        }
    return known(entry | {"cut": len(text) - num_shown or None})


def fitting(pieces: Sequence[str], limit: int) -> tuple[int, int]:
    """(tokens, characters) of the longest start that has at most `limit` characters."""
    length = 0
    for count, piece in enumerate(pieces):
        if length + len(piece) > limit:
            return count, length
        length += len(piece)
    return len(pieces), length


def within_budget(entries: Sequence[tuple[Sample, dict[str, Any]]]) -> list[tuple[Sample, dict[str, Any]]]:
    """The samples the page can hold, in the run's order: before and after first, of the steps every second, third, ...

    Thinning whole steps keeps what is shown comparable over the run; its last step always stays.
    """
    sizes = [len(script_json(entry).encode("utf-8", errors="replace")) for _, entry in entries]
    steps = sorted({sample.step for sample, _ in entries if sample.kind != "evaluation"}, reverse=True)
    stride = 1
    while True:
        chosen = set(steps[::stride])
        shown = [i for i, (sample, _) in enumerate(entries) if sample.kind == "evaluation" or sample.step in chosen]
        if sum(sizes[i] for i in shown) <= MAX_SAMPLE_BYTES or stride >= len(steps):
            break
        stride += 1
    # Texts so long that even this is too much: as many as fit, the most telling kinds first.
    shown.sort(key=lambda i: KIND_ORDER.index(entries[i][0].kind))
    total, fit = 0, []
    for i in shown:
        total += sizes[i]
        if total > MAX_SAMPLE_BYTES:
            break
        fit.append(i)
    return [entries[i] for i in sorted(fit)]


def values_of(samples: Iterable[Sample], key: str) -> list[float]:
    """All finite numbers of a name, over all tokens of both sides."""
    return [
        value
        for sample in samples
        for tokens in (sample.tokens, sample.reference_tokens)
        if tokens is not None
        for value in tokens.numbers.get(key, ())
        if math.isfinite(value)
    ]


def scale_of(values: Sequence[float], *, around_median: bool) -> dict[str, float]:
    """{centre, limit}: where colours start, and how far from there they are at their strongest."""
    centre = statistics.median(values) if around_median else 0.0
    distances = sorted(abs(value - centre) for value in values)
    return {"centre": centre, "limit": distances[min(len(values) - 1, math.floor(FULL_COLOUR * len(values)))]}


def strip_curve(record: RunRecord, spec: plots.Lines) -> dict[str, Any] | None:
    """One small curve: its lines, thinned; None where the run logged none of them."""
    lines = []
    for key, name in spec.lines:
        series = record.series("ppo", key)
        if series is not None and key not in plots.SECOND:
            steps, values = plots.group_means(series, MAX_CURVE_POINTS)
            lines.append({"name": name, "steps": steps, "values": short_list(values)})
    return (
        known({"title": STRIP[spec.title], "unit": spec.unit, "floor": spec.floor, "lines": lines}) if lines else None
    )


def short(value: float | None, digits: int = DIGITS) -> float | None:
    """A number with few digits; None for what is not finite."""
    return None if value is None else short_list((value,), digits)[0]


def short_list(values: Sequence[float], digits: int = DIGITS) -> list[float | None]:
    """Numbers with few digits, None where not finite. Whole ones lose their point, which JSON does not need."""
    rounded = (float(f"{value:.{digits}g}") for value in values)
    return [
        None if not math.isfinite(value) else int(value) if value.is_integer() and abs(value) < 1e6 else value
        for value in rounded
    ]


def known(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry without what is None."""
    return {key: value for key, value in entry.items() if value is not None}


def script_json(content: Any) -> str:
    """JSON that cannot end the script element it stands in, nor begin a comment or another element there."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
