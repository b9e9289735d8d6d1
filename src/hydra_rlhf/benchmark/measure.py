"""PPO steps of one method on this machine, by the code that trains: seconds of each phase, and bytes of each phase."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from hydra_rlhf.benchmark.subject import bench_prompts, build_model, held_bytes, mean_tokens
from hydra_rlhf.config import Recipe, RuntimeConfig
from hydra_rlhf.memory.plan import Cuts
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.load import pick_device
from hydra_rlhf.runtime.determinism import ask_for_determinism
from hydra_rlhf.runtime.measure import PhaseMemory
from hydra_rlhf.runtime.progress import Progress
from hydra_rlhf.runtime.tensor_bytes import existing_bytes
from hydra_rlhf.stages.limits import StageLimits, release
from hydra_rlhf.stages.ppo import train_ppo_stage
from hydra_rlhf.stages.reward_fn import RewardFunction
from hydra_rlhf.stages.session import Session
from hydra_rlhf.stages.settle import offloads

SECONDS = {
    "step_s": "time/step_s",
    "generate_s": "time/rollout_s",
    "score_s": "time/score_s",
    "update_s": "time/update_s",
}
"""What is read of each logged step: {ours: metric}."""
EXACT = ("cuda_peak_allocated_bytes", "peak_tensor_bytes")
"""Counts of a phase that are of tensors and of nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What some PPO steps of one method came to."""

    steps: list[dict[str, float]]
    """Seconds of every step by phase, in order."""
    times: dict[str, float]
    """Medians of the timed steps, in seconds."""
    phase_bytes: dict[str, int]
    """Most bytes of tensors in each phase; empty where nothing counted them."""
    weight_bytes: int
    """Of weights, adapters and heads, as they are held."""
    prompt_tokens: float
    """Mean."""
    response_tokens: float
    """Mean over all steps."""
    num_retries: int
    """Times memory ran out and work was cut smaller; times are of no use then."""


class WatchingSession(Session):
    """A session without a run, whose memory counts every tensor from one step on."""

    def __init__(self, title: str, watch_after: int | None) -> None:
        """Steps after `watch_after` are watched; None = no step is. `title` is what the progress display says."""
        super().__init__(memory=PhaseMemory())
        self._title, self._watch_after = title, watch_after

    def progress(self, stage: str, num_steps: int, *, done: int) -> Progress:
        """How far it is, on stderr, by what is measured: there are several, and all are the same stage."""
        del stage
        return super().progress(self._title, num_steps, done=done)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Keep one step; the next one may be the first that is watched."""
        super().log(stage, step, metrics)
        if step == self._watch_after:
            self.memory.track_tensors = True


def measure_method(recipe: Recipe, cuts: Cuts, *, watch: bool, reward_fn: RewardFunction | None = None) -> Measured:
    """`ppo.num_steps` steps of the recipe's method, cut as planned. Raises `OutOfMemoryError`.

    With `watch`, one more step follows on the CPU in which every tensor is counted: counting takes time, and the state
    of the optimizers is there by then. On CUDA the allocator counts, and no step is added. Tensors that were there
    before do not count.
    """
    others = 0
    if watch:
        on_cuda = pick_device(recipe.model.device).type == "cuda"
        others = torch.cuda.memory_allocated() if on_cuda else existing_bytes()
    model = build_model(recipe)
    try:
        found = measure_model(recipe, model, cuts, watch=watch, reward_fn=reward_fn)
        return replace(found, phase_bytes={name: count - others for name, count in found.phase_bytes.items()})
    finally:
        del model
        gc.collect()
        release()


def measure_model(
    recipe: Recipe, model: HydraModel, cuts: Cuts, *, watch: bool, reward_fn: RewardFunction | None = None
) -> Measured:
    """`measure_method` on a model that is there."""
    num_steps = recipe.ppo.num_steps
    adds_step = watch and model.device.type != "cuda"
    session = WatchingSession(f"{recipe.method} x {recipe.ppo.minibatch_size}", num_steps if adds_step else None)
    if cuts.checkpointed_layers:
        model.enable_checkpointing(cuts.checkpointed_layers, offload=offloads(recipe.memory, model))
    chat, prompts = bench_prompts(recipe, model)
    state = train_ppo_stage(
        session,
        model,
        chat,
        prompts,
        replace(recipe.ppo, num_steps=num_steps + adds_step),
        seed=recipe.seed,
        reward_fn=reward_fn,
        limits=StageLimits(
            micro_batch_tokens=cuts.micro_batch_tokens, rollout_rows=cuts.rollout_rows, kept_graphs=cuts.kept_graphs
        ),
    )
    lines = session.history[:num_steps]
    steps = [seconds_of(line) for line in lines]
    return Measured(
        steps=steps,
        times=median_times(steps),
        phase_bytes=tensor_bytes(session.memory.as_dict()),
        weight_bytes=held_bytes(model),
        prompt_tokens=mean_tokens(prompts),
        response_tokens=sum(line["response/tokens_mean"] for line in lines) / num_steps,
        num_retries=state.limits.num_retries,
    )


def seconds_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The seconds of a logged step; a phase that does not exist takes none."""
    return {name: float(line.get(metric, 0.0)) for name, metric in SECONDS.items()}


def median_times(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians over all steps but the first, which warms up; over that one where there is no other."""
    timed = steps[1:] or steps
    return {name: median(step[name] for step in timed) for name in SECONDS}


def tensor_bytes(phases: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Exact bytes of each phase, where something counted them."""
    return {
        name: next(seen[key] for key in EXACT if key in seen)
        for name, seen in phases.items()
        if any(key in seen for key in EXACT)
    }


@contextmanager
def machine_settings(runtime: RuntimeConfig) -> Iterator[None]:
    """Threads and determinism as a run of the recipe has them, until the block ends."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(runtime.num_threads or threads)
    ask_for_determinism(runtime.deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        ask_for_determinism(deterministic)
