"""Mistakes in `model/cache.py`: {function: [(what went wrong, source, source with the mistake)]}."""

WRITE = "self._key_store[..., start : self._num_filled, :] = key_states"
MOVE = "filled[: len(rows)] = filled[rows]"

CHANGES = {
    "PreallocatedLayer": [
        ("first columns overwritten", WRITE, WRITE.replace("start : self._num_filled", ": key_states.shape[-2]")),
        ("values not written", "self._value_store[..., start : self._num_filled, :] = value_states", "pass"),
        (
            "columns that are not filled",
            "self.keys = self._key_store[..., : self._num_filled, :]",
            "self.keys = self._key_store",
        ),
        ("values for keys", "self.keys = self._key_store[", "self.keys = self._value_store["),
        ("first rows kept", MOVE, "pass"),
        (
            "last column left behind",
            "filled = store[..., : self._num_filled, :]",
            "filled = store[..., : self._num_filled - 1, :]",
        ),
        ("rows that left stay", "        return store[: len(rows)]", "        return store"),
        (
            "new storage for fewer rows",
            "        return store[: len(rows)]",
            "        return store[: len(rows)].clone()",
        ),
        (
            "too many columns",
            "self._num_columns, key_states.shape[-1]))",
            "2 * self._num_columns, key_states.shape[-1]))",
        ),
        (
            "bytes of the filled part",
            "store.untyped_storage().nbytes() for",
            "store[..., : self._num_filled, :].numel() * 4 for",
        ),
        (
            "empty layers asked",
            "        if self.is_initialized:\n            self._key_store = ",
            "        assert self.is_initialized\n        if True:\n            self._key_store = ",
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
