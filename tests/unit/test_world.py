"""The built-in world: the gold score by hand-worked examples, and the promises its data makes."""

import random
import string
from collections import Counter
from statistics import fmean

import pytest

from hydra_rlhf.data import world_text as text
from hydra_rlhf.data.rows import PreferencePair
from hydra_rlhf.data.world import (
    GOLD_RANGE,
    MAX_PROMPTS,
    Fact,
    asked_fact,
    gold_score,
    is_held_out,
    world_pairs,
    world_prompts,
)
from hydra_rlhf.errors import ConfigError

LOWEST, HIGHEST = GOLD_RANGE
PROMPT = "Stock note: lamp, 20 dollars, by the door, red.\nCustomer: What colour is the lamp?"
PERFECT = "Hello! The lamp is red. Do you need more help? Thank you!"


@pytest.fixture(scope="module")
def splits() -> tuple[list[PreferencePair], list[PreferencePair]]:
    return world_pairs(6000, seed=0, test_frac=0.1)


@pytest.fixture(scope="module")
def train(splits) -> list[PreferencePair]:
    return splits[0]


@pytest.fixture(scope="module")
def sft_mean(train) -> float:
    return fmean(gold_score(str(pair.prompt), pair.chosen) for pair in train)


# Points: right answer 4 (wrong value 1); greeting first, offer, farewell last 2 each (times 0.6 without the right
# answer); rude -1.5, filler -1, repetition -1, unknown -1.5 per started 8 words.
@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (PERFECT, 10.0),
        ("Hello! It is red. Do you need more help? Thank you!", 10.0),
        ("  hello!  THE LAMP IS RED.\nDo you need more help? thank you!", 10.0),  # case and white space do not matter
        ("The lamp is red.", 4.0),
        ("Hello! The lamp is red.", 6.0),
        ("The lamp is red. Hello!", 4.0),  # a greeting counts only as the first sentence
        ("Thank you! The lamp is red.", 4.0),  # a farewell counts only as the last
        ("Please ask for more help. The lamp is red.", 6.0),
        ("What now? The lamp is red. Thank you!", 4.5),  # 4 + 2 - 1.5
        ("Hello! The lamp is red. It is what it is. Thank you!", 7.0),  # 4 + 4 - 1
        ("Hello! The lamp is red. The lamp is red. Thank you!", 7.0),  # 4 + 4 - 1
        ("Hello! The lamp is red. Do you need more help? Thank you! Have a good day!", 9.0),
        ("Hello! The lamp is red. Do you need more help? Thank you", 6.5),  # unfinished: 4 + 4 - 1.5
        ("Hello! The lamp is blue. Do you need more help? Thank you!", 4.6),  # 1 + 0.6 * 6
        ("Hello! The lamp costs 20 dollars. Do you need more help? Thank you!", 3.6),  # true, but not asked
        ("Hello! The chair is red. Do you need more help? Thank you!", 3.6),  # another product
        ("Hello! I do not know. Do you need more help? Thank you!", 2.6),  # 0.6 * 6 - 1
        # Every fact of the note: 0.6 * 6 for courtesy, two answers too many.
        ("Hello! The lamp is red. It costs 20 dollars. It is by the door. Do you need more help? Thank you!", 1.6),
        ("Hello! Do you need more help? Thank you!", 3.6),
        ("Thank you! Thank you! Thank you! Thank you!", 0.0),  # 0.6 * 2 - 3
        (PERFECT + " Red lamp door dollars Monday help thank hello goodbye.", 5.0),  # 10 - 2 (no farewell) - 2 * 1.5
        ("red red red red", 0.0),
        ("", 0.0),
        (" \n\t ", 0.0),
    ],
)
def test_gold_score_of_hand_worked_replies(response: str, expected: float):
    assert gold_score(PROMPT, response) == pytest.approx(expected)


def test_another_question_makes_another_answer_right():
    prompt = PROMPT.replace("What colour is the lamp?", "How much is the lamp?")
    assert gold_score(prompt, "It costs 20 dollars.") == 4.0
    assert gold_score(prompt, "The lamp is red.") == 0.0


@pytest.mark.parametrize(
    "prompt",
    ["", "Hello?", PROMPT.replace("lamp,", "chair,"), PROMPT.replace(", red", ""), PROMPT.replace("red", "odd")],
)
def test_a_prompt_from_elsewhere_scores_lowest(prompt: str):
    assert asked_fact(prompt) is None
    assert gold_score(prompt, PERFECT) == LOWEST


def test_garbage_is_scored_low_and_inside_the_range():
    rng = random.Random(0)
    words = [word for sentence in (*text.GREETINGS, *text.OFFERS, *text.FAREWELLS) for word in sentence.split()]
    for length in (1, 5, 30, 300, 5000):
        for alphabet in (string.printable, "!?.", "é\u2028\x00🙂 "):
            garbage = "".join(rng.choice(alphabet) for _ in range(length))
            assert LOWEST <= gold_score(PROMPT, garbage) <= 2.0
            assert LOWEST <= gold_score(garbage, PERFECT) <= HIGHEST
            assert gold_score(PROMPT, f"{PERFECT} {garbage} x") < 8.0
        stuffed = " ".join(rng.choice(words) for _ in range(length))
        assert LOWEST <= gold_score(PROMPT, stuffed) <= 3.0


