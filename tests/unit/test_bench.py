"""What a benchmark counts, leaves out, plans and refuses; its runs are in tests/smoke/test_bench.py."""

from typing import Any

import pytest
import torch

from hydra_rlhf.benchmark import bench, measure, subject
from hydra_rlhf.benchmark.machine import Machine
from hydra_rlhf.benchmark.work import Bound, Work
from hydra_rlhf.config import DataConfig, MemoryConfig, ModelConfig, Recipe, RuntimeConfig
from hydra_rlhf.config_stages import PPOConfig, SamplingConfig
from hydra_rlhf.errors import ConfigError
from hydra_rlhf.model.lora import find_linears
from hydra_rlhf.model.roles import methods_with
from hydra_rlhf.model.shapes import find_config, meta_trunk


def recipe(budget: str = "auto", path: str = "scratch:tiny", **ppo: Any) -> Recipe:
    """A small benchmark's recipe."""
    lengths = SamplingConfig(max_response_tokens=8, min_response_tokens=8)
    return Recipe(
        name="bench",
        data=DataConfig(max_prompt_tokens=8),
        model=ModelConfig(path=path, device="cpu"),
        memory=MemoryConfig(budget=budget),
        ppo=PPOConfig(**{"rollout_batch_size": 4, "minibatch_size": 4, "num_epochs": 1, "sampling": lengths} | ppo),
    )


def logged(step: float, rollout: float, update: float) -> dict[str, float]:
    """A logged step without a phase of scoring."""
    return {"time/step_s": step, "time/rollout_s": rollout, "time/update_s": update, "loss/policy": 1.0}


def test_the_first_step_warms_up():
    steps = [
        measure.seconds_of(line) for line in (logged(90, 80, 9), logged(4, 1, 2), logged(8, 2, 5), logged(5, 3, 1))
    ]
    assert measure.median_times(steps) == {"step_s": 5, "generate_s": 2, "score_s": 0, "update_s": 2}
    assert measure.median_times(steps[:1])["step_s"] == 90


def test_only_exact_counts_are_measured_bytes():
    phases = {
        "rollout": {"rss_bytes": 5, "peak_tensor_bytes": 3},
        "update": {"rss_bytes": 9, "cuda_peak_allocated_bytes": 7, "cuda_peak_reserved_bytes": 8},
        "score": {"rss_bytes": 4},
    }
    assert measure.tensor_bytes(phases) == {"rollout": 3, "update": 7}


def test_memory_is_watched_after_the_timed_steps():
    session = measure.WatchingSession("x", 2)
    seen = []
    for step in (1, 2, 3):
        session.log("ppo", step, {})
        seen.append(session.memory.track_tensors)
    assert seen == [False, True, True]
    unwatched = measure.WatchingSession("x", None)
    unwatched.log("ppo", 1, {})
    assert not unwatched.memory.track_tensors


def test_threads_and_determinism_are_given_back():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with measure.machine_settings(RuntimeConfig(num_threads=3)):
        assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (3, True)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_seconds_per_sample():
    found = bench.per_sample({"step_s": 8.0, "generate_s": 4.0, "score_s": 1.0, "update_s": 2.0}, 4)
    assert found == {"s_per_sample": 2.0, "generate_s": 1.0, "score_s": 0.25, "update_s": 0.5}


def test_shares_of_the_machine():
    work = Work(decode_bytes=60, decode_flops=30, prefill_flops=10, score_flops=8, update_flops=20, shared_flops=4)
    least = Bound(generate_s=1.0, score_s=0.5, update_s=1.5, shared_s=0.5)
    times = {"step_s": 10.0, "generate_s": 4.0, "score_s": 1.0, "update_s": 3.0}
    machine = Machine(bandwidth=50, matrix_rate=20, array_bytes=1, matrix_size=1)
    # 60 of 200 bytes; 40 of 80 operations; 8 + 20 - 4 of 80 operations; 2.5 of 10 s.
    assert bench.shares(work, least, times, machine) == {
        "generate_bandwidth": 0.3,
        "generate_matrix": 0.5,
        "learn_matrix": 0.3,
        "bound": 0.25,
    }


