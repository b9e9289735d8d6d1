"""What is kept of a rollout's samples: every method's own numbers, pieces that join to the text, an update's effect."""

import json
from dataclasses import replace

import pytest
import torch

from contract.test_methods import rollout_of
from contract.tiny import METHODS, chat, ppo_config, randomise_adapters, tiny_hydra
from hydra_rlhf.model.roles import ROLES, without_roles
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.ppo import judge
from hydra_rlhf.stages.sample_records import role_numbers, rollout_samples, sample_record, short

CONFIG = ppo_config(num_logged_samples=3)


def kept(method: str):
    """(model, rollout, targets, samples): the samples are taken after the actor has moved."""
    hydra = tiny_hydra(method)
    rollout = rollout_of(hydra, CONFIG)
    targets = judge(rollout, CONFIG, kl_coef=0.1, scale=1.0)
    if hydra.table["actor"].adapter is not None:
        randomise_adapters(hydra, scale=0.05)
    samples = rollout_samples(hydra, chat(hydra), rollout, targets, CONFIG, limits=StageLimits.of(CONFIG))
    return hydra, rollout, targets, samples


@pytest.mark.parametrize("method", METHODS)
def test_samples_carry_what_was_learned_from(method: str):
    hydra, rollout, targets, samples = kept(method)
    assert len(samples) == 3
    mask, columns = rollout.batch.response_mask, rollout.batch.num_prompt_columns
    for row, sample in enumerate(samples):
        tokens = sample["tokens"]
        assert tokens["ids"] == rollout.batch.tokens[row, columns:][mask[row]].tolist()
        assert "".join(tokens["pieces"]) == sample["response"] == rollout.responses[row]
        assert sample["ended"] == bool(rollout.ended[row])
        if sample["ended"]:
            assert tokens["names"][str(len(tokens["ids"]) - 1)] == "<eos>"
        for name, values in (
            ("value", rollout.values),
            ("logprob", rollout.logprobs),
            ("advantage", targets.advantages),
            ("reward", targets.rewards),
        ):
            assert tokens[name] == pytest.approx(values[row][mask[row]].tolist(), rel=1e-3, abs=1e-9), name
        # The KL of a response is the sum of its tokens', each written with four digits.
        assert sum(tokens["kl"]) == pytest.approx(sample["kl"], abs=1e-3)
        json.dumps(sample, allow_nan=False)
    moved = max(abs(change) for sample in samples for change in sample["tokens"]["change"])
    assert (moved > 1e-3) == (hydra.table["actor"].adapter is not None)


def test_change_is_the_log_prob_after_the_update_minus_the_one_before():
    hydra, rollout, _, samples = kept("hydra-ppo")
    with torch.no_grad():
        after = hydra.evaluate(rollout.batch, ("actor",), temperature=1.0)["actor"].logprobs
    assert after is not None
    for row, sample in enumerate(samples):
        mask = rollout.batch.response_mask[row]
        expected = (after - rollout.logprobs)[row][mask].tolist()
        assert sample["tokens"]["change"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_number_without_its_role_is_not_there():
    _, rollout, _, _ = kept("hydra-ppo")
    table = ROLES["hydra-ppo"]
    assert set(role_numbers(rollout, table)) == {"logprob", "kl", "value"}
    assert set(role_numbers(rollout, without_roles(table, "critic"))) == {"logprob", "kl"}
    assert set(role_numbers(rollout, without_roles(table, "critic", "reference"))) == {"logprob"}


def test_several_sources_are_kept_apart():
    hydra, rollout, _, samples = kept("hydra-ppo")
    assert all("sources" not in sample for sample in samples)
    two = replace(rollout, source_scores={"head": rollout.scores, "length": torch.full_like(rollout.scores, -0.5)})
    record = sample_record(chat(hydra), (2,), two, 1, role_numbers(two, hydra.table))
    assert record["sources"] == {"head": rollout.scores[1].item(), "length": -0.5}


def test_no_samples_take_no_look():
    hydra, rollout, targets, _ = kept("hydra-ppo")

    def refuse(*_, **__):
        raise AssertionError("looked")

    hydra.evaluate = refuse  # pyright: ignore[reportAttributeAccessIssue]
    none = replace(CONFIG, num_logged_samples=0)
    assert rollout_samples(hydra, chat(hydra), rollout, targets, none, limits=StageLimits.of(none)) == []


def test_numbers_have_four_digits_and_zero_has_no_sign():
    assert short(torch.tensor([0.123456, -1234.56, 0.0000012345678, -0.0])) == [0.1235, -1235.0, 1.235e-06, 0.0]
    assert str(short(torch.tensor([-0.0]))) == "[0.0]"
