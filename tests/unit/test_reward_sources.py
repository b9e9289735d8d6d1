"""Several sources: weights, units, per-token rewards, what a failure does, against numbers worked out by hand."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from hydra_rlhf.algorithms.rewards import Moments
from hydra_rlhf.config import RewardConfig
from hydra_rlhf.config_rewards import LengthSource, SourceConfig
from hydra_rlhf.errors import ConfigError, RewardFunctionError
from hydra_rlhf.records import PromptBatch, Responses, TokenBatch
from hydra_rlhf.stages.scoring import reward_sources
from hydra_rlhf.stages.scoring.outcomes import Failure

NAN = math.nan
FAILED = Failure("raised ValueError: no")


def batch():
    """Four responses of 2, 3, 1 and 3 tokens after prompts of one token."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    tokens = torch.tensor([[5, 11, 12, 0], [6, 21, 22, 23], [7, 31, 0, 0], [8, 41, 42, 43]])
    prompts = PromptBatch(
        tokens=tokens[:, :1],
        attention_mask=torch.ones(4, 1, dtype=torch.bool),
        prompt_index=torch.arange(4),
        sample_index=torch.zeros(4, dtype=torch.long),
        texts=list("abcd"),
        originals=[[{"role": "user", "content": text}] for text in "abcd"],
        columns={"source": [1, 2, 3, 4]},
    )
    attention = torch.cat([torch.ones(4, 1, dtype=torch.bool), mask], dim=1)
    responses = Responses(
        batch=TokenBatch(tokens=tokens, attention_mask=attention, response_mask=mask),
        logprobs=torch.zeros(4, 3),
        texts=["one", "two", "three", "four"],
        ended=torch.tensor([True, False, True, False]),
    )
    return prompts, responses


def source(name, outcomes, **settings):
    return reward_sources.OpenSource(config=SourceConfig(name=name, **settings), call=lambda _: list(outcomes))


def add(*sources, scores=(1.0, 2.0, 3.0, 4.0), moments=None, max_failed_frac=0.5):
    prompts, responses = batch()
    opened = reward_sources.RewardSources(sources=tuple(sources), moments=moments or {})
    return opened.add_to(torch.tensor(scores), prompts, responses, max_failed_frac=max_failed_frac)


def test_no_source_changes_nothing():
    added = add()
    assert_close(added.scores, torch.tensor([1.0, 2.0, 3.0, 4.0]), rtol=0, atol=0)
    assert added.valid.all()
    assert not added.dense_rewards.any()
    assert added.source_scores == {}


def test_weighted_sum_with_per_token_rewards():
    # Rows: 1 + 2 x 10 - 0.5 x (0.5 + 1.5), 2 + 2 x 20 - 0.5 x 3, 3 + 2 x 30 - 0.5 x 4, 4 + 2 x 40 - 0.5 x (1 + 2 + 5)
    added = add(
        source("a", [10.0, [5.0, 5.0, 10.0], 30.0, 40.0], weight=2.0),
        source("b", [[0.5, 1.5], 3.0, [4.0], [1.0, 2.0, 5.0]], weight=-0.5),
    )
    assert_close(added.scores, torch.tensor([20.0, 40.5, 61.0, 80.0]), rtol=0, atol=1e-5)
    dense = torch.tensor([[-0.25, -0.75, 0.0], [10.0, 10.0, 20.0], [-2.0, 0.0, 0.0], [-0.5, -1.0, -2.5]])
    assert_close(added.dense_rewards, dense, rtol=0, atol=1e-6)
    assert list(added.source_scores) == ["a", "b"]
    assert_close(added.source_scores["b"], torch.tensor([2.0, 3.0, 4.0, 8.0]), rtol=0, atol=0)


def test_what_a_source_is_asked():
    prompts, responses = batch()
    request = reward_sources.request_of(prompts, responses)
    assert request.prompts == ["a", "b", "c", "d"]
    assert request.originals[1] == [{"role": "user", "content": "b"}]
    assert request.responses == ["one", "two", "three", "four"]
    assert request.response_ids == [[11, 12], [21, 22, 23], [31], [41, 42, 43]]
    assert request.columns == {"source": [1, 2, 3, 4]}


