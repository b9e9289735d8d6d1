"""Mistakes in `model/stream.py`: {function: [(what went wrong, source, source with the mistake)]}."""

NEXT = "        tokens = drawn[:, None]"
MASK = "        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)"

CHANGES = {
    "stream_tokens": [
        ("every token from the first number", "uniforms[t : t + 1]", "uniforms[:1]"),
        ("goes on after a stop", "        if token.is_stop:\n            return\n", ""),
        (
            "stop left out",
            "        yield token\n        if token.is_stop:\n            return\n",
            "        if token.is_stop:\n            return\n        yield token\n",
        ),
        ("stops may come early", "t + 1 < config.min_response_tokens", "t + 1 < 0"),
        ("stops come one late", "t + 1 < config.min_response_tokens", "t < config.min_response_tokens"),
        ("prompt read again", NEXT, "        pass"),
        ("new token hidden", MASK, MASK.replace("ones_like", "zeros_like")),
        (
            "LoRA off",
            "states = trunk.hidden_states(tokens, attention, adapter=adapter,",
            "states = trunk.hidden_states(tokens, attention, adapter=None,",
        ),
    ],
}
