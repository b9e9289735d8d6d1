"""Mistakes in `algorithms/group_advantages.py`: {function: [(what went wrong, source, source with the mistake)]}."""

RLOO = "centred * sizes / (sizes - 1).clamp(min=1)"
GRPO = "centred * (variance + VARIANCE_FLOOR).rsqrt()"
VARIANCE = "variance = _sum_in_groups(centred**2, groups) / sizes.clamp(min=1)"
DR_GRPO = "    centred, _ = _centred(rewards, mask, groups)\n    return _at_every_token(centred, rewards, mask)"
MEANS = "means = _sum_in_groups(totals, groups) / sizes.clamp(min=1)"
CENTRED = "return zero_outside(totals - means, counted), sizes"
TOTALS = "totals = zero_outside(rewards, mask).double().sum(dim=1)"
FLAT = "is_flat = _sum_in_groups(centred**2, groups) <= sizes * VARIANCE_FLOOR"
OF_GROUP = "of_group = torch.where(mask.any(dim=1) & (sizes > 1), 1 / sizes, 0.0)"
REMAX = "returns_to_go(rewards, mask, discount=1.0) - baselines.unsqueeze(1)"
PLUS_PLUS = "standardize(returns_to_go(rewards, mask, discount=discount), mask)"
TO_GO = "gae(rewards, torch.zeros_like(rewards), mask, discount=discount, gae_lambda=1.0)[0]"
EVERY = "zero_outside(x.to(dtype).unsqueeze(1).expand(mask.shape), mask)"

CHANGES = {
    "rloo": [
        ("mean of all", RLOO, "centred"),
        ("ratio of sizes inverted", RLOO, "centred * (sizes - 1) / sizes.clamp(min=1)"),
        ("sum of all for the mean of the others", RLOO, "centred * sizes"),
        ("one too few", RLOO, RLOO.replace("sizes - 1", "sizes - 2")),
        ("sign", RLOO, "-" + RLOO),
        ("a lone response divides by zero", RLOO, RLOO.replace(".clamp(min=1)", "")),
        ("standardised", RLOO, RLOO + " / centred.std()"),
    ],
    "grpo": [
        ("no deviation", GRPO, "centred"),
        ("divided by the variance", GRPO, "centred / (variance + VARIANCE_FLOOR)"),
        ("multiplied by the deviation", GRPO, GRPO.replace("rsqrt", "sqrt")),
        ("no floor", GRPO, GRPO.replace(" + VARIANCE_FLOOR", "")),
        ("divisor n - 1", VARIANCE, VARIANCE.replace("sizes.clamp", "(sizes - 1).clamp")),
        ("deviation of the whole batch", VARIANCE, "variance = (centred**2).mean()"),
        ("absolute deviation", VARIANCE, VARIANCE.replace("centred**2", "centred.abs()")),
        ("float32", TOTALS, TOTALS.replace(".double()", "")),
    ],
    "dr_grpo": [
        (
            "rewards as they are",
            DR_GRPO,
            DR_GRPO.replace("_at_every_token(centred,", "_at_every_token(rewards.nansum(1),"),
        ),
        ("leave one out", DR_GRPO, DR_GRPO.replace("(centred, rewards", "(2 * centred, rewards")),
        ("sign", DR_GRPO, DR_GRPO.replace("(centred, rewards", "(-centred, rewards")),
        ("mean of the whole batch", MEANS, "means = totals.mean()"),
        (
            "mean with rows that are left out",
            MEANS,
            "means = _sum_in_groups(totals, groups) / _sum_in_groups(torch.ones_like(totals), groups)",
        ),
        ("sum for the mean", MEANS, "means = _sum_in_groups(totals, groups)"),
        ("rows that are left out are compared", CENTRED, "return totals - means, sizes"),
        ("mean token for the sum", TOTALS, TOTALS.replace("sum(dim=1)", "mean(dim=1)")),
        ("padding in the sum", TOTALS, "totals = rewards.double().sum(dim=1)"),
        ("groups by place", "[number]", "[: len(x)]"),
        ("padding gets advantages", EVERY, "x.to(dtype).unsqueeze(1).expand(mask.shape)"),
        (
            "at the first token only",
            EVERY,
            "zero_outside(torch.nn.functional.pad(x.to(dtype)[:, None], (0, mask.shape[1] - 1)), mask)",
        ),
    ],
    "flat_group_frac": [
        ("share of the responses", OF_GROUP, OF_GROUP.replace("1 / sizes", "1.0")),
        ("lone responses count", OF_GROUP, OF_GROUP.replace("sizes > 1", "sizes > 0")),
        ("rows without a token count", OF_GROUP, OF_GROUP.replace("mask.any(dim=1) & ", "")),
        ("the others", FLAT, FLAT.replace("<=", ">")),
        ("exactly equal", FLAT, FLAT.replace("sizes * VARIANCE_FLOOR", "0")),
        ("any deviation below one", FLAT, FLAT.replace("sizes * VARIANCE_FLOOR", "1.0")),
        (
            "of all prompts",
            "zero_outside(of_group, is_flat).sum() / of_group.sum()",
            "zero_outside(of_group, is_flat).sum()",
        ),
    ],
    "remax": [
        ("sign of the baseline", REMAX, REMAX.replace(" - ", " + ")),
        ("no baseline", REMAX, "returns_to_go(rewards, mask, discount=1.0)"),
        ("mean baseline", REMAX, REMAX.replace("baselines.unsqueeze(1)", "baselines.nanmean()")),
        ("rewards as they are", REMAX, "rewards - baselines.unsqueeze(1)"),
        (
            "the whole sum at every token",
            REMAX,
            "zero_outside(rewards, mask).sum(1, keepdim=True).expand(mask.shape) - baselines[:, None]",
        ),
        ("discounted", REMAX, REMAX.replace("1.0", "0.9")),
        ("padding gets advantages", f"zero_outside({REMAX}, mask)", REMAX),
    ],
    "reinforce_plus_plus": [
        ("not standardised", PLUS_PLUS, "returns_to_go(rewards, mask, discount=discount)"),
        ("discount ignored", PLUS_PLUS, PLUS_PLUS.replace("discount=discount", "discount=1.0")),
        ("padding in the mean", PLUS_PLUS, PLUS_PLUS.replace("), mask)", "), torch.ones_like(mask))")),
        ("rewards as they are", PLUS_PLUS, "standardize(rewards, mask)"),
        ("mean kept", PLUS_PLUS, PLUS_PLUS.replace("standardize(", "(lambda x, m: x / x[m].std(correction=0))(")),
        (
            "each row by itself",
            PLUS_PLUS,
            "torch.cat([standardize(returns_to_go(r, m, discount=discount), m)"
            " for r, m in zip(rewards.split(1), mask.split(1))])",
        ),
    ],
    "returns_to_go": [
        ("discount ignored", TO_GO, TO_GO.replace("discount=discount", "discount=1.0")),
        ("lambda below one", TO_GO, TO_GO.replace("gae_lambda=1.0", "gae_lambda=0.95")),
        ("only the next reward", TO_GO, TO_GO.replace("gae_lambda=1.0", "gae_lambda=0.0")),
        ("rewards as values", TO_GO, TO_GO.replace("torch.zeros_like(rewards)", "rewards")),
        ("a critic that says one", TO_GO, TO_GO.replace("zeros_like", "ones_like")),
        ("padding is to come", TO_GO, TO_GO.replace(", mask,", ", torch.ones_like(mask),")),
    ],
}
