"""AdamW that keeps its moments in 8 bits, in blocks with a scale each (Dettmers et al. 2022), through bitsandbytes.

Only the arithmetic of one step is the library's. The state is made and held here, as plain tensors with fixed names.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hydra_rlhf.runtime.extras import load_bitsandbytes

BLOCK = 256
"""Numbers that share a scale; fixed by the library's kernels."""
MIN_8BIT_SIZE = 4096
"""Smaller tensors keep float32 moments, as the library's own optimizers do: they cost next to nothing."""


class AdamW8bit(torch.optim.AdamW):
    """torch's AdamW whose large tensors keep both moments as uint8 codes and one float32 scale per block.

    2.03 bytes of state per number instead of 8. The caller makes the state with `fresh_state` and owns the parameters.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], weight_decay: float, setting: str
    ) -> None:
        """Raises `ConfigError` naming `setting` where bitsandbytes is not installed."""
        super().__init__(groups, lr=0.0, betas=betas, weight_decay=weight_decay)
        self._functional = load_bitsandbytes(setting).functional
        # What the codes 0 to 255 stand for, as shares of a block's scale: the first moment has a sign.
        self._signed = self._functional.create_dynamic_map(signed=True)
        self._unsigned = self._functional.create_dynamic_map(signed=False)

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step: both moments zero."""
        if parameter.numel() < MIN_8BIT_SIZE:
            return zero_moments(parameter)
        num_blocks = -(-parameter.numel() // BLOCK)
        state = {"step": torch.tensor(0.0)}
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros(parameter.shape, dtype=torch.uint8, device=parameter.device)
            state[f"{moment}_scale"] = torch.zeros(num_blocks, device=parameter.device)
        return state

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every parameter that has a gradient; the gradients of large ones are used up."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and "exp_avg_scale" in self.state[parameter]:
                    self._step_in_8_bits(parameter, group)
                    parameter.grad = None
        super().step()

    def _step_in_8_bits(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        dense = parameter.contiguous()  # the kernels see memory, not strides
        assert parameter.grad is not None
        self._signed, self._unsigned = self._signed.to(dense.device), self._unsigned.to(dense.device)
        beta1, beta2 = group["betas"]
        self._functional.optimizer_update_8bit_blockwise(
            "adam",
            parameter.grad.contiguous(),
            dense,
            state["exp_avg"],
            state["exp_avg_sq"],
            beta1,
            beta2,
            0.0,  # beta3 and alpha belong to other optimizers
            0.0,
            group["eps"],
            int(state["step"]),
            group["lr"],
            self._signed,
            self._unsigned,
            state["exp_avg_scale"],
            state["exp_avg_sq_scale"],
            group["weight_decay"],
        )
        if dense.data_ptr() != parameter.data_ptr():
            parameter.copy_(dense)


def zero_moments(parameter: Float[Tensor, "*n"]) -> dict[str, Tensor]:
    """AdamW's state before the first step, as torch names it, with moments in the parameter's dtype."""
    return {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
    }