def test_more_text_never_helps_a_perfect_reply():
    for kind in (text.GREETINGS, text.OFFERS, text.FAREWELLS, text.RUDE_REMARKS, text.FILLER_REMARKS, text.HEDGES):
        for sentence in kind:
            assert gold_score(PROMPT, f"{PERFECT} {sentence}") < HIGHEST
            assert gold_score(PROMPT, f"{sentence} {PERFECT}") < HIGHEST


def test_pairs_are_repeatable_and_differ_by_seed():
    assert world_pairs(50, seed=3, test_frac=0.1) == world_pairs(50, seed=3, test_frac=0.1)
    assert world_pairs(50, seed=3, test_frac=0.1) != world_pairs(50, seed=4, test_frac=0.1)


def test_sizes_and_distinct_prompts(splits):
    train, test = splits
    assert (len(train), len(test)) == (5400, 600)
    train_prompts, test_prompts = ({pair.prompt for pair in pairs} for pairs in splits)
    assert (len(train_prompts), len(test_prompts)) == (5400, 600)
    assert not train_prompts & test_prompts


def test_the_share_held_out_is_the_one_asked_for(splits):
    _, test = splits
    train, more = world_pairs(50, seed=0, test_frac=0.3)
    assert (len(train), len(more)) == (35, 15)
    assert [pair.prompt for pair in more] == [pair.prompt for pair in test[:15]]  # held out whatever the share
    assert [len(split) for split in world_pairs(3, seed=0, test_frac=0.01)] == [2, 1]
    assert [len(split) for split in world_pairs(3, seed=0, test_frac=0.99)] == [1, 2]
    for frac, empty in ((0.0, "test"), (1.0, "training")):
        with pytest.raises(ConfigError, match=rf"data\.test_frac={frac:g} leaves the {empty} split empty"):
            world_pairs(50, seed=0, test_frac=frac)


def test_world_prompts_are_those_of_the_pairs_and_more(splits):
    for split, pairs in zip(("train", "test"), splits, strict=True):
        prompts = world_prompts(split, 700, seed=0)
        num = min(700, len(pairs))
        assert prompts[:num] == [pair.prompt for pair in pairs[:num]]
        assert len(set(prompts)) == 700


def test_too_few_pairs_and_too_many_prompts_are_refused():
    with pytest.raises(ConfigError, match=r"data\.world_pairs=1 "):
        world_pairs(1, seed=0, test_frac=0.1)
    with pytest.raises(ConfigError, match="50000"):
        world_prompts("test", MAX_PROMPTS + 1, seed=0)


def test_no_training_text_combines_held_out_facts(splits):
    held_out = [
        Fact(product, name, value)
        for product in text.PRODUCTS
        for name, attribute in text.ATTRIBUTES.items()
        for value in attribute.values
        if is_held_out(Fact(product, name, value))
    ]
    assert len(held_out) == len(text.PRODUCTS) * len(text.ATTRIBUTES)
    train, test = splits
    words = {product: set() for product in text.PRODUCTS}
    for pair in train:
        (product,) = (product for product in text.PRODUCTS if f"note: {product}," in pair.prompt)
        words[product] |= set(
            " ".join((pair.prompt, pair.chosen, pair.rejected)).replace(".", " ").replace(",", " ").split()
        )
    assert not [fact for fact in held_out if fact.value in words[str(fact.product)]]
    assert {asked_fact(pair.prompt) for pair in test} == set(held_out)
    # Every value is trained with other products.
    assert all(any(fact.value in words[product] for product in text.PRODUCTS) for fact in held_out)


def test_sft_data_is_of_mixed_quality(train, sft_mean: float):
    low, high = (LOWEST + share * (HIGHEST - LOWEST) for share in (0.35, 0.65))
    assert low < sft_mean < high
    scores = [gold_score(pair.prompt, pair.chosen) for pair in train]
    assert fmean(score == HIGHEST for score in scores) < 0.15
    assert len(set(scores)) > 20  # many steps between bad and good, not two


def test_no_single_reply_is_as_good_as_the_sft_data(train, sft_mean: float):
    counts = Counter(response for pair in train for response in (pair.chosen, pair.rejected))
    prompts = [pair.prompt for pair in train[:100]]
    perfect_somewhere = [
        f"{text.GREETINGS[0]} {answer.format(product='lamp', value=value)} {text.OFFERS[0]} {text.FAREWELLS[0]}"
        for attribute in text.ATTRIBUTES.values()
        for value in attribute.values
        for answer in attribute.answers
    ]
    replies = [reply for reply, _ in counts.most_common(500)] + perfect_somewhere
    assert max(fmean(gold_score(prompt, reply) for prompt in prompts) for reply in replies) < sft_mean - 0.5


def test_gold_ranks_most_but_not_all_noisy_pairs_right(splits):
    for pairs in splits:
        assert 0.8 < fmean(gold_score(p.prompt, p.chosen) > gold_score(p.prompt, p.rejected) for p in pairs) < 0.9


def test_length_says_little_about_quality(splits):
    for pairs in splits:
        for size in (len, lambda reply: len(reply.split())):
            longer = [size(pair.chosen) - size(pair.rejected) for pair in pairs]
            assert 0.45 < fmean((gap > 0) + 0.5 * (gap == 0) for gap in longer) < 0.55


def test_prompts_and_replies_are_short(splits):
    for pair in (pair for pairs in splits for pair in pairs):
        assert len(pair.prompt.split()) <= 30
        assert 1 <= len(pair.chosen.split()) <= 36
        assert 1 <= len(pair.rejected.split()) <= 36
