"""What a trunk pass, a learning pass and a rollout need, found by running them on the meta device: shapes, no numbers.

The very code that trains runs, so every family, fused layer and checkpointing policy is counted as it is. A model of a
few layers is run; layers are alike, so bytes grow linearly with their number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from transformers.configuration_utils import PretrainedConfig

from hydra_rlhf.config import LoraConfig, ModelConfig
from hydra_rlhf.memory.meta_passes import (
    ADAPTER,
    Bytes,
    PassKind,
    Rows,
    run_layers,
    run_lm_head,
    run_rollout,
    run_scalar_heads,
)
from hydra_rlhf.model.load import DTYPES
from hydra_rlhf.model.sample import DRAW_BYTES
from hydra_rlhf.model.shapes import meta_trunk
from hydra_rlhf.model.tiled_logprobs import tile_shape
from hydra_rlhf.model.trunk import Trunk, text_config

DEPTHS = (2, 4)
"""Layers of the two models that are run: even, for families that alternate two kinds; the first layer is a special
case (its input needs no gradient), so there is at least one more."""
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
    _trunks: dict[tuple[int, bool], Trunk] = field(default_factory=dict)
    _known: dict[tuple[object, ...], Bytes] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Of the real model."""
        return text_config(self.config).num_hidden_layers

    def micro_batch(self, kind: PassKind, rows: Rows, *, checkpointed: int = 0) -> PassBytes:
        """One micro-batch through trunk and heads, with `checkpointed` of the layers recomputed in backward."""
        kept, peak = self._through_layers(kind, rows, recompute=False)
        if checkpointed and kind.learns:
            inputs, recomputing = self._through_layers(kind, rows, recompute=True)
            working, share = peak - kept, checkpointed / self.num_layers
            kept = share * inputs + (1.0 - share) * kept
            # Backward begins in the layers that were kept; once they are gone one layer at a time is made again.
            peak = max(kept + working, recomputing) if share < 1.0 else recomputing
        head = kept + self._heads(kind, rows)
        if kind.learns and kind.lm_head and not kind.adapter:
            peak += self._tied_head_gradient()
        by = self.corrections.get("update" if kind.learns else "score", 1.0)
        return PassBytes(kept=by * kept, head=by * head, peak=by * max(head, peak))

    def rollout(self, rows: Rows, *, adapter: bool) -> PassBytes:
        """Prefill, a draw and the last decode step of one row group."""
        cache, peak = self._extrapolated(
            rows,
            ("rollout", adapter),
            lambda trunk, few: run_rollout(trunk, few, adapter=adapter),
            recompute=False,
        )
        vocab = len(self._small_trunk().lm_head.weight)
        drawing = cache + min(rows.num, max(1, self.tile_bytes // (DRAW_BYTES * vocab))) * vocab * DRAW_BYTES
        by = self.corrections.get("rollout", 1.0)
        return PassBytes(
            kept=cache, head=cache + by * (drawing - cache), peak=cache + by * (max(peak, drawing) - cache)
        )

    def _through_layers(self, kind: PassKind, rows: Rows, *, recompute: bool) -> Bytes:
        kind = PassKind(adapter=kind.adapter, learns=kind.learns)  # nothing else of it reaches the layers
        return self._extrapolated(
            rows, ("layers", kind), lambda trunk, few: run_layers(trunk, kind, few), recompute=recompute
        )

    def _extrapolated(
        self, rows: Rows, name: tuple[object, ...], run: Callable[[Trunk, Rows], Bytes], *, recompute: bool
    ) -> Bytes:
        """`run` on all rows and all layers, from what it gives for one and two rows and two small models.

        Bytes are linear in both: rows share nothing, and layers are alike.
        """
        one, two = (self._at_full_depth(replace(rows, num=num), name, run, recompute=recompute) for num in (1, 2))
        return _mix(two, one, rows.num - 1.0)

    def _at_full_depth(
        self, rows: Rows, name: tuple[object, ...], run: Callable[[Trunk, Rows], Bytes], *, recompute: bool
    ) -> Bytes:
        key = (*name, rows, recompute)
        if key not in self._known:
            first, second = DEPTHS
            if self.num_layers <= second:
                self._known[key] = run(self._trunk(self.num_layers, recompute=recompute), rows)
            else:
                low, high = (run(self._trunk(depth, recompute=recompute), rows) for depth in DEPTHS)
                self._known[key] = _mix(high, low, (self.num_layers - first) / (second - first))
        return self._known[key]

    def _heads(self, kind: PassKind, rows: Rows) -> float:
        """Most bytes while the heads run forward and backward, on top of what the layers keep."""
        trunk = self._small_trunk()
        one, two = (
            self._once(("scalar", kind, few), lambda few=few: run_scalar_heads(trunk, kind, few))
            for few in (replace(rows, num=1), replace(rows, num=2))
        )
        scalar = one + (two - one) * (rows.num - 1)
        return max(scalar, self._lm_head(trunk, kind, rows)) if kind.lm_head else scalar

    def _lm_head(self, trunk: Trunk, kind: PassKind, rows: Rows) -> float:
        """As `_heads`, of the LM head alone. A large one is run on a few tiles: bytes are linear in both its sides."""
        vocab, width = trunk.lm_head.weight.shape
        read = replace(rows, num=max(1, rows.num // 2)) if kind.half else rows
        tile_rows, tile_columns = tile_shape(2**30, vocab, self.tile_bytes)
        columns = min(vocab, FEW_TILES * tile_columns)
        trained = kind.learns and not kind.adapter
        left_out = (vocab - columns) * width * trunk.lm_head.weight.element_size() if trained else 0

        def run(num: int, columns: int) -> float:
            part = replace(read, num=num)
            return self._once(
                ("lm", kind, part, columns),
                lambda: run_lm_head(trunk, kind, part, columns, self.temperature, self.tile_bytes),
            )

        if read.num * rows.response * vocab * 4 <= self.tile_bytes:  # the direct path, on the whole vocabulary
            return run(read.num, vocab)
        few = -(-FEW_TILES * tile_rows // rows.response)
        if read.num <= 2 * few:
            return run(read.num, columns) + left_out
        low, high = run(few, columns), run(2 * few, columns)
        return low + (high - low) * (read.num - few) / few + left_out

    def _once(self, key: tuple[object, ...], run: Callable[[], float]) -> float:
        if key not in self._known:
            needed = run()
            self._known[key] = (needed, needed)
        return self._known[key][0]

    def _tied_head_gradient(self) -> float:
        """A tied head's gradient waits for the embedding's through the whole backward."""
        trunk = self._small_trunk()
        weight, embedding = trunk.lm_head.weight, trunk.model.get_input_embeddings().weight
        return weight.numel() * weight.element_size() if weight is embedding else 0.0

    def _small_trunk(self) -> Trunk:
        return self._trunk(min(self.num_layers, DEPTHS[0]), recompute=False)

    def _trunk(self, num_layers: int, *, recompute: bool) -> Trunk:
        key = (num_layers, recompute)
        if key not in self._trunks:
            trunk = meta_trunk(self.config, self.model, num_layers=num_layers)
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
            self._trunks[key] = trunk
        return self._trunks[key]


def _mix(one: Bytes, other: Bytes, share: float) -> Bytes:
    """share * one + (1 - share) * other, entry by entry; a share above 1 extrapolates."""
    kept, peak = (share * a + (1.0 - share) * b for a, b in zip(one, other, strict=True))
    return kept, peak
