"""The LLM judge: verdicts, both orders, and a study through a server that fails."""

import math
import random

import pytest
from chat_server import chat_server, longer_is_better

from hydra_rlhf.errors import JudgeError
from hydra_rlhf.evaluation import llm_judge
from hydra_rlhf.evaluation.llm_judge import PROMPTS, LLMJudge, Match, fill
from hydra_rlhf.runtime import endpoint as endpoint_module
from hydra_rlhf.runtime.endpoint import Endpoint


def judge(url, folder, *, retries=5, timeout_s=5.0):
    where = Endpoint(url=url, key=None, cache=folder / "cache", timeout_s=timeout_s, num_retries=retries)
    return LLMJudge(
        model="m", endpoint=where, template=PROMPTS["helpfulness"], options={"temperature": 0.0}, num_parallel=8
    )


def matches(num):
    """Every third pair ours is longer, every third theirs, every third they are equally long but different."""
    return [
        Match(prompt=f"question {k}", ours=f"ours {k}" + "!" * (k % 3), theirs=f"they {k}" + "?" * (2 * (k % 3 == 1)))
        for k in range(num)
    ]


EXPECTED = {0: 0.5, 1: 0.0, 2: 1.0}
"""Of match k by k % 3: lengths + (0, 0), + (1, 2), + (2, 0)."""


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_S", 0.001)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Reasons.\nVerdict: A", "A"),
        ("Verdict: B\n\n", "B"),
        ("**Verdict: tie**", "tie"),
        ("verdict: [[B]].", "B"),
        ("Verdict:A", "A"),
        ("Verdict: A\nBut on the other hand B is better.", None),
        ("Verdict: A or B", None),
        ("Verdict: Alice", None),
        ("A", None),
        ("Verdict:", None),
        ("", None),
        ("Verdict: A, no wait.\nVerdict: B", "B"),
    ],
)
def test_verdicts(text, verdict):
    assert llm_judge.read_verdict(text) == verdict


@pytest.mark.parametrize(
    ("straight", "swapped", "outcome"),
    [
        ("A", "B", 1.0),
        ("B", "A", 0.0),
        ("tie", "tie", 0.5),
        ("A", "A", 0.5),
        ("B", "B", 0.5),
        ("A", "tie", 0.5),
        ("tie", "A", 0.5),
    ],
)
def test_a_win_takes_both_orders(straight, swapped, outcome):
    assert llm_judge.outcome_of(straight, swapped) == outcome


def test_a_missing_verdict_is_a_failure():
    assert math.isnan(llm_judge.outcome_of(None, "A"))
    assert math.isnan(llm_judge.outcome_of("A", None))


def test_texts_that_look_like_places_stay_as_they_are():
    values = {"prompt": "{response_b}", "response_a": "{prompt}", "response_b": "b {x}"}
    assert fill("{prompt}|{response_a}|{response_b}|{y}", values) == "{response_b}|{prompt}|b {x}|{y}"


def test_both_orders_are_asked_and_equal_texts_are_not(tmp_path):
    with chat_server() as server:
        outcomes, tally = judge(server.url, tmp_path).outcomes(
            [Match(prompt="p", ours="long answer", theirs="short"), Match(prompt="p", ours="same", theirs="same")]
        )
    assert outcomes == [1.0, 0.5]
    contents = sorted(body["messages"][0]["content"] for body in server.bodies)
    assert [longer_is_better(content) for content in contents] == ["A", "B"]
    assert {body["temperature"] for body in server.bodies} == {0.0}
    assert (tally.num_identical, tally.num_requests, tally.prompt_tokens, tally.completion_tokens) == (1, 2, 200, 20)
    assert (tally.num_first_wins, tally.num_second_wins, tally.num_disagreements) == (1, 1, 0)


def test_a_judge_that_likes_the_first_place_gives_ties(tmp_path):
    with chat_server(verdict=lambda _: "A") as server:
        outcomes, tally = judge(server.url, tmp_path).outcomes(matches(6))
    assert outcomes == [0.5] * 6
    assert (tally.num_disagreements, tally.num_first_wins, tally.num_second_wins) == (6, 12, 0)


def test_200_comparisons_through_a_server_that_fails(tmp_path):
    """10 % of requests fail (500, timeout, dropped), 5 % are answered without a verdict: none is lost."""
    rng = random.Random(7)
    faults = ["500", "drop", "timeout"]

    def misbehave(number, body):
        draw = rng.random()
        return faults[number % 3] if draw < 0.10 else "malformed" if draw < 0.15 else ""

    with chat_server(misbehave=misbehave, hang_s=0.25) as server:
        asking = judge(server.url, tmp_path, timeout_s=0.2)
        outcomes, tally = asking.outcomes(matches(200))
        num_requests = len(server.bodies)
        assert tally.num_judged + tally.num_failed == tally.num_comparisons == 200
        assert tally.num_failed == 0  # six failures in a row have a chance of 1e-5
        assert outcomes == [EXPECTED[k % 3] for k in range(200)]
        failed = sum(fault != "" for fault in server.faults)
        assert 0.10 < failed / num_requests < 0.20
        assert tally.num_requests == num_requests == 400 + failed
        answered = sum(fault in ("", "malformed") for fault in server.faults)
        assert (tally.prompt_tokens, tally.completion_tokens) == (100 * answered, 10 * answered)
        again, second = asking.outcomes(matches(200))
        assert again == outcomes
        assert (len(server.bodies), second.num_requests, second.num_cached) == (num_requests, 0, 400)
        assert (second.prompt_tokens, second.cached_tokens) == (0, 110 * answered)


def test_what_cannot_be_judged_is_counted_as_failed(tmp_path):
    # Requests about question 1 get no verdict, those about question 2 an error.
    def misbehave(_, body):
        content = body["messages"][0]["content"]
        return "malformed" if "question 1\n" in content else "500" if "question 2\n" in content else ""

    with chat_server(misbehave=misbehave) as server:
        outcomes, tally = judge(server.url, tmp_path, retries=1).outcomes(matches(4))
    assert outcomes[0] == outcomes[3] == 0.5
    assert math.isnan(outcomes[1])
    assert math.isnan(outcomes[2])
    assert (tally.num_judged, tally.num_failed) == (2, 2)
    assert sum(tally.failures.values()) == 4
    assert tally.failures["no verdict in the answer"] == 2


def test_an_endpoint_that_is_not_there_is_given_up(tmp_path):
    with (
        chat_server(misbehave=lambda *_: "500") as server,
        pytest.raises(JudgeError, match=r"gives no answer.*HTTP 500"),
    ):
        judge(server.url, tmp_path, retries=0).outcomes(matches(100))
    assert len(server.bodies) < 60
