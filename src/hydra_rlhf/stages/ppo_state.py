"""What PPO keeps between steps besides the model: optimizers, controller, running moments, the best step so far."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from torch import Tensor

from hydra_rlhf.algorithms.rewards import Moments
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.errors import CheckpointError, ConfigError
from hydra_rlhf.model.hydra import HydraModel
from hydra_rlhf.model.roles import TRAINABLE_ROLES, passes
from hydra_rlhf.model.trunk import Trunk
from hydra_rlhf.runtime.checkpoint import Checkpoint
from hydra_rlhf.runtime.optimizer import Optimizer, ParamGroup, learning_rate_factor
from hydra_rlhf.stages.limits import StageLimits
from hydra_rlhf.stages.session import Session

TrainPass = tuple[str, str | None]
"""(trunk, adapter): the roles that learn in one trunk pass share an optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOState:
    """What a PPO step changes besides tensors; saved with them."""

    step: int = 0
    """PPO steps done."""
    kl_coef: float
    """Current coefficient; moves only with `kl_target`."""
    limits: StageLimits
    """What may be held at once. Part of the state, because where a batch is cut changes the order of its sums."""
    moments: Moments = field(default_factory=Moments)
    """Running moments of the scores, for `reward.normalize`."""
    source_moments: dict[str, Moments] = field(default_factory=dict)
    """Those of each source that is normalised, by its name."""
    held_out_moments: dict[str, Moments] = field(default_factory=dict)
    """The same after the first step: the unit of held-out scores, which must not move between looks."""
    best_step: int | None = None
    """Step with the best held-out score so far."""
    best_score: float | None = None
    """Its held-out score."""


def build_optimizers(model: HydraModel, config: PPOConfig) -> dict[TrainPass, Optimizer]:
    """One optimizer per pass that learns, with groups `<role>/adapter`, `<role>/trunk` and `<role>/head`.

    A LoRA set that actor and critic share belongs to the actor's group. Whole trunks learn at their role's rate times
    `full_learning_rate_scale`.
    """
    num_minibatches = config.rollout_batch_size * config.samples_per_prompt // config.minibatch_size
    num_updates = config.num_steps * config.num_epochs * num_minibatches
    rates = {"actor": config.actor_learning_rate, "critic": config.critic_learning_rate}
    learning = {role: model.table[role] for role in TRAINABLE_ROLES if role in model.table}
    optimizers: dict[TrainPass, Optimizer] = {}
    for train_pass, roles in passes(learning).items():
        groups: list[ParamGroup] = []
        taken: set[int] = set()
        for role in roles:
            rate_of = {
                "adapter": rates[role],
                "trunk": rates[role] * config.full_learning_rate_scale,
                "head": config.value_head_learning_rate,
            }
            if roles[role].adapter is None:
                refuse_packed(model.trunk(train_pass[0]), role)
            for kind, parameters in model.trained_parameters(role).items():
                own = {name: p for name, p in parameters.items() if id(p) not in taken}
                taken |= {id(p) for p in own.values()}
                if own:
                    groups.append(ParamGroup(f"{role}/{kind}", own, rate_of[kind]))
        optimizers[train_pass] = Optimizer(
            groups,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            kind=config.optimizer,
            factor=learning_rate_factor(config.schedule, math.ceil(config.warmup_frac * num_updates), num_updates),
        )
    return optimizers


def refuse_packed(trunk: Trunk, role: str) -> None:
    """Raise `ConfigError` where a role would train weights that are packed."""
    if trunk.quantized is not None:
        raise ConfigError(
            f"the {role} trains its whole trunk, whose weights are packed (model.quantization="
            f"{trunk.quantized.quantization}); use a method with LoRA sets, or model.quantization=none"
        )


def save(session: Session, model: HydraModel, optimizers: Mapping[TrainPass, Optimizer], state: PPOState) -> None:
    """Commit everything the next step depends on; the best step's checkpoint is never pruned."""
    tensors: dict[str, dict[str, Tensor]] = {"model": model.trained_state()}
    tensors |= {f"optimizer-{i}": optimizer.state() for i, optimizer in enumerate(optimizers.values())}
    protect = set() if state.best_step is None else {state.best_step}
    session.save("ppo", state.step, tensors, asdict(state), protect=protect)


def moments_of(saved: Mapping[str, Mapping[str, float]]) -> dict[str, Moments]:
    """Moments by name, as a checkpoint holds them."""
    return {name: Moments(**numbers) for name, numbers in saved.items()}


def restore(
    checkpoint: Checkpoint | None, model: HydraModel, optimizers: Mapping[TrainPass, Optimizer]
) -> PPOState | None:
    """Load a checkpoint into model and optimizers; None without one. Raises `CheckpointError` if it does not fit."""
    if checkpoint is None:
        return None
    names = {"model", *(f"optimizer-{i}" for i in range(len(optimizers)))}
    if set(checkpoint.tensors) != names:
        raise CheckpointError(
            f"checkpoint of step {checkpoint.step} holds {sorted(checkpoint.tensors)}, not {sorted(names)}"
        )
    model.load_trained_state(checkpoint.tensors["model"])
    for i, optimizer in enumerate(optimizers.values()):
        optimizer.load_state(checkpoint.tensors[f"optimizer-{i}"])
    saved = {f.name: checkpoint.state[f.name] for f in fields(PPOState)}
    saved["moments"] = Moments(**saved["moments"])
    for name in ("source_moments", "held_out_moments"):
        saved[name] = moments_of(saved[name])
    saved["limits"] = StageLimits(**saved["limits"])
    return PPOState(**saved)
