"""Mistakes in `model/draw.py`: {function: [(what went wrong, source, source with the mistake)]}."""

NORMALISER = "log_normaliser = shares.log_total()"
TILE = "size = max(1, tile_bytes // (DRAW_BYTES * head.vocab_size))"

CHANGES = {
    "draw_in_tiles": [
        ("no tiles", TILE, "size = len(states)"),
        ("half a logit counted", TILE, TILE.replace("DRAW_BYTES", "2")),
        ("uniforms of the first tile", "shares.draw(uniforms[tile])", "shares.draw(uniforms[: len(logits)])"),
        ("states of the first tile", "head.logits(states[tile],", "head.logits(states[: len(states[tile])],"),
        ("forbidden ids allowed", "logits[:, forbidden] = held", "pass"),
        ("order of tiles", "tokens=torch.cat(tokens)", "tokens=torch.cat(tokens[::-1])"),
        ("temperature ignored", "logits /= config.temperature", "pass"),
        ("multiplied by the temperature", "logits /= config.temperature", "logits *= config.temperature"),
        ("log-probs of what is left", NORMALISER, "log_normaliser = Shares(restrict(logits, config)).log_total()"),
        ("logits as log-probs", "squeeze(1) - log_normaliser", "squeeze(1)"),
        ("not restricted", "shares = Shares(restrict(logits, config))", "shares = Shares(logits)"),
        ("only restricted where some are forbidden", "if len(forbidden) or restricts(config):", "if len(forbidden):"),
        ("drawn before any is forbidden", "if len(forbidden) or restricts(config):", "if restricts(config):"),
    ],
    "Shares.__init__": [
        ("upside down", "(logits - self.peak)", "(self.peak - logits)"),
        ("no exponential", ".exp_()", ".add_(50.0)"),
        ("the rest has no share", "rest.sum(dim=-1, keepdim=True)", "rest.new_zeros(len(rest), 1)"),
        ("half of the sums", "torch.cat(sums, dim=1).double()", "torch.cat(sums, dim=1).double() / 2"),
        ("blocks across", "whole.unflatten(1, (num, self.block))", "whole.unflatten(1, (self.block, num)).mT"),
    ],
    "Shares.log_total": [
        ("to the base of two", "self.sums.sum(dim=1).log()", "self.sums.sum(dim=1).log2()"),
        ("mean of the blocks", "self.sums.sum(dim=1).log()", "self.sums.mean(dim=1).log()"),
        ("the largest block alone", "self.sums.sum(dim=1).log()", "self.sums.amax(dim=1).log()"),
        ("relative to the peak", "self.peak.squeeze(1) + ", ""),
        ("not its logarithm", ".log()", ""),
    ],
    "Shares.draw": [
        ("uniforms taken as they are", "uniforms.double() * self.sums.sum(dim=1)", "uniforms.double()"),
        ("the first of a block", ".double(), left)", ".double(), left * 0.0)"),
        (
            "not the last token",
            "(block * self.block + place).clamp(max=last)",
            "(block * self.block + place).clamp(max=last - 1)",
        ),
        ("one token further", "block[:, None] * self.block +", "block[:, None] * self.block + 1 +"),
        ("place without its block", "(block * self.block + place)", "place"),
    ],
    "find": [
        ("one too early", "right=True)", "right=True).sub(1).clamp(min=0)"),
        ("on the left", "right=True", "right=False"),
        ("below zero", "at.clamp(min=0.0)", "at"),
        ("above all", "cumulative[:, -1] * (1.0 - torch.finfo(masses.dtype).eps)", "cumulative[:, -1]"),
        ("what lies behind", "cumulative.gather(1, index) - masses.gather(1, index)", "cumulative.gather(1, index)"),
    ],
}
