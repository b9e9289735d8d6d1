"""Mistakes in `model/draw.py`: {function: [(what went wrong, source, source with the mistake)]}."""

NORMALISER = "log_normaliser = logits.logsumexp(dim=-1)"
TILE = "size = max(1, tile_bytes // (DRAW_BYTES * head.vocab_size))"

CHANGES = {
    "draw_in_tiles": [
        ("no tiles", TILE, "size = len(states)"),
        ("float32 counted", TILE, TILE.replace("DRAW_BYTES", "4")),
        (
            "uniforms of the first tile",
            "draw(logits, uniforms[tile], config)",
            "draw(logits, uniforms[: len(logits)], config)",
        ),
        (
            "states of the first tile",
            "head.logits(states[tile])",
            "head.logits(states[: len(states[tile])])",
        ),
        ("forbidden ids allowed", "logits[:, forbidden] = held", "pass"),
        ("order of tiles", "tokens=torch.cat(tokens)", "tokens=torch.cat(tokens[::-1])"),
        ("temperature ignored", "logits /= config.temperature", "pass"),
        ("multiplied by the temperature", "logits /= config.temperature", "logits *= config.temperature"),
        ("log-probs of what is left", NORMALISER, f"logits[:, forbidden] = -torch.inf\n        {NORMALISER}"),
        ("logits as log-probs", "squeeze(1) - log_normaliser", "squeeze(1)"),
    ],
    "draw": [
        ("upside down", "(kept - kept.amax(dim=-1, keepdim=True))", "(kept.amin(dim=-1, keepdim=True) - kept)"),
        ("no exponential", ".exp_()", ".add_(50.0)"),
        ("one too early", "right=True).squeeze(1)", "right=True).squeeze(1).sub(1).clamp(min=0)"),
        ("not restricted", "kept = restrict(logits, config)", "kept = logits"),
        ("uniforms taken as they are", "uniforms.double()[:, None] * cumulative[:, -1:]", "uniforms.double()[:, None]"),
    ],
}
