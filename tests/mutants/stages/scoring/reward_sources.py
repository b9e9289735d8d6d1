"""Mistakes in `stages/scoring/reward_sources.py`: {function: [(what went wrong, source, source with the mistake)]}."""

FILLED = "filled = torch.where(own.isfinite(), own, config.failure_value)"
WEIGHED = "scores = scores + config.weight * (filled / scale)"
WEIGHED_DENSE = "dense = dense + config.weight * (own_dense / scale)"
ALLOWED = 'max_failed = 0 if config.on_failure == "raise" else math.floor(max_failed_frac * len(mask))'

CHANGES = {
    "RewardSources.add_to": [
        ("weight ignored", WEIGHED, WEIGHED.replace("config.weight * ", "")),
        ("scale ignored", WEIGHED, WEIGHED.replace("(filled / scale)", "filled")),
        ("multiplied by the scale", WEIGHED, WEIGHED.replace("/ scale", "* scale")),
        ("head left out", WEIGHED, WEIGHED.replace("scores + ", "")),
        ("weight of token rewards ignored", WEIGHED_DENSE, WEIGHED_DENSE.replace("config.weight * ", "")),
        ("scale of token rewards ignored", WEIGHED_DENSE, WEIGHED_DENSE.replace(" / scale", "")),
        ("token rewards of the last source", WEIGHED_DENSE, WEIGHED_DENSE.replace("dense + ", "")),
        ("a failure is 0", FILLED, FILLED.replace("config.failure_value", "0.0")),
        ("nothing is masked", "valid &= own.isfinite()", "pass"),
        (
            "everything that fails is masked",
            'if config.on_failure == "mask":\n                valid',
            "if True:\n                valid",
        ),
        ("only the last source masks", "valid &= own.isfinite()", "valid = own.isfinite()"),
        ("a masked row keeps its score", "scores=torch.where(valid, scores, math.nan)", "scores=scores"),
        ("a masked row keeps its token rewards", "torch.where(valid[:, None], dense, 0.0)", "dense"),
        (
            "scores of a source after weight",
            "source_scores[config.name] = own",
            "source_scores[config.name] = config.weight * own",
        ),
        ("a raising source asks on", ALLOWED, ALLOWED.replace('0 if config.on_failure == "raise" else ', "")),
        ("other sources stop at the first", ALLOWED, "max_failed = 0"),
    ],
    "RewardSources.scale_of": [
        ("always", "        if not config.normalize:\n            return 1.0\n", ""),
        ("never", "if not config.normalize:", "if True:"),
        (
            "of this batch",
            "(seen if seen.count else update_moments(seen, own)).scale",
            "update_moments(Moments(), own).scale",
        ),
        (
            "of this batch too",
            "(seen if seen.count else update_moments(seen, own)).scale",
            "update_moments(seen, own).scale",
        ),
        ("1 in the first step", "(seen if seen.count else update_moments(seen, own)).scale", "seen.scale"),
        (
            "variance",
            "(seen if seen.count else update_moments(seen, own)).scale",
            "(seen if seen.count else update_moments(seen, own)).variance",
        ),
    ],
    "refuse_failures": [
        (
            "raises at the threshold",
            "if len(failed) > max_failed_frac * len(outcomes):",
            "if len(failed) >= max_failed_frac * len(outcomes):",
        ),
        ("no threshold", "if len(failed) > max_failed_frac * len(outcomes):", "if False:"),
        (
            "each source by itself",
            "if len(failed) > max_failed_frac * len(outcomes):",
            "if len(list(failures(outcomes))) > max_failed_frac * len(outcomes):",
        ),
        (
            "counts, not shares",
            "max_failed_frac * len(outcomes):\n        raise",
            "10 * max_failed_frac:\n        raise",
        ),
        ("nothing raises", 'if config.on_failure == "raise":\n        raise', "if False:\n        raise"),
    ],
    "next_moments and source_metrics": [
        (
            "moments of all sources",
            "for source in reward.sources if source.normalize]",
            "for source in reward.sources]",
        ),
        (
            "moments of this step",
            "update_moments(moments.get(name, Moments()), source_scores[name])",
            "update_moments(Moments(), source_scores[name])",
        ),
        ("failures in the mean", "given = scores[~scores.isnan()]", "given = scores.nan_to_num()"),
        ("divisor n - 1", "given.std(correction=0)", "given.std(correction=1)"),
        ("successes counted", "float(len(scores) - len(given))", "float(len(given))"),
    ],
}
