"""Mistakes in `model/tiled_logprobs.py`: {function: [(what went wrong, source, source with the mistake)]}."""

SHIFTED = """targets[tokens] - vocabulary.start,
                    softmax.rows(tokens),
                    shaping,
                    weight.dtype,
                )"""
SUMMED = "total.add_(product(a, b))"

CHANGES = {
    "tile_shape and spans": [
        ("bytes of half precision", "tile_bytes // 4)", "tile_bytes // 2)"),
        ("tiles a quarter as large", "tile_bytes // 4)", "tile_bytes // 16)"),
        ("last tile uneven", "math.ceil(num_tokens / num_tiles)", "min(num_tokens, entries // columns)"),
        ("wide tiles", "math.isqrt(TILE_ASPECT * entries)", "entries"),
        ("columns not used up", "columns = min(vocab_size, entries // rows)", "pass"),
        ("width not a multiple", "columns -= columns % COLUMN_MULTIPLE", "pass"),
        ("last columns left out", "min(start + step, length)) for", "start + step) for"),
    ],
    "product": [
        ("rounded to the head's dtype", "torch.mm(a.to(wide), b.to(wide))", "torch.mm(a.to(b.dtype), b).to(wide)"),
        ("summed in the head's dtype", SUMMED, "total.copy_((total.to(b.dtype) + product(a, b).to(b.dtype)))"),
        ("overwritten", SUMMED, "total.copy_(product(a, b))"),
        ("float32 overwritten", "total.addmm_(a, b)", "total.addmm_(a, b, beta=0)"),
        ("float64 lost", "wide = torch.promote_types(b.dtype, torch.float32)", "wide = torch.float32"),
    ],
    "TiledLogprobs.forward": [
        ("cap left out", "softcap=head.softcap", "softcap=None"),
        ("scale left out", "scale=head.scale", "scale=1.0"),
        ("bias left out", "return tile if bias is None else tile.add_(bias)", "return tile"),
        ("entropy always has a graph", "        if not entropy_gradient:\n", "        if False:\n"),
        ("targets counted from each tile's first", SHIFTED, SHIFTED.replace(" - vocabulary.start", "")),
        ("gradient through the entropy alone", "grad_logprobs[tokens],", "0 * grad_logprobs[tokens],"),
    ],
    "TiledLogprobs.backward": [
        ("entropy's gradient lost", "grad_entropy[tokens] if entropy_gradient else None", "None"),
        ("sign of the states' gradient", "into_states, gradient, weight", "into_states, -gradient, weight"),
        ("sign of the head's gradient", "into_weight, gradient.T, states", "into_weight, -gradient.T, states"),
        ("head's gradient not written", "grad_weight[vocabulary] = into_weight", "pass"),
        ("frozen head has a gradient", "torch.zeros_like(weight) if wants_weight", "torch.zeros_like(weight) if True"),
        ("head never has a gradient", "torch.zeros_like(weight) if wants_weight", "torch.zeros_like(weight) if False"),
        ("bias of the first token alone", "gradient.sum(dim=0)", "gradient[0]"),
        ("a whole float32 head", "torch.zeros_like(weight) if", "torch.zeros_like(weight.to(wide)) if"),
    ],
}
