"""What a trunk pass, a learning pass and a rollout need, found by running them on the meta device: shapes, no numbers.

The very code that trains runs, so every family, fused layer and checkpointing policy is counted as it is. A model of a
few layers is run; layers are alike, so bytes grow linearly with their number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from transformers.configuration_utils import PretrainedConfig

from hydra_rlhf.config import LoraConfig, ModelConfig
from hydra_rlhf.errors import ModelError
from hydra_rlhf.memory.course import Course, Need
from hydra_rlhf.memory.meta_passes import (
    ADAPTER,
    HeadBytes,
    PassKind,
    Rows,
    run_layers,
    run_lm_head,
    run_rollout,
    run_scalar_heads,
)
from hydra_rlhf.model.device import pick_device
from hydra_rlhf.model.draw import DRAW_BYTES
from hydra_rlhf.model.load import DTYPES, first_line
from hydra_rlhf.model.logprobs import sweep_bytes
from hydra_rlhf.model.packing import MIN_STEPS
from hydra_rlhf.model.shapes import layer_period, meta_trunk, whole_trunk
from hydra_rlhf.model.tiled_logprobs import tile_shape
from hydra_rlhf.model.trunk import Trunk, text_config
from hydra_rlhf.runtime.meta_ops import KNOWN

FEW_TILES = 2
"""Tiles of logits that are run each way; more of them need no more memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassBytes:
    """Bytes on top of what is held anyway (weights, optimizer, gradients of earlier micro-batches)."""

    kept: float
    """Live when the trunk is done: what backward needs, or the hidden states alone; the KV cache in a rollout."""
    head: float
    """Most while the heads ran forward and backward."""
    peak: float
    """Most over the whole pass."""
    made: float = 0.0
    """Of a rollout, not counted in the others: what it makes of the adapters, and holds until it ends."""
    graph: float = 0.0
    """Live between forward and backward: what backward of layers and heads needs, and what the heads said."""


