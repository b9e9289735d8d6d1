"""Mistakes in `runtime/adam8bit.py`: {function: [(what went wrong, source, source with the mistake)]}."""

CHANGES = {
    "AdamW8bit": [
        ("betas swapped", "beta1, beta2 = group", "beta2, beta1 = group"),
        ("always the first step", 'int(state["step"]),', "1,"),
        ("no decay", 'group["weight_decay"],', "0.0,"),
        ("rate fixed", 'group["lr"],', "1e-3,"),
        (
            "code tables swapped",
            "self._signed,\n            self._unsigned,",
            "self._unsigned,\n            self._signed,",
        ),
        ("packed one size too late", "numel() < MIN", "numel() <= MIN"),
        ("all packed", "numel() < MIN_8BIT_SIZE", "numel() < 0"),
        ("transposed weights not written", "parameter.copy_(dense)", "pass"),
        ("not counted", 'state["step"] += 1', 'state["step"] += 1 if state["step"] < 1 else 0'),
    ],
}
