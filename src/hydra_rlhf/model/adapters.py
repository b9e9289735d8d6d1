"""Which adapters LoRA linears use, and the linears that read one input and therefore run together."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hydra_rlhf.model.fused import LoraProducts, add_updates, outputs_of, rows, stack_rows
from hydra_rlhf.model.packing import Tiles, can_pack, filler_bytes

if TYPE_CHECKING:
    from hydra_rlhf.model.lora import LoraLinear


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
        with self._use(self.stack_with(adapter)):
            yield

    def stack_with(self, adapter: str | None) -> tuple[str, ...]:
        """The adapters that are in use where this one is."""
        return (*self.below, adapter) if adapter is not None and adapter not in self.below else self.below

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
        self.tiles: Tiles | None = None
        """The weights, and A of `tiles_stack`, laid out for sampling."""
        self._tiles_stack: tuple[str, ...] = ()
        self._tiles_Bs: tuple[Tensor, ...] = ()

    def output(self, member: "LoraLinear", x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """What one member says of x, with the adapters in use."""
        switch = member.switch
        waits = self._x is x and self._stack == switch.stack and id(member) in self._outputs
        if not waits and self._outputs:
            self.forget(switch)
            self.lay_back()
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
        if self.tiles is not None:
            return self._run_in_tiles(self.tiles, stack, x)
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

    def can_pack(self, device_type: str) -> bool:
        """Whether products on such a device are faster with the members' weights in tiles."""
        return all(can_pack(member.linear, device_type) for member in self.members)

    def filler_bytes(self, stack: tuple[str, ...]) -> int:
        """What the members' weights, and A of these adapters, take more in tiles."""
        num_rows = sum(len(member.weight) + sum(member.rank[name] for name in stack) for member in self.members)
        return filler_bytes(num_rows, self.members[0].weight.shape[1])

    def lay_out(self, stack: tuple[str, ...]) -> None:
        """From here on the members' weights are in tiles, with these adapters, and no others can be used."""
        linears = [member.linear for member in self.members if isinstance(member.linear, nn.Linear)]
        As = [member.lora_A[name] for member in self.members for name in stack]
        dtype = linears[0].weight.dtype
        self._tiles_Bs = tuple(member.lora_B[name].detach().to(dtype) for member in self.members for name in stack)
        self._tiles_stack, self.tiles = stack, Tiles.of(linears, [A.detach() for A in As])

    def lay_back(self) -> None:
        """The members' weights as they were, if they are in tiles."""
        if self.tiles is not None:
            self.tiles.lay_back()
        self.tiles, self._tiles_Bs = None, ()

    def _run_in_tiles(self, tiles: Tiles, stack: tuple[str, ...], x: Float[Tensor, "*n i"]) -> tuple[Tensor, ...]:
        """As `_run`, in one product, without gradients."""
        assert not torch.is_grad_enabled(), "weights in tiles have no gradients to give"
        assert stack == self._tiles_stack, f"laid out with the adapters {self._tiles_stack}, used with {stack}"
        first, n = self.members[0], len(stack)
        sizes = [linear.out_features for linear in tiles.linears]
        ranks = [first.rank[name] for name in stack] * len(sizes)
        ys_and_us = tiles.product(rows(x)).split((*sizes, *ranks), dim=-1)
        ys, us, scales = ys_and_us[: len(sizes)], ys_and_us[len(sizes) :], [first.scale[name] for name in stack]
        return tuple(
            add_updates(y, scales, us[i * n : (i + 1) * n], self._tiles_Bs[i * n : (i + 1) * n]).view(*x.shape[:-1], -1)
            for i, y in enumerate(ys)
        )

    def forget(self, switch: AdapterSwitch) -> None:
        """Let go of the input and of the outputs that wait."""
        self._x, self._outputs = None, {}
        switch.waiting.discard(self)


@contextmanager
def in_tiles(lora_linears: Iterable["LoraLinear"], stack: tuple[str, ...]) -> Iterator[None]:
    """Inside the block the weights of these linears are laid out for sampling with these adapters, where they can be.

    A weight that two linears share stays plain. Nothing of it may change inside the block, and nothing be learned.
    """
    lora_linears = tuple(lora_linears)
    uses = Counter(id(lora_linear.linear.weight) for lora_linear in lora_linears)
    groups = {id(lora_linear.shared): lora_linear.shared for lora_linear in lora_linears}
    try:
        for group in groups.values():
            alone = all(uses[id(member.linear.weight)] == 1 for member in group.members)
            if alone and group.can_pack(group.members[0].weight.device.type):
                group.lay_out(stack)
        yield
    finally:
        for group in groups.values():
            group.lay_back()
