"""The built-in world: a shop's help desk with noisy preferences and a gold score that training never sees. No torch.

A prompt is a stock note of three facts and a customer's question about one of them; the answer can be copied from the
note. A reply is an opening, an answer, a remark and a farewell, each drawn on its own: wanted, missing or faulty.
`gold_score` reads a reply sentence by sentence. Every sentence is one of four wanted ones (greeting, answer, offer,
farewell), wanted once each, or it costs points, so nothing can be gained by saying more.

Preferences follow Bradley and Terry (1952): of two replies to a prompt, `first` is chosen with probability
sigmoid((gold(first) - gold(second)) / TEMPERATURE). Pairs whose gold differs by less than `MIN_GAP` are drawn again.

Held-out prompts ask for a combination of product, attribute and value that no training text contains, though every
product, attribute and value occurs in training: one value in five is held out for each product and attribute.
"""

import random
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil, exp
from typing import Literal

from hydra_rlhf.data import world_text as text
from hydra_rlhf.data.rows import PreferencePair
from hydra_rlhf.errors import ConfigError

Split = Literal["train", "test"]
Kind = Literal["greeting", "answer", "offer", "farewell", "rude", "filler", "unknown"]

WORLD = "world"
"""What `data.train` calls it."""
GOLD_RANGE = (0.0, 10.0)
"""Lowest and highest gold score: 4 for the right answer and 2 each for greeting, offer and farewell make 10."""
ANSWER_POINTS = 4.0
"""For stating exactly the fact that was asked for, and no other."""
WRONG_VALUE_POINTS = 1.0
"""For an answer to the right question with a wrong value."""
COURTESY_POINTS = 2.0
"""Each for a greeting first, an offer of help anywhere, and a farewell last."""
WRONG_ANSWER_SHARE = 0.6
"""Share of the courtesy points that a reply without the right answer keeps."""
FAULT_POINTS: dict[Kind, float] = {"rude": 1.5, "filler": 1.0, "unknown": 1.5}
"""Lost per sentence of the kind; an unknown sentence (garbled, unfinished) costs this per started 8 words."""
WORDS_PER_UNKNOWN_FAULT = 8
"""Words of an unknown sentence that cost one fault."""
REPETITION_POINTS = 1.0
"""Lost for each greeting, answer, offer or farewell after the first."""

TEMPERATURE = 1.8
"""Gold points per unit of Bradley–Terry log-odds; gold itself then ranks about 87 % of the pairs right."""
MIN_GAP = 1.5
"""Smallest difference in gold, in points, between the two replies of a pair."""
MAX_PROMPTS = 50_000
"""Most distinct prompts drawn per split; 90,000 exist in the test split and 230,400 in training."""

NUM_NOTES = 3
"""Facts in a stock note."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One combination, such as (lamp, colour, red)."""

    product: str | None
    """Name of the product; None where a reply says "it"."""
    attribute: str
    """Key of `world_text.ATTRIBUTES`."""
    value: str
    """One of the attribute's values."""


def gold_score(prompt: str, response: str) -> float:
    """How good `response` is as a reply to `prompt`, within `GOLD_RANGE`; defined for every pair of strings.

    answer (4, or 1 for a wrong value) + courtesy (2 each for greeting first, offer, farewell last; 60 % of it without
    the right answer) - faults (1.5 per rude sentence, 1 per filler, 1 per repetition, 1.5 per started 8 words of an
    unknown sentence), held in [0, 10]. Stating two different facts is no answer. A prompt from elsewhere scores 0.
    """
    asked = asked_fact(prompt)
    sentences = _read_reply(response)
    if asked is None or not sentences:
        return GOLD_RANGE[0]

    kinds = [sentence.kind for sentence in sentences]
    # "It" is the product that was asked for.
    facts = [sentence.fact for sentence in sentences if sentence.fact]
    stated = {Fact(fact.product or asked.product, fact.attribute, fact.value) for fact in facts}
    is_right = stated == {asked}
    answer = ANSWER_POINTS if is_right else 0.0
    if len(stated) == 1 and not is_right:
        (fact,) = stated
        answer = WRONG_VALUE_POINTS * ((fact.product, fact.attribute) == (asked.product, asked.attribute))

    courtesy = COURTESY_POINTS * ((kinds[0] == "greeting") + ("offer" in kinds) + (kinds[-1] == "farewell"))
    faults = sum(sentence.fault_points for sentence in sentences)
    for kind in ("greeting", "answer", "offer", "farewell"):
        faults += REPETITION_POINTS * max(0, kinds.count(kind) - 1)
    total = answer + courtesy * (1.0 if is_right else WRONG_ANSWER_SHARE) - faults
    return min(max(total, GOLD_RANGE[0]), GOLD_RANGE[1])