def test_normalised_sources_are_divided_by_the_deviation_seen_so_far():
    # Deviation seen: sqrt(36 / 4) = 3. Without any seen: that of 2, 2, 6, 6, which is 2.
    seen = {"a": Moments(count=4.0, mean=100.0, m2=36.0)}
    outcomes = [2.0, 2.0, [6.0], 6.0]
    added = add(source("a", outcomes, weight=3.0, normalize=True), moments=seen, scores=(0.0,) * 4)
    assert_close(added.scores, torch.tensor([2.0, 2.0, 6.0, 6.0]), rtol=0, atol=1e-6)
    assert_close(added.dense_rewards[2], torch.tensor([6.0, 0.0, 0.0]), rtol=0, atol=1e-6)
    added = add(source("a", outcomes, weight=3.0, normalize=True), scores=(0.0,) * 4)
    assert_close(added.scores, torch.tensor([3.0, 3.0, 9.0, 9.0]), rtol=0, atol=1e-6)
    added = add(source("a", outcomes, weight=3.0), moments=seen, scores=(0.0,) * 4)
    assert_close(added.scores, torch.tensor([6.0, 6.0, 18.0, 18.0]), rtol=0, atol=1e-6)
    assert_close(added.source_scores["a"], torch.tensor([2.0, 2.0, 6.0, 6.0]), rtol=0, atol=0)


def test_a_masked_failure_takes_its_row_out():
    added = add(
        source("a", [1.0, FAILED, 1.0, 1.0], on_failure="mask"),
        source("b", [[1.0, 1.0], [1.0, 1.0, 1.0], [1.0], [1.0, 1.0, 1.0]]),
    )
    assert added.valid.tolist() == [True, False, True, True]
    assert_close(added.scores, torch.tensor([4.0, NAN, 5.0, 8.0]), rtol=0, atol=0, equal_nan=True)
    assert added.dense_rewards.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert_close(added.source_scores["a"], torch.tensor([1.0, NAN, 1.0, 1.0]), rtol=0, atol=0, equal_nan=True)


def test_each_source_masks_its_own_failures():
    added = add(
        source("a", [FAILED, 1.0, 1.0, 1.0], on_failure="mask"),
        source("b", [1.0, 1.0, FAILED, 1.0], on_failure="mask"),
        max_failed_frac=0.75,
    )
    assert added.valid.tolist() == [False, True, False, True]


def test_a_failure_with_a_value_gets_it_in_the_unit_of_the_source():
    # (-4) / 2, twice: the deviation of the three others, 2, 2 and the scale of a batch leaves the failure out.
    seen = {"a": Moments(count=2.0, mean=0.0, m2=8.0)}
    settings = {"on_failure": "value", "failure_value": -4.0, "normalize": True, "weight": 2.0}
    added = add(source("a", [2.0, 2.0, FAILED, 2.0], **settings), moments=seen, scores=(0.0,) * 4)
    assert added.valid.all()
    assert_close(added.scores, torch.tensor([2.0, 2.0, -4.0, 2.0]), rtol=0, atol=1e-6)
    assert_close(added.source_scores["a"], torch.tensor([2.0, 2.0, NAN, 2.0]), rtol=0, atol=0, equal_nan=True)


def test_a_failure_raises_by_default():
    with pytest.raises(RewardFunctionError, match=r"^row 2: a raised ValueError: no; mend it"):
        add(source("a", [1.0, 1.0, FAILED, 1.0]), max_failed_frac=1.0)


def test_too_many_failures_raise_whatever_the_policy():
    # Three of four rows in all, each source two of them.
    first = source("a", [FAILED, FAILED, 1.0, 1.0], on_failure="mask")
    second = source("b", [1.0, FAILED, FAILED, 1.0], on_failure="value")
    assert refusal(first) is None
    assert refusal(second) is None
    assert refusal(first, second) == (
        "3 of 4 responses could not be scored, more than ppo.reward.max_failed_frac=0.5 allows; row 1: b raised "
        "ValueError: no"
    )
    assert refusal(first, second, max_failed_frac=0.75) is None
    assert add(first, second, max_failed_frac=0.75).valid.tolist() == [False, False, True, True]


