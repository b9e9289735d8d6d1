"""Advantages without a critic: the critic's row is gone from every table, and the losses are those of the papers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from contract.test_masked_rows import failing, without
from contract.test_methods import changed, gradients, stop_after, strip
from contract.test_one_pass import catch_gradients
from contract.tiny import LORA, alone, chat, ppo_config, prompts, randomise_adapters, snapshot, tiny_trunk, tokenizer
from hydra_rlhf.config import DataConfig, LoraConfig, MemoryConfig, ModelConfig, PPOConfig, Recipe, RewardConfig
from hydra_rlhf.config_checks import GROUP_ESTIMATORS
from hydra_rlhf.errors import ConfigError
from hydra_rlhf.memory.count import count_method
from hydra_rlhf.memory.decide import planner_of, workload_of
from hydra_rlhf.memory.measure import count_tensor_bytes
from hydra_rlhf.memory.plan import Cuts
from hydra_rlhf.memory.report import plan_methods
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import ROLES, adapters, method_table, trunks, without_roles
from hydra_rlhf.model.shapes import find_config
from hydra_rlhf.records import Rollout
from hydra_rlhf.runtime.run import Run
from hydra_rlhf.stages.estimators import ESTIMATORS
from hydra_rlhf.stages.finish import base_sizes
from hydra_rlhf.stages.greedy import Greedy, respond_greedily, score_greedy, with_baselines
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.ppo import judge, judge_tokens, loss_kl_coef, train_ppo_stage
from hydra_rlhf.stages.ppo_single import learn_in_one_pass, roles_to_score
from hydra_rlhf.stages.ppo_state import build_optimizers
from hydra_rlhf.stages.ppo_update import update
from hydra_rlhf.stages.rollout import collect_rollout, prompt_batch, sample_responses
from hydra_rlhf.stages.session import Session

CRITIC_FREE = [name for name in ESTIMATORS if name != "gae"]
GROUPS: dict[str, Any] = {"rollout_batch_size": 4, "samples_per_prompt": 2}
ONCE: dict[str, Any] = {"num_epochs": 1, "minibatch_size": 8}
ROWS = [0, 1, 2, 3]


def critic_free(method: str, dtype: torch.dtype = torch.float32) -> HydraModel:
    """A method without its critic, everything in one dtype."""
    table = without_roles(ROLES[method], "critic")
    base = tiny_trunk("llama", dtype)
    hydra = HydraModel(table, {name: base.plain_copy() for name in trunks(table)}, tokenizer(), lora=LORA)
    for parameter in hydra.parameters():
        parameter.data = parameter.data.to(dtype)
    return hydra


def wide(method: str = "hydra-ppo") -> HydraModel:
    """The same in float64, with LoRA sets that have an effect."""
    hydra = critic_free(method, torch.float64)
    randomise_adapters(hydra)
    return hydra


def settings(name: str, **changes: Any) -> PPOConfig:
    """Four prompts with two responses each."""
    return ppo_config(advantage_estimator=name, **(GROUPS | changes))


def rollout_of(hydra: HydraModel, config: PPOConfig, reward_fn=None, roles=None) -> Rollout:
    """A rollout of four prompts; with ReMax compared with greedy responses."""
    batch = prompt_batch(prompts(), ROWS, config.samples_per_prompt, 0, torch.device("cpu"))
    limits = StageLimits.of(config)
    responses = sample_responses(hydra, chat(hydra), "actor", batch, config.sampling, stream=(0, 0), limits=limits)
    rollout = collect_rollout(
        hydra, batch, responses, config.reward, temperature=1.0, limits=limits, reward_fn=reward_fn, roles=roles
    )
    greedy = respond_greedily(hydra, chat(hydra), batch, config, stream=(0, 0), limits=limits, after_token=lambda: None)
    scored = score_greedy(hydra, greedy, rollout, config, limits, None if roles is None else reward_fn, {})
    return with_baselines(rollout, scored, config, scale=1.0)


# --- the table ------------------------------------------------------------------------------------------------------


def recipe_with(method: str, name: str, **changes: Any) -> Recipe:
    """A small recipe for the plan."""
    return Recipe(
        name="r",
        method=method,  # pyright: ignore[reportArgumentType]
        model=ModelConfig(path="scratch:tiny", device="cpu"),
        lora=LoraConfig(rank=4, alpha=8.0),
        data=DataConfig(max_prompt_tokens=32),
        memory=MemoryConfig(budget="2GiB"),
        ppo=settings(name, micro_batch_tokens=None, **changes),
    )


@pytest.mark.parametrize("method", ROLES)
def test_the_critics_row_is_gone(method: str):
    for name in CRITIC_FREE:
        table = method_table(recipe_with(method, name))
        assert dict(table) == {role: row for role, row in ROLES[method].items() if role != "critic"}
    assert method_table(recipe_with(method, "gae")) == ROLES[method]
    alone = method_table(recipe_with(method, "remax", reward=RewardConfig(reward_model_coef=0.0, reward_fn="m:f")))
    assert set(alone) == {"actor", "reference"}


@pytest.mark.parametrize("method", ["ppo", "lora-ppo", "hydra-ppo"])
def test_the_plan_is_that_of_a_table_without_a_critic(method: str):
    """To the byte, in every phase; and it is less than with one."""
    cuts = Cuts(micro_batch_tokens=64, rollout_rows=8, checkpointed_layers=0)
    recipe = recipe_with(method, "gae")
    planner = planner_of(recipe, find_config(recipe.model), workload_of(recipe), optimizer="adamw")
    expected = planner.ppo(without_roles(ROLES[method], "critic"), cuts)
    with_critic = plan_methods(recipe, (method,))["methods"][method]
    for name in CRITIC_FREE:
        recipe = recipe_with(method, name)
        planner = planner_of(recipe, find_config(recipe.model), workload_of(recipe), optimizer="adamw")
        assert planner.ppo(method_table(recipe), cuts) == expected
        planned = plan_methods(recipe, (method,))["methods"][method]
        assert planned["stages"]["ppo"]["peak"] < with_critic["stages"]["ppo"]["peak"]
        assert planned["phases"]["rollout"]["optimizer"] == expected["rollout"]["optimizer"]


@pytest.mark.parametrize("method", ["ppo", "lora-ppo", "j-hydra-ppo", "hydra-ppo"])
def test_counted_bytes_equal_held_bytes(method: str):
    hydra = critic_free(method)
    counted = count_method(hydra.table, base_sizes(hydra))
    sets = [hydra.trunk(trunk).adapter_parameters(name) for name, trunk in adapters(hydra.table).items()]
    assert counted.trunks == count_tensor_bytes(
        p for name in hydra.trunks for p in hydra.trunk(name).base_parameters().values()
    )
    assert counted.adapters == count_tensor_bytes(p for one in sets for p in one.values())
    assert counted.heads == count_tensor_bytes(hydra.scalar_heads.parameters())
    optimizers = build_optimizers(hydra, settings("rloo")).values()
    state = [t for optimizer in optimizers for key, t in optimizer.state().items() if "/" in key]
    assert counted.optimizer == count_tensor_bytes(state)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CRITIC_FREE)
@pytest.mark.parametrize("method", ["hydra-ppo", "lora-ppo"])
def test_it_trains_and_resumes_exactly_and_there_is_no_critic_anywhere(method: str, name: str, tmp_path):
    """Three steps at a stretch, and the same three in two lives."""
    config = settings(
        name, num_steps=3, save_every=1, reward=RewardConfig(normalize=True), kl_target=1.0, kl_horizon=64
    )
    found = {}
    for lives in (1, 2):
        recipe = Recipe(name=f"run-{lives}", output_dir=str(tmp_path), ppo=config)
        for life in range(lives):
            hydra = critic_free(method)
            before = snapshot(hydra)
            with Run.open(recipe, resume=life > 0) as run:
                session = Session(run)
                if life < lives - 1:
                    session.save = stop_after(session, 1)  # pyright: ignore[reportAttributeAccessIssue]
                    with pytest.raises(KeyboardInterrupt):
                        train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=3)
                else:
                    train_ppo_stage(session, hydra, chat(hydra), prompts(), config, seed=3)
                    checkpoint = run.checkpoints("ppo").latest_valid()
        lines = [strip(line) for line in (tmp_path / recipe.name / "metrics.jsonl").read_text().splitlines()]
        found[lives] = (snapshot(hydra), lines)
    (straight, straight_lines), (resumed, resumed_lines) = found[1], found[2]
    assert not changed(straight, resumed)
    assert straight_lines == resumed_lines
    assert len(straight_lines) == 3
    moved = changed(before, straight)
    assert moved == {key for key in straight if ".lora_" in key}, "the actor's LoRA set learns, and nothing else"
    assert {key.rsplit(".", 1)[-1] for key in moved} == {"actor"}
    assert not [key for key in straight if "critic" in key or "value" in key]
    assert checkpoint is not None
    assert set(checkpoint.tensors) == {"model", "optimizer-0"}
    assert not [key for held in checkpoint.tensors.values() for key in held if "critic" in key or "value" in key]
    for line in straight_lines:
        assert not [key for key in line if "critic" in key or "value" in key or "variance" in key]
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    assert any(abs(line["kl/reference"]) > 1e-3 for line in straight_lines)


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_one_forward_gives_what_two_give(name: str):
    """The gradient of the step that scores with the forward that learns, against scoring and an update."""
    config = settings(name, **ONCE, entropy_coef=0.1)
    hydra = wide()
    expected_rollout = rollout_of(hydra, config)
    targets = judge(expected_rollout, config, kl_coef=0.3, scale=1.0)
    optimizers, expected = catch_gradients(hydra, config)
    expected_metrics = update(hydra, optimizers, expected_rollout, targets, config, step=0, seed=0)

    hydra = wide()
    roles = roles_to_score(hydra.table, config, step=0)
    assert roles == ("reference", "reward")
    rollout = rollout_of(hydra, config, roles=roles)
    rewards = judge_tokens(rollout, config, kl_coef=0.3, scale=1.0)
    optimizers, found = catch_gradients(hydra, config)
    kl_coef, limits = loss_kl_coef(config, 0.3), StageLimits.of(config)
    _, _, metrics = learn_in_one_pass(hydra, optimizers, rollout, rewards, config, kl_coef=kl_coef, limits=limits)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert_close(found[key], gradient, atol=1e-6 * gradient.abs().max().item(), rtol=0)
    for key in expected_metrics:
        assert metrics[key] == pytest.approx(expected_metrics[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_micro_batches_change_no_gradient(name: str):
    found = []
    for budget in (10_000, 24, 1):
        config = settings(name, **ONCE, micro_batch_tokens=24, entropy_coef=0.1)
        hydra = wide()
        rollout = rollout_of(hydra, config)
        targets = judge(rollout, config, kl_coef=0.1, scale=1.0)
        found.append(gradients(hydra, replace(config, micro_batch_tokens=budget), rollout, targets))
    assert len(set(rollout.batch.response_mask.sum(dim=1).tolist())) > 1, "lengths must differ"
    for other in found[1:]:
        for key, gradient in found[0].items():
            assert_close(other[key], gradient, atol=1e-10, rtol=0)


def response_gradient(hydra: HydraModel, rollout: Rollout, row: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the sums over one response's tokens of log pi, and of KL's k3 estimate, without any padding."""
    one = alone(rollout.batch, row)
    length = one.response_mask.shape[1]
    logprobs = hydra.evaluate(one, ("actor",))["actor"].logprobs
    assert logprobs is not None
    difference = rollout.ref_logprobs[row, :length][None] - logprobs
    k3 = difference.exp() - 1 - difference
    named = {key: p for key, p in hydra.named_parameters() if p.requires_grad}
    sums = []
    for total in (logprobs.sum(), k3.sum()):
        grads = torch.autograd.grad(total, list(named.values()), retain_graph=True)
        sums.append(dict(zip(named, grads, strict=True)))
    return sums[0], sums[1]


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr-grpo"])
def test_the_gradient_is_the_papers(name: str):
    """Written out response by response: GRPO divides a response by its own length, Dr. GRPO by the most there may be,
    RLOO by the mean length of all; KL in the reward (k1) with RLOO, in the loss (k3) with the other two."""
    beta, config = 0.3, settings(name, **ONCE)
    hydra = wide()
    rollout = rollout_of(hydra, config)
    found = gradients(hydra, config, rollout, judge(rollout, config, kl_coef=beta, scale=1.0))
    lengths = rollout.batch.response_mask.sum(dim=1)
    kl = torch.where(rollout.batch.response_mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(dim=1)
    assert kl.abs().min() > 1e-3
    expected = {key: torch.zeros_like(gradient) for key, gradient in found.items()}
    for row in range(8):
        other = row ^ 1  # the other response to the same prompt
        ours, theirs = rollout.scores[row], rollout.scores[other]
        if name == "rloo":
            advantage = (ours - beta * kl[row]) - (theirs - beta * kl[other])
            divisor = lengths.sum()
        elif name == "grpo":
            half = (ours - theirs) / 2  # of two, each is half the difference from the mean, which is the deviation
            advantage = half / (half**2 + 1e-8).sqrt()
            divisor = 8 * lengths[row]
        else:
            advantage = (ours - theirs) / 2
            divisor = torch.tensor(8 * config.sampling.max_response_tokens)
        of_logprob, of_kl = response_gradient(hydra, rollout, row)
        for key in expected:
            expected[key] -= advantage * of_logprob[key] / divisor
            expected[key] += (0.0 if name == "rloo" else beta) * of_kl[key] / divisor
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for key, gradient in expected.items():
        assert_close(found[key], gradient, atol=1e-6 * max(1.0, gradient.abs().max().item()), rtol=0)


# --- responses that could not be scored -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_a_masked_row_is_as_if_it_had_never_been_sampled(name: str):
    """Row 3 failed: the gradient is that of the seven others, to 1e-12, and what stands in the row changes no bit."""
    config = settings(name, **ONCE, micro_batch_tokens=24, entropy_coef=0.1)
    hydra = wide()
    rollout = rollout_of(hydra, config, reward_fn=failing(3))
    assert rollout.valid.tolist() == [row != 3 for row in range(8)]
    rest = without(rollout, 3)
    targets, expected_targets = (judge(one, config, kl_coef=0.3, scale=1.0) for one in (rollout, rest))
    # Its prompt has one response left, which has nothing to be compared with.
    if name in GROUP_ESTIMATORS:
        assert not targets.advantages[2:4].any()
    assert not targets.advantages[3].any()
    ours = gradients(hydra, config, rollout, targets)
    seven = replace(config, rollout_batch_size=7, samples_per_prompt=2, minibatch_size=7)
    theirs = gradients(hydra, seven, rest, expected_targets)
    assert any(gradient.abs().max() > 1e-4 for gradient in theirs.values())
    for key, gradient in theirs.items():
        assert_close(ours[key], gradient, atol=1e-12, rtol=0)
    spoilt = {"scores": 1e30, "dense_rewards": math.inf, "baselines": math.nan, "ref_logprobs": 0.0}
    other = replace(rollout, **{field: getattr(rollout, field).clone() for field in spoilt})
    for field, value in spoilt.items():
        getattr(other, field)[3] = value
    again = gradients(hydra, config, other, judge(other, config, kl_coef=0.3, scale=1.0))
    assert all(torch.equal(again[key], gradient) for key, gradient in ours.items())


# --- ReMax's greedy responses ---------------------------------------------------------------------------------------


def greedy_of(hydra: HydraModel, config: PPOConfig, rows: list[int], samples: int = 1) -> Greedy:
    batch = prompt_batch(prompts(), rows, samples, 0, torch.device("cpu"))
    limits = StageLimits.of(config)
    greedy = respond_greedily(hydra, chat(hydra), batch, config, stream=(0,), limits=limits, after_token=lambda: None)
    assert greedy is not None
    return greedy


def test_greedy_responses_are_the_likeliest_token_each_time():
    hydra, config = wide(), settings("remax")
    greedy = greedy_of(hydra, config, [3, 1, 3], samples=2)
    assert greedy.prompts.prompt_index.tolist() == [3, 1], "each prompt once"
    assert greedy.prompts.texts == ["prompt 3", "prompt 1"]
    for row in range(2):
        one = alone(greedy.responses.batch, row)
        hidden = hydra.trunk("hydra").hidden_states(one.tokens, one.attention_mask, adapter="actor")
        logits = hydra.trunk("hydra").lm_head.logits(hidden[0, one.num_prompt_columns - 1 : -1])
        assert logits.argmax(dim=-1).tolist() == one.tokens[0, one.num_prompt_columns :].tolist()
    assert (
        respond_greedily(
            hydra,
            chat(hydra),
            greedy.prompts,
            settings("rloo"),
            stream=(0,),
            limits=StageLimits.of(config),
            after_token=lambda: None,
        )
        is None
    )


def test_each_row_gets_its_own_prompts_baseline():
    """Scores are shaped as the sampled ones are: divided by the scale, clipped, and penalised where cut."""
    hydra = wide()
    config = settings("remax", reward=RewardConfig(clip=0.5, missing_eos_penalty=0.25))
    rollout = rollout_of(hydra, config)
    scored = score_greedy(
        hydra, greedy_of(hydra, config, [2, 0, 3, 1]), rollout, config, StageLimits.of(config), None, {}
    )
    assert scored is not None
    assert not scored.ref_logprobs.any(), "the reference does not look"
    found = with_baselines(rollout, scored, config, scale=4.0).baselines
    place = {prompt: row for row, prompt in enumerate([2, 0, 3, 1])}
    for row in range(8):
        greedy = place[row // 2]
        score = min(max(scored.scores[greedy].item() / 4.0, -0.5), 0.5)
        assert found[row].item() == pytest.approx(score - (0.0 if scored.ended[greedy] else 0.25))


def test_a_prompt_whose_greedy_response_failed_is_left_out():
    hydra, config = wide(), settings("remax")
    rollout = rollout_of(hydra, config)
    scored = score_greedy(
        hydra, greedy_of(hydra, config, ROWS), rollout, config, StageLimits.of(config), failing(1), {}
    )
    found = with_baselines(rollout, scored, config, scale=1.0)
    assert found.valid.tolist() == [True, True, False, False, True, True, True, True]
    assert found.scores.isnan().tolist() == (~found.valid).tolist()
    targets = judge(found, config, kl_coef=0.1, scale=1.0)
    assert not targets.advantages[2:4].any()
    assert targets.advantages[[0, 4, 7]].any(dim=1).all()


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_model_and_an_estimator_have_to_fit():
    config = settings("rloo")
    hydra = critic_free("hydra-ppo")
    with pytest.raises(ConfigError, match=r"advantage_estimator=gae needs a critic.*with_critic=True"):
        train_ppo_stage(Session(), hydra, chat(hydra), prompts(), ppo_config(), seed=0)
    base = tiny_trunk("llama")
    hydra = HydraModel(ROLES["hydra-ppo"], {"hydra": base}, tokenizer(), lora=LORA)
    with pytest.raises(ConfigError, match=r"advantage_estimator=rloo has no use for a critic.*with_critic=False"):
        train_ppo_stage(Session(), hydra, chat(hydra), prompts(), config, seed=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"advantage_estimator": "grpo"}, ("ppo.samples_per_prompt=1", "=grpo", "2 or more")),
        ({"advantage_estimator": "remax", "critic_warmup_steps": 3}, ("ppo.critic_warmup_steps=3", "=remax", "=0")),
        ({"advantage_estimator": "remax", "discount": 0.9}, ("ppo.discount=0.9", "=remax", "ppo.discount=1")),
        ({"advantage_estimator": "grpo", **GROUPS, "kl_estimator": "k1"}, ("ppo.kl_estimator=k1", "ppo.kl_in")),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], words: tuple[str, ...]):
    with pytest.raises(ConfigError) as error:
        ppo_config(**changes)
    assert all(word in str(error.value) for word in words), error.value