@lru_cache(maxsize=4096)
def asked_fact(prompt: str) -> Fact | None:
    """The fact that answers the prompt's question; None if the prompt is not one of this world's."""
    match = re.fullmatch(r"Stock note: (\w+), ([^\n]*)\.\nCustomer: ([^\n]*)", prompt)
    if match is None or match[3] not in _questions():
        return None
    product, attribute = _questions()[match[3]]
    stated = dict(_notes().get(note, ("", "")) for note in match[2].split(", "))
    if product != match[1] or attribute not in stated:
        return None
    return Fact(product, attribute, stated[attribute])


def is_held_out(fact: Fact) -> bool:
    """Whether the combination is kept out of every training text: a Latin square over products and values."""
    assert fact.product is not None
    attribute = list(text.ATTRIBUTES).index(fact.attribute)
    values = text.ATTRIBUTES[fact.attribute].values
    return (text.PRODUCTS.index(fact.product) + attribute + values.index(fact.value)) % len(values) == 0


def world_pairs(num_pairs: int, seed: int, test_frac: float) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """`num_pairs` pairs over as many distinct prompts, (train, test): `test_frac` of them test, at least one each.

    The same arguments give the same pairs, and the first test prompts do not depend on how many there are. ConfigError
    for fewer than two pairs, for a split that would be empty, or for more prompts than `world_prompts` gives.
    """
    if num_pairs < 2:
        raise ConfigError(f"data.world_pairs={num_pairs} leaves a split empty; use at least 2")
    if not 0 < test_frac < 1:
        empty = "training" if test_frac else "test"
        raise ConfigError(f"data.test_frac={test_frac:g} leaves the {empty} split empty; use e.g. 0.1")
    num_test = min(max(1, round(test_frac * num_pairs)), num_pairs - 1)
    return _pairs("train", num_pairs - num_test, seed), _pairs("test", num_test, seed)


def world_prompts(split: Split, num: int, seed: int) -> list[str]:
    """`num` distinct prompts, those of `world_pairs` with the same seed first; no prompt is in both splits.

    ConfigError for more than `MAX_PROMPTS`.
    """
    return [prompt for prompt, _ in _draw_prompts(split, num, seed)]


@dataclass(frozen=True, slots=True)
class _Sentence:
    """One sentence of a reply as the gold score sees it."""

    kind: Kind
    fact: Fact | None = None
    fault_points: float = 0.0


@lru_cache(maxsize=4096)
def _read_reply(response: str) -> tuple[_Sentence, ...]:
    """The sentences of a reply; letter case and white space do not matter, punctuation does.

    What stands after the last end mark is a sentence too, and an unknown one.
    """
    sentences = re.findall(r"[^.!?]*[.!?]|[^.!?]+$", " ".join(response.lower().split()))
    return tuple(_sentences().get(sentence.strip()) or _unknown(sentence) for sentence in sentences)


def _unknown(sentence: str) -> _Sentence:
    num_faults = ceil(len(sentence.split()) / WORDS_PER_UNKNOWN_FAULT)
    return _Sentence("unknown", fault_points=FAULT_POINTS["unknown"] * num_faults)


@cache
def _sentences() -> dict[str, _Sentence]:
    """Every sentence the world knows, in lower case."""
    kinds: dict[Kind, tuple[str, ...]] = {
        "greeting": text.GREETINGS,
        "offer": text.OFFERS,
        "farewell": text.FAREWELLS,
        "rude": text.RUDE_OPENINGS + text.RUDE_REMARKS + text.RUDE_FAREWELLS,
        "filler": text.FILLER_OPENINGS + text.FILLER_REMARKS + text.HEDGES,
    }
    known = {
        sentence.lower(): _Sentence(kind, fault_points=FAULT_POINTS.get(kind, 0.0))
        for kind, sentences in kinds.items()
        for sentence in sentences
    }
    for name, attribute in text.ATTRIBUTES.items():
        for value in attribute.values:
            for answer in attribute.answers:
                for product in text.PRODUCTS if "{product}" in answer else (None,):
                    sentence = answer.format(product=product, value=value).lower()
                    known[sentence] = _Sentence("answer", Fact(product, name, value))
    return known


