"""Operations on meta tensors at a tenth of their cost: what an operation gives for shapes seen before is made at once.

Torch works out the shapes of most meta operations in Python, at about 0.1 ms each. Layers are alike, so nearly all of
them come again.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class View(NamedTuple):
    """An output in the storage of an argument."""

    argument: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class New(NamedTuple):
    """An output in storage of its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Outputs:
    """How the outputs of an operation are made for arguments of certain shapes."""

    rules: tuple[int | View | New | None, ...]
    """Of each output: the argument that it is, a view of one, a new tensor, or none at all."""
    container: type | None
    """What the operation returns them in; None = a single tensor."""
    makes: bool
    """Whether there is a new one among them."""


KnownShapes = dict[Any, Outputs | None]
"""Outputs by operation and arguments; None where they have to be found each time."""
KNOWN: KnownShapes = {}
"""What this process has found: it depends on operations, shapes and dtypes alone, so all models share it."""


class MetaBytes(TorchDispatchMode):
    """Runs operations on meta tensors and counts the bytes of every storage from when it is made until it dies.

    What an operation takes and gives back within itself is not seen. Whoever shares `known` works shapes out once.
    """

    def __init__(self, known: KnownShapes | None = None) -> None:
        super().__init__()
        self.live = 0
        """Bytes held now."""
        self.moments: list[int] = []
        """Bytes held after each operation that made something, since the start or the last `restart`."""
        self._known = {} if known is None else known
        self._sizes: dict[weakref.ref[Any], int] = {}

    @property
    def peak(self) -> int:
        """The most bytes at any moment."""
        return max(self.moments, default=self.live)

    def restart(self) -> None:
        """Forget all moments but this one."""
        self.moments = [self.live]

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors, each storage once and whole."""
        news = False
        for tensor in tensors:
            if not tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            reference = weakref.ref(storage, self._gone)
            num_bytes, before = storage.nbytes(), self._sizes.get(reference)
            if num_bytes != before:
                self.live += num_bytes - (before or 0)
                self._sizes[reference] = num_bytes
                news = True
        if news:
            self.moments.append(self.live)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would keep its compiler off at every single operation, though nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the outputs as they are known to be for such arguments, or run the operation and learn it."""
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        key = (func, signature((*args, *kwargs.items()), tensors))
        known = self._known.get(key)
        if known is None:
            output = func(*args, **kwargs)
            if key not in self._known:
                same = signature((*args, *kwargs.items()), []) == key[1]  # else it changes the shape of an argument
                self._known[key] = learn(output, tensors) if same else None
            flat = output if isinstance(output, list | tuple) else (output,)
            self.hold(x for x in flat if isinstance(x, Tensor))
            return output
        outputs = [make(rule, tensors) for rule in known.rules]
        if known.makes:
            made = zip(outputs, known.rules, strict=True)
            self.hold(x for x, rule in made if x is not None and type(rule) is New)
        return outputs[0] if known.container is None else known.container(outputs)

    def _gone(self, reference: Any) -> None:
        self.live -= self._sizes.pop(reference, 0)


def signature(values: Iterable[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """All about arguments that the shape of an output depends on; their tensors are added to `tensors`."""
    parts: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            parts.append((value.dtype, value.shape, value.stride(), value.storage_offset(), value.is_meta))
        elif isinstance(value, list | tuple):
            parts.append(signature(value, tensors))
        else:
            parts.append((type(value), value))  # 1, 1.0 and True are equal, but x * 1 and x * 1.0 differ
    return tuple(parts)


def learn(output: Any, tensors: Sequence[Tensor]) -> Outputs | None:
    """How to make an operation's outputs another time; None where that cannot be told."""
    container = type(output) if isinstance(output, list | tuple) else None
    rules: list[int | View | New | None] = []
    own: set[int] = set()
    for x in (output,) if container is None else output:
        if x is None:
            rules.append(None)
            continue
        if not isinstance(x, Tensor) or not x.is_meta or type(x) is not Tensor:
            return None
        rule = rule_of(x, tensors)
        if type(rule) is New:
            again = make(rule, ())
            assert again is not None
            if x.untyped_storage()._cdata in own or again.untyped_storage().nbytes() != storage_bytes(x):
                return None
            own.add(x.untyped_storage()._cdata)
        elif type(rule) is View and tensors[rule.argument].dtype != x.dtype:
            return None
        rules.append(rule)
    return Outputs(tuple(rules), container, makes=bool(own))


def rule_of(x: Tensor, tensors: Sequence[Tensor]) -> int | View | New:
    """Which argument an output is, of which one it is a view, or that it is new."""
    for i, tensor in enumerate(tensors):
        if x is tensor:
            return i
    for i, tensor in enumerate(tensors):
        if x.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            return View(i, tuple(x.shape), x.stride(), int(x.storage_offset()))
    return New(tuple(x.shape), x.stride(), x.dtype)


def make(rule: int | View | New | None, tensors: Sequence[Tensor]) -> Tensor | None:
    """An output by its rule."""
    if rule is None:
        return None
    if isinstance(rule, int):
        return tensors[rule]
    if isinstance(rule, View):
        return torch.as_strided(tensors[rule.argument], rule.size, rule.stride, rule.offset)
    return torch.empty_strided(rule.size, rule.stride, dtype=rule.dtype, device="meta")


def storage_bytes(x: Tensor) -> int:
    """Bytes of a tensor's whole storage."""
    return x.untyped_storage().nbytes()
