"""A reward function in this process: what it is given, and that what it raises is a failure."""

import sys

import pytest

from hydra_rlhf.stages.reward_fn import call_reward_fn, names_taken
from hydra_rlhf.stages.scoring.outcomes import Failure, ScoreRequest

REQUEST = ScoreRequest(
    prompts=["a", "b"],
    originals=["a", "b"],
    responses=["one", "three"],
    response_ids=[[1, 2], [3]],
    columns={"answer": [4.0, 5.0], "other": [6.0, 7.0]},
)


def some(prompts, responses, answer, response_ids):
    return [answer[i] + len(response_ids[i]) for i in range(len(responses))]


def everything(prompts, responses, **columns):
    assert list(columns) == ["answer", "other", "response_ids"]
    return [float(len(prompt + response)) for prompt, response in zip(prompts, responses, strict=True)]


def a_generator(prompts, responses):
    yield 1.0
    raise LookupError("late")


def leaves(prompts, responses):
    sys.exit("enough")


def asks_for_more(prompts, responses, what_is_not_there):
    return [0.0, 0.0]


def test_a_function_gets_what_it_names():
    assert call_reward_fn(some, REQUEST) == [6.0, 6.0]
    assert call_reward_fn(everything, REQUEST) == [4.0, 6.0]
    assert names_taken(some) == ["prompts", "responses", "answer", "response_ids"]
    assert names_taken(everything) is None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (a_generator, "raised LookupError: late"),
        (leaves, "raised SystemExit: enough"),
        (asks_for_more, "raised TypeError: "),
        (lambda _, __: None, "returned None, not a list of scores"),
    ],
)
def test_what_it_raises_is_a_failure_of_the_call(function, reason):
    found = call_reward_fn(function, REQUEST)
    assert len(found) == 2
    assert all(isinstance(outcome, Failure) and outcome.reason.startswith(reason) for outcome in found)


def test_an_interrupt_is_not_held_back():
    def interrupted(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_reward_fn(interrupted, REQUEST)