@cache
def _notes() -> dict[str, tuple[str, str]]:
    """(attribute, value) of every entry a stock note can hold."""
    return {a.note.format(value=value): (name, value) for name, a in text.ATTRIBUTES.items() for value in a.values}


@cache
def _questions() -> dict[str, tuple[str, str]]:
    """(product, attribute) of every question."""
    return {
        question.format(product=product): (product, name)
        for product in text.PRODUCTS
        for name, attribute in text.ATTRIBUTES.items()
        for question in attribute.questions
    }


@cache
def _values(product: str | None, attribute: str, *, held_out: bool) -> tuple[str, ...]:
    """The attribute's values whose combination with the product is held out, or is not."""
    values = text.ATTRIBUTES[attribute].values
    return tuple(value for value in values if is_held_out(Fact(product, attribute, value)) == held_out)


def _draw_prompts(split: Split, num: int, seed: int) -> list[tuple[str, tuple[Fact, ...]]]:
    """Distinct prompts with the facts of their stock notes, the asked one first."""
    if num > MAX_PROMPTS:
        raise ConfigError(f"the built-in world has no {num} distinct {split} prompts; ask for at most {MAX_PROMPTS}")
    rng = random.Random(f"world {split} prompts {seed}")
    drawn: dict[str, tuple[Fact, ...]] = {}
    while len(drawn) < num:
        product = rng.choice(text.PRODUCTS)
        asked, *others = rng.sample(list(text.ATTRIBUTES), NUM_NOTES)
        facts = [
            Fact(product, name, rng.choice(_values(product, name, held_out=split == "test" and name == asked)))
            for name in (asked, *others)
        ]
        question = rng.choice(text.ATTRIBUTES[asked].questions).format(product=product)
        in_order = rng.sample(facts, len(facts))
        notes = ", ".join(text.ATTRIBUTES[fact.attribute].note.format(value=fact.value) for fact in in_order)
        drawn[text.PROMPT.format(product=product, notes=notes, question=question)] = tuple(facts)
    return list(drawn.items())


def _pairs(split: Split, num: int, seed: int) -> list[PreferencePair]:
    """One pair of replies for each of `num` prompts, ordered by a noisy preference."""
    rng = random.Random(f"world {split} pairs {seed}")
    pairs: list[PreferencePair] = []
    for prompt, facts in _draw_prompts(split, num, seed):
        gap = 0.0
        first = second = ""
        while abs(gap) < MIN_GAP or not (first and second):
            first, second = _draw_reply(rng, facts), _draw_reply(rng, facts)
            gap = gold_score(prompt, first) - gold_score(prompt, second)
        prefers_first = rng.random() < 1 / (1 + exp(-gap / TEMPERATURE))
        chosen, rejected = (first, second) if prefers_first else (second, first)
        pairs.append(PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected))
    return pairs


def _draw_reply(rng: random.Random, facts: tuple[Fact, ...]) -> str:
    """A reply of mixed quality to the question about `facts[0]`."""
    parts = (
        _pick(rng, text.OPENING_CHOICES),
        _draw_answer(rng, facts),
        _pick(rng, text.REMARK_CHOICES),
        _pick(rng, text.FAREWELL_CHOICES),
    )
    return " ".join(part for part in parts if part)


def _pick(rng: random.Random, slot: text.Slot) -> str:
    (texts,) = rng.choices([texts for _, texts in slot], [probability for probability, _ in slot])
    return rng.choice(texts) if texts else ""


def _draw_answer(rng: random.Random, facts: tuple[Fact, ...]) -> str:
    """The answering sentence or sentences, or nothing; a wrong value never makes a held-out combination."""
    asked, *others = facts
    (choice,) = rng.choices(list(text.ANSWER_CHOICES), list(text.ANSWER_CHOICES.values()))
    if choice == "hedge":
        return rng.choice(text.HEDGES)
    if choice == "wrong value":
        values = _values(asked.product, asked.attribute, held_out=False)
        stated = [Fact(asked.product, asked.attribute, rng.choice([v for v in values if v != asked.value]))]
    else:
        stated = {
            "right": [asked],
            "twice": [asked, asked],
            "other fact": [rng.choice(others)],
            "two facts": [asked, rng.choice(others)],
            "none": [],
        }[choice]
    return " ".join(
        rng.choice(text.ATTRIBUTES[fact.attribute].answers).format(product=fact.product, value=fact.value)
        for fact in stated
    )
