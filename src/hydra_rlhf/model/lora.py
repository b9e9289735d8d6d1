"""LoRA linears with several named adapters (Hu et al. 2021), chosen by an explicit value that forward captures.

The adapters in use are read once, when a linear runs forward; autograd then holds their tensors, so a backward pass
gives the right gradients whatever is in use by then. Recomputation under activation checkpointing re-enters the
captured stack through `recompute_contexts`. There is no way to switch an adapter on and leave it on.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hydra_rlhf.errors import ConfigError
from hydra_rlhf.model.fused import LoraProducts, frozen_output, outputs_of, stack_rows
from hydra_rlhf.model.quantized import QuantizedLinear

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling linears that decoders call on one tensor; a pair of names that is called on two costs a product, no more."""


class AdapterSwitch:
    """Which adapters the LoRA linears of one trunk add when they run forward; shared by all of them."""

    def __init__(self) -> None:
        self.below: tuple[str, ...] = ()
        """Adapters that stage 1 left on a base it could not write to: part of "LoRA off", under every other."""
        self.stack: tuple[str, ...] = ()
        """The adapters in use now; empty outside `use`."""
        self._made: dict[Hashable, tuple[Tensor, ...]] | None = None
        self.waiting: set[SharedInput] = set()
        """Shared inputs that some of their linears have not asked for yet."""

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Inside the block no adapter changes: what passes make of them, stacked and in their dtype, is made once."""
        before, self._made = self._made, {}
        try:
            yield
        finally:
            self._made = before

    def made(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` gives; inside `fixed`, for each key, what it gave the first time. Not to be differentiated."""
        if self._made is None:
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def made_bytes(self) -> int:
        """Bytes of what waits inside `fixed`, parameters that are used as they are left out."""
        made = (tensor for tensors in (self._made or {}).values() for tensor in tensors)
        return sum(tensor.nbytes for tensor in made if not isinstance(tensor, nn.Parameter))

    @contextmanager
    def use(self, adapter: str | None) -> Iterator[None]:
        """Put `adapter` (None = LoRA off) on the stack inside the block; restored on exit, error or not."""
        with self._use((*self.below, adapter) if adapter is not None and adapter not in self.below else self.below):
            yield

    @contextmanager
    def _use(self, stack: tuple[str, ...]) -> Iterator[None]:
        before, self.stack = self.stack, stack
        try:
            yield
        finally:
            self.stack = before
            for shared in tuple(self.waiting):  # a recomputation that stopped early, or an error
                shared.forget(self)

    def recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint`: recompute with the adapters that are in use now, in forward."""
        return nullcontext(), self._use(self.stack)


class SharedInput:
    """LoRA linears that read one input (q, k, v; gate, up): they run together, and the input is kept once.

    The first one that is called runs all; the others' outputs wait for their calls. Where one is called with another
    input while outputs wait, the linears share no input after all, and each is on its own from then on.
    """

    def __init__(self) -> None:
        self.members: list[LoraLinear] = []
        self._outputs: dict[int, Tensor] = {}
        self._x: Tensor | None = None
        self._stack: tuple[str, ...] = ()

    def output(self, member: "LoraLinear", x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """What one member says of x, with the adapters in use."""
        switch = member.switch
        waits = self._x is x and self._stack == switch.stack and id(member) in self._outputs
        if not waits and self._outputs:
            self.forget(switch)
            self.members.remove(member)
            member.shared = SharedInput()
            member.shared.members.append(member)
            return member.shared.output(member, x)
        if not waits:
            outputs = self._run(switch, x)
            if len(outputs) == 1:
                return outputs[0]
            self._outputs = {id(m): y for m, y in zip(self.members, outputs, strict=True)}
            self._x, self._stack = x, switch.stack
            switch.waiting.add(self)
        output = self._outputs.pop(id(member))
        if not self._outputs:
            self.forget(switch)
        return output

    def _run(self, switch: AdapterSwitch, x: Float[Tensor, "*n i"]) -> tuple[Float[Tensor, "*n o"], ...]:
        """The outputs of all members."""
        stack, first = switch.stack, self.members[0]
        linears = [member.linear for member in self.members]
        scales = [first.scale[name] for name in stack]
        if torch.is_grad_enabled():
            As = [member.lora_A[name] for member in self.members for name in stack]
            Bs = [member.lora_B[name] for member in self.members for name in stack]
            return LoraProducts.apply(x, linears, scales, *As, *Bs)
        A, *Bs = switch.made((id(self), stack, x.dtype), lambda: self._made(stack, x.dtype))
        ranks = [first.rank[name] for name in stack] * len(self.members)
        return outputs_of(x, torch.nn.functional.linear(x, A), linears, scales, ranks, Bs)

    def _made(self, stack: tuple[str, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """All A as one, and the B, in the dtype that computes."""
        As = [member.lora_A[name] for member in self.members for name in stack]
        return stack_rows(As, dtype), *(member.lora_B[name].to(dtype) for member in self.members for name in stack)

    def forget(self, switch: AdapterSwitch) -> None:
        """Let go of the input and of the outputs that wait."""
        self._x, self._outputs = None, {}
        switch.waiting.discard(self)


class LoraLinear(nn.Module):
    """A frozen linear y = W x + b with named low-rank updates: y + (alpha / rank) B A x of each adapter in use.

    With none in use the frozen linear's output is returned untouched, bit for bit. The adapters are kept in their own
    dtype and compute in that of x.
    """

    def __init__(self, linear: nn.Module, switch: AdapterSwitch, shared: SharedInput | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.switch = switch
        self.lora_A = nn.ParameterDict()
        """Per adapter: A of shape [rank, in_features]."""
        self.lora_B = nn.ParameterDict()
        """Per adapter: B of shape [out_features, rank]."""
        self.scale: dict[str, float] = {}
        self.rank: dict[str, int] = {}
        self.shared = shared or SharedInput()
        self.shared.members.append(self)

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some model code reads its dtype or device."""
        return self.linear.weight  # pyright: ignore[reportReturnType]

    def add_adapter(
        self, name: str, *, rank: int, alpha: float, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        """Add a zero update: A uniform as Kaiming et al. (a = sqrt 5) from `generator`, B zero."""
        in_features, out_features = linear_features(self.linear)
        bound = in_features**-0.5
        device = next(iter(self.linear.state_dict().values())).device
        if device.type == "meta":
            A = torch.empty(rank, in_features, device=device)
        else:
            A = torch.empty(rank, in_features, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        self.lora_A[name] = nn.Parameter(A.to(device=device, dtype=dtype))
        self.lora_B[name] = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.scale[name], self.rank[name] = alpha / rank, rank

    def drop_adapter(self, name: str) -> None:
        """Forget one adapter."""
        del self.lora_A[name], self.lora_B[name], self.scale[name], self.rank[name]

    def updates(self) -> tuple[list[nn.Parameter], list[nn.Parameter], tuple[float, ...]]:
        """A, B and scale of each adapter in use, from the bottom of the stack up."""
        stack = self.switch.stack
        return [self.lora_A[n] for n in stack], [self.lora_B[n] for n in stack], tuple(self.scale[n] for n in stack)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """[*n, in_features] -> [*n, out_features] with the adapters in use now."""
        return self.shared.output(self, x) if self.switch.stack else frozen_output(self.linear, x)

    def extra_repr(self) -> str:
        """The adapters' names, for `print(model)`."""
        return f"adapters={list(self.scale)}"


def linear_features(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of any of the three kinds; a transformers `Conv1D` stores its weight transposed."""
    if isinstance(linear, nn.Linear | QuantizedLinear):
        return linear.in_features, linear.out_features
    weight: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    in_features, out_features = weight.shape
    return in_features, out_features


def is_linear(module: nn.Module) -> bool:
    """True for the two kinds of linear that decoders of transformers are made of, and for the packed form of both."""
    return isinstance(module, nn.Linear | QuantizedLinear) or type(module).__name__ == "Conv1D"


def find_linears(decoder: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The targeted linears of a decoder as {path: linear}, those inside LoRA linears under the LoRA linears' paths.

    `targets` is `("all-linear",)` or the last name(s) of the modules to adapt. Raises `ConfigError` for a target that
    matches nothing.
    """
    outer = {id(module.linear): path for path, module in decoder.named_modules() if isinstance(module, LoraLinear)}
    found = {outer.get(id(module), path): module for path, module in decoder.named_modules() if is_linear(module)}
    if not found:
        raise ConfigError(f"lora.targets={list(targets)}: this model has no linear layers that can be found")
    if targets == ("all-linear",):
        return found
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in found):
            names = sorted({path.rsplit(".", 1)[-1] for path in found})
            raise ConfigError(f"lora.targets: no linear is called {target!r}; this model has {', '.join(names)}")
    return {path: m for path, m in found.items() if any(f".{path}".endswith(f".{target}") for target in targets)}


def check_rank(linears: Iterable[nn.Module], rank: int) -> None:
    """Raise `ConfigError` for a rank that no matrix has: the update would be larger than what it updates."""
    full = max(min(linear_features(linear)) for linear in linears)
    if rank > full:
        raise ConfigError(f"lora.rank={rank} is above the full rank of the largest adapted matrix; use at most {full}")


def wrap_linears(decoder: nn.Module, switch: AdapterSwitch, targets: tuple[str, ...]) -> dict[str, LoraLinear]:
    """Replace the targeted linears of `decoder` in place by LoRA linears, as {path: linear}. Weights are untouched."""
    wrapped: dict[str, LoraLinear] = {}
    shared: dict[tuple[str, tuple[str, ...]], SharedInput] = {}
    for path, module in find_linears(decoder, targets).items():
        parent, _, name = path.rpartition(".")
        siblings = next((names for names in SHARED_INPUTS if name in names), (name,))
        wrapped[path] = LoraLinear(module, switch, shared.setdefault((parent, siblings), SharedInput()))
        setattr(decoder.get_submodule(parent), name, wrapped[path])
    return wrapped


def unwrap_linears(decoder: nn.Module, wrapped: Mapping[str, LoraLinear]) -> None:
    """Undo `wrap_linears`: put the plain linears back and drop the adapters."""
    for path, lora_linear in wrapped.items():
        parent, _, name = path.rpartition(".")
        setattr(decoder.get_submodule(parent), name, lora_linear.linear)


@torch.no_grad()
def merge_into_linears(wrapped: Mapping[str, LoraLinear], *adapters: str) -> None:
    """Add the adapters' updates to the weights, once, computed in float32 and rounded to the weight's dtype.

    Only for a base that becomes a new base (stage 1) or for a copy that is exported, never for the shared base of
    stage 2: in bf16 the rounding cannot be undone.
    """
    for lora_linear in wrapped.values():
        assert not isinstance(lora_linear.linear, QuantizedLinear), "packed weights are never written"
        weight = lora_linear.weight
        merged = weight.float()
        for adapter in adapters:
            A, B = lora_linear.lora_A[adapter].float(), lora_linear.lora_B[adapter].float()
            update = lora_linear.scale[adapter] * (B @ A)
            merged = merged + (update if isinstance(lora_linear.linear, nn.Linear) else update.T)
        weight.copy_(merged)
