"""Mistakes in `model/cache.py`: {function: [(what went wrong, source, source with the mistake)]}."""

WRITE = "self._key_store[..., start : self.stop, :] = key_states"
MOVE = "used[: len(rows)] = used[rows]"
IN_USE = "self.keys = self._key_store[..., self._columns.start : self.stop, :]"
JOIN = "self._key_store[joining.rows, ..., columns, :] = key_states[joining.sources]"
LEFT = "columns = slice(joining.stop - key_states.shape[-2], joining.stop)"
SHIFT = "store[..., moved, :] = store[..., used, :].clone()"

CHANGES = {
    "PreallocatedLayer": [
        ("first columns overwritten", WRITE, WRITE.replace("start : self.stop", ": key_states.shape[-2]")),
        ("values not written", "self._value_store[..., start : self.stop, :] = value_states", "pass"),
        ("columns that are not filled", IN_USE, "self.keys = self._key_store"),
        ("columns that nobody needs", IN_USE, "self.keys = self._key_store[..., : self.stop, :]"),
        ("values for keys", "self.keys = self._key_store[", "self.keys = self._value_store["),
        ("first rows kept", MOVE, "pass"),
        (
            "last column left behind",
            "used = store[..., self._columns.start : self.stop, :]",
            "used = store[..., self._columns.start : self.stop - 1, :]",
        ),
        ("rows that left stay", "        return store[: len(rows)]", "        return store"),
        (
            "new storage for fewer rows",
            "        return store[: len(rows)]",
            "        return store[: len(rows)].clone()",
        ),
        (
            "too many columns",
            "self._columns.num_columns, states.shape[-1])",
            "2 * self._columns.num_columns, states.shape[-1])",
        ),
        (
            "bytes of the filled part",
            "store.untyped_storage().nbytes() for",
            "store[..., : self.stop, :].numel() * 4 for",
        ),
        (
            "empty layers asked",
            "        if self.is_initialized:\n            self._key_store = ",
            "        assert self.is_initialized\n        if True:\n            self._key_store = ",
        ),
    ],
    "joining": [
        ("prompts at the left end", LEFT, "columns = slice(0, key_states.shape[-2])"),
        ("other rows", JOIN, JOIN.replace("joining.rows", "joining.sources")),
        ("prompts not shared", JOIN, JOIN.replace("joining.sources]", "0 * joining.sources]")),
        (
            "all columns seen by those who join",
            "            return key_states, value_states\n",
            "            return self._set_views()\n",
        ),
        ("other rows' columns counted", "0 if self._columns.joining is not None or not", "0 if not"),
        ("what is masked is whatever lay in memory", "states.new_zeros((num_rows", "1.0 + states.new_zeros((num_rows"),
    ],
    "shift_left": [
        ("columns not moved", SHIFT, "pass"),
        ("end not moved", "        self.stop -= num_columns\n", ""),
        ("start not moved", "        self.columns.start -= num_columns\n", ""),
        (
            "to the left end",
            "slice(used.start - num_columns, used.stop - num_columns)",
            "slice(0, used.stop - used.start)",
        ),
        (
            "values stay",
            "for store in (self._key_store, self._value_store):\n                store[..., moved",
            "for store in (self._key_store,):\n                store[..., moved",
        ),
    ],
    "cache_bytes": [
        ("keys alone", "return 2 * num_layers", "return num_layers"),
        ("one layer", "return 2 * num_layers * ", "return 2 * "),
        ("one row", "num_rows * num_kv_heads", "num_kv_heads"),
        ("heads left out", "num_rows * num_kv_heads", "num_rows"),
        ("four bytes", "head_dim * itemsize", "head_dim * 4"),
    ],
}