@dataclass
class Simulation:
    """Runs passes of one base model on the meta device and remembers what they needed."""

    config: PretrainedConfig
    model: ModelConfig
    lora: LoraConfig
    tile_bytes: int
    """Largest block of logits, in bytes of float32."""
    temperature: float = 1.0
    """At which log-probs are taken."""
    corrections: Mapping[str, float] = field(default_factory=dict)
    """Measured over simulated bytes of the passes of rollout, score and update, where a probe has measured them."""
    below_rank: int = 0
    """Rank of the LoRA set that stage 1 left on a quantised base; 0 = none."""
    _trunks: dict[bool, Trunk] = field(default_factory=dict)
    _needs: dict[tuple[object, ...], Need] = field(default_factory=dict)
    _courses: dict[tuple[object, ...], Course] = field(default_factory=dict)
    _heads_need: dict[tuple[object, ...], HeadBytes] = field(default_factory=dict)
    _found: dict[tuple[PassKind, Rows, int], PassBytes] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Of the real model."""
        return text_config(self.config).num_hidden_layers

    @cached_property
    def _device_type(self) -> str:
        """Where the model will run, which need not be this machine."""
        return pick_device("auto").type if self.model.device == "auto" else self.model.device.partition(":")[0]

    @cached_property
    def whole(self) -> Trunk:
        """The model at its full depth, without an adapter; only looked at."""
        return whole_trunk(self.config, self.model)

    def micro_batch(self, kind: PassKind, rows: Rows, *, checkpointed: int = 0) -> PassBytes:
        """One micro-batch through trunk and heads, with `checkpointed` of the layers recomputed in backward."""
        key = (kind, rows, checkpointed if kind.learns else 0)
        if key not in self._found:
            self._found[key] = self._micro_batch(*key)
        return self._found[key]

    def _micro_batch(self, kind: PassKind, rows: Rows, checkpointed: int) -> PassBytes:
        num, layers = rows.num, self.num_layers
        first = self.layers(kind, rows, recompute=checkpointed == layers)
        kept, peak = first.kept(num, layers), first.peak(num, layers)
        if 0 < checkpointed < layers:
            recomputed = self.layers(kind, rows, recompute=True)
            working, share = first.deep_peak(num, layers) - kept, checkpointed / layers
            kept = share * recomputed.kept(num, layers) + (1.0 - share) * kept
            # Backward begins in the layers that were kept; once they are gone one layer at a time is made again.
            peak = max(kept + working, recomputed.peak(num, checkpointed))
        heads = self._heads(kind, rows)
        head = kept + heads.peak
        if kind.learns and kind.lm_head and not kind.adapter:
            peak += self.tied_head_gradient()
        by = self.corrections.get("update" if kind.learns else "score", 1.0)
        return PassBytes(kept=by * kept, head=by * head, peak=by * max(head, peak), graph=by * (kept + heads.kept))

    def rollout(self, rows: Rows, *, adapter: bool) -> PassBytes:
        """Prefill, a draw and the last decode step of one row group."""
        need = self.decoding(rows, adapter=adapter)
        cache, peak = need.cache(rows.num, self.num_layers), need.peak(rows.num, self.num_layers)
        filler = self._filler(adapter=adapter) if rows.response >= MIN_STEPS else 0
        kept = need.kept(rows.num, self.num_layers)  # the cache, and what was made of the adapters
        vocab = len(self.whole.lm_head.weight)
        drawing = kept + min(rows.num, max(1, self.tile_bytes // (DRAW_BYTES * vocab))) * vocab * DRAW_BYTES
        by = self.corrections.get("rollout", 1.0)
        return PassBytes(
            kept=cache,
            head=cache + by * (drawing - kept),
            peak=cache + by * (max(peak, drawing) - kept),
            made=kept - cache + filler,
        )

    def _filler(self, *, adapter: bool) -> int:
        """What the weights of all layers take more while they are laid out for sampling."""
        trunk = self._trunk(recompute=False)
        groups = {id(lora_linear.shared): lora_linear.shared for lora_linear in trunk.lora_linears.values()}.values()
        stack = trunk.switch.stack_with(ADAPTER if adapter else None)
        found = sum(group.filler_bytes(stack) for group in groups if group.can_pack(self._device_type))
        return found * self.num_layers // self._depth

    def layers(self, kind: PassKind, rows: Rows, *, recompute: bool) -> Need:
        """The layers of a micro-batch alone; all or none of them are recomputed."""
        kind = PassKind(adapter=kind.adapter, learns=kind.learns)  # nothing else of it reaches the layers
        rows = Rows(num=rows.num, prompt=rows.prompt + rows.response, response=0)
        return self._need(("layers", kind), rows, partial(run_layers, kind=kind), recompute=recompute)

    def decoding(self, rows: Rows, *, adapter: bool) -> Need:
        """Prefill and last decode step of a row group, without its draw."""
        return self._need(("decoding", adapter), rows, partial(run_rollout, adapter=adapter), recompute=False)

    def _need(self, name: tuple[object, ...], rows: Rows, run: Callable[..., Course], *, recompute: bool) -> Need:
        """What a pass needs with any number of rows of this shape, from its courses with one and with two.

        With a single row the second course says nothing more, and is not run.
        """
        single = rows.num == 1
        key = (*name, rows.prompt, rows.response, recompute)
        if (*key, single) not in self._needs:
            one, two = (
                self._course((*key, num), partial(run, rows=replace(rows, num=num)), recompute=recompute)
                for num in (1, 1 if single else 2)
            )
            self._needs[*key, single] = Need.of(one, two, self._depth)
        return self._needs[*key, single]

    def _course(self, key: tuple[object, ...], run: Callable[..., Course], *, recompute: bool) -> Course:
        if key not in self._courses:
            try:
                self._courses[key] = run(self._trunk(recompute=recompute), period=self._period, known=KNOWN)
            except RuntimeError as error:
                if "meta" not in str(error):
                    raise
                raise ModelError(
                    f"{type(self.whole.model).__name__} cannot be planned, so not trained within a budget either: its "
                    f"code asks for numbers where a plan has shapes alone ({first_line(error)}); use a family whose "
                    "layers are plain attention, such as Llama, Mistral, Qwen 3, Gemma or OPT"
                ) from error
        return self._courses[key]

    @cached_property
    def _period(self) -> int:
        """Layers after which their kinds repeat."""
        return layer_period(self.whole)

    @property
    def _depth(self) -> int:
        """Layers that are run: the first, whose input needs no gradient, one more to compare with, and all kinds."""
        return min(self.num_layers, self._period + 2)

    def _heads(self, kind: PassKind, rows: Rows) -> HeadBytes:
        """The heads forward and backward, on top of what the layers keep."""
        trunk = self.whole
        one, two = (
            self._once(("scalar", kind, few), lambda few=few: run_scalar_heads(trunk, kind, few, KNOWN))
            for few in (replace(rows, num=1), replace(rows, num=2))
        )
        scalar = one.towards(two, rows.num - 1)
        if not kind.lm_head:
            return scalar
        lm = self._lm_head(trunk, kind, rows)
        return HeadBytes(kept=scalar.kept + lm.kept, peak=max(scalar.peak, lm.peak))

    def _lm_head(self, trunk: Trunk, kind: PassKind, rows: Rows) -> HeadBytes:
        """As `_heads`, of the LM head alone. A large one is run on a few tiles: bytes are linear in both its sides."""
        vocab, width = trunk.lm_head.weight.shape
        read = replace(rows, num=max(1, rows.num // 2)) if kind.half else rows
        kind = PassKind(adapter=kind.adapter, learns=kind.learns, entropy_gradient=kind.entropy_gradient)
        tile_bytes = sweep_bytes(self.tile_bytes, self._device_type)
        tile_rows, tile_columns = tile_shape(2**30, vocab, tile_bytes)
        columns = min(vocab, FEW_TILES * tile_columns)
        trained = kind.learns and not kind.adapter
        left_out = (vocab - columns) * width * trunk.lm_head.weight.element_size() if trained else 0

        def run(num: int, columns: int) -> HeadBytes:
            part = replace(read, num=num)
            return self._once(
                ("lm", kind, part, columns),
                lambda: run_lm_head(
                    trunk,
                    kind,
                    part,
                    columns,
                    temperature=self.temperature,
                    tile_bytes=tile_bytes,
                    known=KNOWN,
                ),
            )

        if read.num * rows.response * vocab * 4 <= tile_bytes:  # the direct path, on the whole vocabulary
            return run(read.num, vocab)
        few = -(-FEW_TILES * tile_rows // rows.response)
        if read.num <= 2 * few:
            found = run(read.num, columns)
        else:
            low, high = run(few, columns), run(2 * few, columns)
            found = low.towards(high, (read.num - few) / few)
        return replace(found, peak=found.peak + left_out)

    def _once(self, key: tuple[object, ...], run: Callable[[], HeadBytes]) -> HeadBytes:
        if key not in self._heads_need:
            self._heads_need[key] = run()
        return self._heads_need[key]

    def tied_head_gradient(self) -> float:
        """Bytes of a tied head's gradient, which waits for the embedding's through a backward that trains both."""
        weight, embedding = self.whole.lm_head.weight, self.whole.model.get_input_embeddings().weight
        return weight.numel() * weight.element_size() if weight is embedding else 0.0

    def _trunk(self, *, recompute: bool) -> Trunk:
        if recompute not in self._trunks:
            trunk = meta_trunk(self.config, self.model, num_layers=self._depth)
            for name, rank in (("below", self.below_rank), (ADAPTER, self.lora.rank)):
                if rank:
                    trunk.add_adapter(
                        name,
                        rank=rank,
                        alpha=self.lora.alpha,
                        targets=self.lora.targets,
                        dtype=DTYPES[self.lora.dtype],
                        seed_of=lambda path: 0,  # noqa: ARG005  # nothing is drawn on the meta device
                    )
            if self.below_rank:
                trunk.keep_below("below")
            if recompute:
                trunk.enable_checkpointing()
            self._trunks[recompute] = trunk
        return self._trunks[recompute]