def refusal(*sources, max_failed_frac=0.5):
    """Why the scores of these sources are refused; None where they are not."""
    try:
        add(*sources, max_failed_frac=max_failed_frac)
    except RewardFunctionError as error:
        return str(error)
    return None


def test_a_batch_without_a_single_score_raises_at_any_threshold():
    with pytest.raises(RewardFunctionError, match=r"^no response could be scored: row 0: a raised"):
        add(source("a", [FAILED] * 4, on_failure="mask"), max_failed_frac=1.0)


def test_a_source_that_raises_stops_asking_at_its_first_failure():
    asked = []

    def call(request):
        asked.append(request.responses)
        return [FAILED]

    opened = reward_sources.OpenSource(config=SourceConfig(name="a"), call=call, batch_rows=1)
    with pytest.raises(RewardFunctionError, match=r"^row 0: "):
        add(opened, max_failed_frac=1.0)
    assert asked == [["one"]]
    asked.clear()
    masked = dataclasses.replace(opened, config=SourceConfig(name="a", on_failure="mask"))
    with pytest.raises(RewardFunctionError, match="4 of 4 responses"):
        add(masked, max_failed_frac=0.5)
    assert len(asked) == 3, "two may fail"


def test_moments_are_kept_of_normalised_sources_and_without_failures():
    reward = RewardConfig(
        sources=(
            LengthSource(name="a", kind="length", target=1, normalize=True),
            LengthSource(name="b", kind="length", target=1),
        )
    )
    scores = {"a": torch.tensor([1.0, NAN, 3.0]), "b": torch.tensor([1.0, 2.0, 3.0]), "head": torch.zeros(3)}
    once = reward_sources.next_moments({}, scores, reward)
    assert once == {"a": Moments(count=2.0, mean=2.0, m2=2.0)}
    twice = reward_sources.next_moments(once, {**scores, "a": torch.tensor([2.0, 2.0])}, reward)
    assert twice == {"a": Moments(count=4.0, mean=2.0, m2=2.0)}


def test_metrics_of_each_source():
    found = reward_sources.source_metrics({"a": torch.tensor([1.0, NAN, 5.0]), "head": torch.tensor([2.0, 2.0, 2.0])})
    assert found == {
        "reward/a_mean": 3.0,
        "reward/a_std": 2.0,
        "reward/a_failed": 1.0,
        "reward/head_mean": 2.0,
        "reward/head_std": 0.0,
        "reward/head_failed": 0.0,
    }
    nothing = reward_sources.source_metrics({"a": torch.tensor([NAN])})
    assert nothing["reward/a_failed"] == 1.0
    assert math.isnan(nothing["reward/a_mean"])
    assert math.isnan(nothing["reward/a_std"])


def test_a_plain_function_is_the_source_that_settings_weigh():
    prompts, responses = batch()
    reward = RewardConfig(reward_fn_coef=0.5)

    def twice(prompts, responses, source):
        return [2.0 * x for x in source]

    opened = reward_sources.as_sources(twice, reward)
    added = opened.add_to(torch.zeros(4), prompts, responses, max_failed_frac=0.0)
    assert_close(added.scores, torch.tensor([1.0, 2.0, 3.0, 4.0]), rtol=0, atol=0)
    assert reward_sources.as_sources(opened, reward) is opened
    assert reward_sources.as_sources(None, reward).sources == ()


def test_settings_whose_sources_nobody_opened_are_refused():
    reward = RewardConfig(sources=(LengthSource(name="short", kind="length", maximum=9),))
    with pytest.raises(ConfigError, match=r"ppo\.reward\.sources lists 'short'"):
        reward_sources.as_sources(None, reward)


def test_the_unit_belongs_to_open_sources_only():
    opened = reward_sources.RewardSources(sources=())
    seen = {"a": Moments(count=1.0)}
    moved = reward_sources.with_moments(opened, seen)
    assert isinstance(moved, reward_sources.RewardSources)
    assert moved.moments == seen
    assert opened.moments == {}
    assert reward_sources.with_moments(None, seen) is None
    assert reward_sources.with_moments(len, seen) is len
