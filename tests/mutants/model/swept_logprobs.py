"""Mistakes in `model/swept_logprobs.py`: {function: [(what went wrong, source, source with the mistake)]}."""

CHANGES = {
    "SweptLogprobs": [
        ("earlier sums not shrunk", "pull[tokens].mul_(shrink[:, None])", "pull[tokens]"),
        ("not divided by the total", "pull.div_(-softmax.total[:, None])", "pull.neg_()"),
        ("sign", "pull.div_(-softmax.total[:, None])", "pull.div_(softmax.total[:, None])"),
        ("target left out", ".add_(weight[targets])", ""),
        ("scale left out", ".mul_(shaping.scale / shaping.temperature)", ".div_(shaping.temperature)"),
        ("temperature left out", ".mul_(shaping.scale / shaping.temperature)", ".mul_(shaping.scale)"),
        ("loss's weights left out", "(pull * grad_logprobs[:, None])", "pull"),
        ("entropy has a gradient", "ctx.mark_non_differentiable(entropy)", "pass"),
        ("bias left out", "None if bias is None else bias[vocabulary]", "None"),
    ],
    "one_sweep_will_do": [
        (
            "trained heads too",
            "trained = head.weight.requires_grad or",
            "trained = False and head.weight.requires_grad or",
        ),
        ("trained bias too", "head.bias.requires_grad)", "False)"),
        ("entropy's gradient lost", " and not entropy_gradient", ""),
        ("caps too", "head.softcap is None and", "True and"),
        ("without a graph", "torch.is_grad_enabled() and", "True and"),
    ],
}
