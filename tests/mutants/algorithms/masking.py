"""Mistakes in `algorithms/masking.py`: {function: [(what went wrong, source, source with the mistake)]}."""

STANDARDIZE = "    return centred * (masked_variance(x, mask) + VARIANCE_FLOOR).rsqrt()"

CHANGES = {
    "standardize": [
        ("mean added back", STANDARDIZE, STANDARDIZE + " + masked_mean(x, mask)"),
        ("not centred", STANDARDIZE, STANDARDIZE.replace("centred", "zero_outside(x, mask)")),
        ("not scaled", STANDARDIZE, "    return centred"),
        ("divided by the variance", STANDARDIZE, STANDARDIZE.replace("rsqrt", "reciprocal")),
        ("multiplied by the deviation", STANDARDIZE, STANDARDIZE.replace("rsqrt", "sqrt")),
        ("variance of all entries", STANDARDIZE, "    return centred * (x.var(correction=0) + VARIANCE_FLOOR).rsqrt()"),
        ("padding counted", STANDARDIZE, "    return centred * ((centred**2).mean() + VARIANCE_FLOOR).rsqrt()"),
        ("no floor", STANDARDIZE, STANDARDIZE.replace(" + VARIANCE_FLOOR", "")),
    ],
    "masked_sum and its relatives": [
        ("multiplied by the mask", "    return torch.where(mask, x, 0.0)", "    return x * mask"),
        ("mask inverted", "    return torch.where(mask, x, 0.0)", "    return torch.where(mask, 0.0, x)"),
        ("mean over all entries", "masked_sum(x, mask) / mask.sum()", "masked_sum(x, mask) / mask.numel()"),
        ("divisor n - 1", "masked_mean(centred**2, mask)", "masked_sum(centred**2, mask) / (mask.sum() - 1)"),
        ("last index off by one", "    return mask.sum(dim=1) - 1", "    return mask.sum(dim=1)"),
        ("last column", "mask.sum(dim=1) - 1", "torch.full_like(mask.sum(dim=1), mask.shape[1] - 1)"),
    ],
}
