"""Mistakes in `model/stream.py`: {function: [(what went wrong, source, source with the mistake)]}."""

NEXT = "        tokens = drawn.tokens[:, None]"
MASK = "        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)"
GIVEN = "        yield DrawnToken(ids[-1], float(drawn.logprobs), is_stop)\n"
RETURN = "        if is_stop:\n            return\n"

CHANGES = {
    "stream_tokens": [
        ("every token from the first number", "uniforms[t : t + 1]", "uniforms[:1]"),
        ("goes on after a stop", RETURN, ""),
        (
            "stop left out",
            GIVEN + RETURN,
            RETURN + GIVEN,
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
        ("strings do not stop", "ids[-1] in stop_ids or bool(found)", "ids[-1] in stop_ids"),
        ("stop tokens do not stop", "ids[-1] in stop_ids or bool(found)", "bool(found)"),
        ("strings may come early", "first_end(ids, t, least=config.min_response_tokens)", "first_end(ids, t)"),
    ],
}
