"""AdamW over named groups: fp32 master copies, clipping that is applied, steps that can be skipped, exact state."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.runtime.adam8bit import AdamW8bit, zero_moments

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share a learning rate and are frozen together."""

    name: str
    """Unique among the groups of an optimizer."""
    params: dict[str, nn.Parameter]
    """The parameters by the names their state is saved under."""
    learning_rate: float
    """Peak learning rate; multiplied by the schedule's factor."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one call of `Optimizer.step` did."""

    grad_norm: float
    """Global 2-norm of the gradients before clipping; NaN or infinite where the step was skipped."""
    applied: bool
    """False where the step was skipped: no parameter and no moment has changed."""
    learning_rates: dict[str, float]
    """The rate of each group that took part, by group name."""


def learning_rate_factor(schedule: str, warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """The learning rate of optimizer step 0, 1, ... as a share of the peak.

    Linear warm-up over `warmup_steps` (step 0 already moves: its factor is 1 / warmup_steps), then `constant`, or
    `linear` or `cosine` from 1 at step `warmup_steps` to 0 at step `num_steps`, one step after the last.
    """
    assert schedule in ("constant", "linear", "cosine"), schedule

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with one global norm to clip to and one step counter for the schedule.

    A parameter in a 16-bit dtype has an fp32 master copy that takes the step and is rounded back into it: at usual
    learning rates most steps are smaller than half a bf16 spacing and would otherwise be lost.
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        factor: Callable[[int], float],
        kind: Literal["adamw", "adamw-8bit"] = "adamw",
    ) -> None:
        """`weight_decay` is decoupled; `max_grad_norm` bounds the norm over all groups of a step together; `factor`
        maps the number of applied steps so far to a share of the peak rates (see `learning_rate_factor`); `kind` says
        how moments are kept. Raises `ConfigError` where `kind` needs a package that is not installed."""
        self._groups = {group.name: group for group in groups}
        self._params = {f"{g.name}/{name}": param for g in groups for name, param in g.params.items()}
        self._group_of = {f"{g.name}/{name}": g.name for g in groups for name in g.params}
        num_params = sum(len(group.params) for group in groups)
        assert len(self._groups) == len(groups), "group names must differ"
        assert len(self._params) == num_params, "names of parameters must differ"
        assert len({id(param) for param in self._params.values()}) == num_params, "a parameter is in two groups"
        self._masters = {
            name: nn.Parameter(param.detach().float().contiguous())
            for name, param in self._params.items()
            if param.dtype in SIXTEEN_BIT
        }
        trained = [{"params": [self._trained(key) for key in self._keys({g.name})], "name": g.name} for g in groups]
        # The state is made here and not at the first step, so that it has the same names and bytes from the start.
        fresh_state = zero_moments
        if kind == "adamw-8bit":
            self._adamw = AdamW8bit(trained, betas=betas, weight_decay=weight_decay, setting=f"optimizer={kind}")
            fresh_state = self._adamw.fresh_state
        else:
            self._adamw = torch.optim.AdamW(trained, lr=0.0, betas=betas, weight_decay=weight_decay)
        for key in self._params:
            self._adamw.state[self._trained(key)] = fresh_state(self._trained(key))
        self._max_grad_norm = max_grad_norm
        self._factor = factor
        self._counters = {name: torch.tensor(0) for name in ("num_steps", "num_skipped", "num_skipped_in_a_row")}

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups, in the order given."""
        return tuple(self._groups)

    @property
    def num_steps(self) -> int:
        """Steps applied so far; skipped ones do not count, so they do not move the schedule."""
        return int(self._counters["num_steps"])

    @property
    def num_skipped(self) -> int:
        """Steps skipped so far."""
        return int(self._counters["num_skipped"])

    @property
    def num_skipped_in_a_row(self) -> int:
        """Steps skipped since the last applied one."""
        return int(self._counters["num_skipped_in_a_row"])

    def zero_grad(self) -> None:
        """Throw away all gradients; only needed for gradients that no `step` or `skip` has used."""
        for param in self._params.values():
            param.grad = None
        for master in self._masters.values():
            master.grad = None

    def step(self, groups: Collection[str] | None = None) -> StepResult:
        """One AdamW step of the named groups (default: all), clipped to `max_grad_norm` over these groups.

        A norm that is not finite skips the step: parameters, moments and `num_steps` stay bit for bit as they were and
        the skip is counted. Parameters without a gradient are left alone. Either way all gradients are used up, those
        of groups left out too: none leaks into the next step and none takes memory until then.
        """
        assert groups is None or set(groups) <= set(self._groups), f"no such group: {groups}"
        chosen = self._groups.keys() if groups is None else set(groups)
        keys = self._keys(chosen)
        for key in self._params.keys() - set(keys):
            self._params[key].grad = None  # AdamW passes over parameters without a gradient
        grads: list[Tensor] = []
        for key in keys:
            param = self._params[key]
            if param.grad is not None:
                # The 16-bit gradient dies as soon as its fp32 copy exists.
                grads.append(param.grad.float() if key in self._masters else param.grad)
                param.grad = None
                self._trained(key).grad = grads[-1]
        assert grads, f"no gradient reached {sorted(chosen)}"
        norm = nn.utils.get_total_norm(grads)
        if not bool(norm.isfinite()):
            return self.skip(grad_norm=norm.item(), groups=groups)

        nn.utils.clip_grads_with_norm_([self._trained(key) for key in keys], self._max_grad_norm, norm)
        rates = self._learning_rates(groups)
        for adamw_group in self._adamw.param_groups:
            adamw_group["lr"] = rates.get(adamw_group["name"], 0.0)
        stepped = [key for key in self._masters if self._masters[key].grad is not None]
        self._adamw.step()
        with torch.no_grad():
            for key in stepped:
                self._params[key].copy_(self._masters[key])
        self.zero_grad()
        self._counters["num_steps"] += 1
        self._counters["num_skipped_in_a_row"].zero_()
        return StepResult(norm.item(), True, rates)

    def skip(self, *, grad_norm: float = math.nan, groups: Collection[str] | None = None) -> StepResult:
        """Drop the gradients and count a skipped step, for a caller that saw a loss that is not finite."""
        self.zero_grad()
        self._counters["num_skipped"] += 1
        self._counters["num_skipped_in_a_row"] += 1
        return StepResult(grad_norm, False, self._learning_rates(groups))

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on besides the parameters: moments, master copies, counters.

        The tensors are the live ones, not copies (that would double their memory): save them before the next step.
        """
        tensors: dict[str, Tensor] = dict(self._counters)
        for key in self._params:
            for name, entry in self._adamw.state[self._trained(key)].items():
                tensors[f"{key}/{name}"] = entry
        for key, master in self._masters.items():
            tensors[f"{key}/master"] = master.detach()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned, into an optimizer of the same groups: the next step is then bit-equal.

        16-bit parameters are set to their rounded master copies; all others are loaded by whoever saved them.

        Raises:
            CheckpointError: names, shapes or dtypes differ; nothing has been changed then.
        """
        own = self.state()
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or extra:
            raise CheckpointError(
                f"the optimizer state belongs to other parameters: {len(missing)} missing {missing[:3]}, "
                f"{len(extra)} extra {extra[:3]}; resume with the settings that the checkpoint was saved with"
            )
        for name, target in own.items():
            found = tensors[name]
            if found.shape != target.shape or found.dtype != target.dtype:
                raise CheckpointError(
                    f"the optimizer state {name} is {found.dtype} {list(found.shape)}, but this run needs "
                    f"{target.dtype} {list(target.shape)}; resume with the settings that the checkpoint was saved with"
                )
        for name, target in own.items():
            target.copy_(tensors[name])
        for key, master in self._masters.items():
            self._params[key].copy_(master)

    def _keys(self, groups: Collection[str]) -> list[str]:
        return [key for key, group in self._group_of.items() if group in groups]

    def _trained(self, key: str) -> nn.Parameter:
        """The tensor AdamW steps: the fp32 master copy where there is one."""
        return self._masters.get(key, self._params[key])

    def _learning_rates(self, groups: Collection[str] | None) -> dict[str, float]:
        share = self._factor(self.num_steps)
        return {g.name: g.learning_rate * share for g in self._groups.values() if groups is None or g.name in groups}