def test_a_larger_budget_holds_a_larger_batch_and_fewer_trunks_leave_room_for_one():
    few, more = (
        bench.Bench(recipe(budget, micro_batch_tokens=1), watch=False, max_batch=256) for budget in ("464MiB", "466MiB")
    )
    sizes = {method: bench.largest_batch(few, method, few.budget) for method in ("ppo", "lora-ppo", "hydra-ppo")}
    assert sizes["ppo"] == 0
    assert 0 < sizes["lora-ppo"] < sizes["hydra-ppo"] < 256
    assert bench.largest_batch(more, "hydra-ppo", more.budget) > sizes["hydra-ppo"]
    # The batch that was found fits and one more does not.
    size = sizes["hydra-ppo"]
    for extra, fits in ((0, True), (1, False)):
        changed = bench.decoded_together(few.recipe, size + extra)
        assert bench.decide(few, changed, few.budget).fits is fits
    capped = bench.Bench(few.recipe, watch=False, max_batch=3)
    assert bench.largest_batch(capped, "hydra-ppo", few.budget) == 3


def test_batches_are_whole_groups():
    """Of two responses to each prompt: the largest batch is even, and its prompts are half as many."""
    groups = recipe(advantage_estimator="rloo", rollout_batch_size=2, samples_per_prompt=2)
    subject.check_bench(groups)
    one = bench.Bench(groups, watch=False, max_batch=5)
    assert bench.largest_batch(one, "hydra-ppo", one.budget) == 4
    ppo = bench.decoded_together(groups, 6).ppo
    assert (ppo.rollout_batch_size, ppo.minibatch_size, ppo.sampling.batch_rows) == (3, 6, 6)
    row = bench.plan_row(groups, bench.decide(one, groups, one.budget))
    assert row["batch"] == 4
    # Without a critic's LoRA set and its moments.
    with_critic = recipe(rollout_batch_size=2, samples_per_prompt=2)
    assert row["planned_bytes"] < bench.decide(one, with_critic, one.budget).chosen.peak


def test_the_shared_budget_is_what_the_neediest_method_takes():
    one = bench.Bench(recipe(), watch=False, max_batch=4)
    needs = {m: bench.decide(one, bench.recipe_for(one.recipe, m), one.budget).chosen.peak for m in methods_with("ppo")}
    assert bench.shared_budget(one, methods_with("ppo")) == needs["ppo"] == max(needs.values())
    assert bench.shared_budget(one, ["hydra-ppo"]) == needs["hydra-ppo"]
    named = bench.Bench(recipe("1GiB"), watch=False, max_batch=4)
    assert bench.shared_budget(named, methods_with("ppo")) == named.budget == 2**30 - 448 * 2**20


@pytest.mark.parametrize("wrong", [{"minibatch_size": 2}, {"samples_per_prompt": 2, "minibatch_size": 4}])
def test_what_the_benchmark_sets_itself_cannot_be_set(wrong: dict[str, int]):
    with pytest.raises(ConfigError, match="--batch alone"):
        subject.check_bench(recipe(**wrong))


def test_what_has_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not subject.has_weights("shape:gpt2")
    assert not subject.has_weights("scratch:tiny")
    assert not subject.has_weights(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("")
    assert subject.has_weights(str(tmp_path))
    assert subject.has_weights("some/hub-name")


@pytest.mark.parametrize("path", ["shape:smollm2-135m", "shape:gpt2", "shape:llama-3-8b", "shape:opt-1.3b"])
def test_sizes_are_those_of_the_model(path: str):
    settings = recipe(path=path)
    config = find_config(settings.model)
    trunk = meta_trunk(config, settings.model)
    found = subject.sizes_for_work(config, trunk, settings.lora)
    embeddings = ("embed", "wte", "wpe")
    named = trunk.decoder.named_parameters()
    matrices = [p for n, p in named if p.dim() == 2 and not any(word in n for word in embeddings)]
    assert found.block_params == sum(p.numel() for p in matrices)
    vectors = [m.bias for m in find_linears(trunk.decoder, ("all-linear",)).values() if m.bias is not None]
    assert found.decode_bytes == 4 * (found.block_params + found.head_params + sum(b.numel() for b in vectors))
    if "llama-3-8b" in path:
        assert found.head_params == 128256 * 4096
        assert found.query_width == 4096
        assert found.cache_bytes == 2 * 32 * 8 * 128 * 4  # keys and values, layers, heads, width, float32
        # Rank 16 on q and o (8192), k and v (4096 + 1024), gate, up and down (4096 + 14336).
        assert found.lora_params == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
