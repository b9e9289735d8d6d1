"""Small mistakes that the unit tests must notice: each mutant is one change of one place in the source.

`tests/unit/test_mutants.py` applies them one at a time. Every public loss, KL, reward and advantage function, and
`standardize`, has at least five.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong line. `old` occurs exactly once in the source of `hydra_rlhf.algorithms.<module>`."""

    module: str
    """Module inside `hydra_rlhf.algorithms`; its tests are `test_<module>.py`."""
    function: str
    """The function that the change breaks."""
    mistake: str
    """What went wrong, in words."""
    old: str
    """The source as it is."""
    new: str
    """The source with the mistake."""


Changes = dict[str, list[tuple[str, str, str]]]
"""The changes of one module: function -> (mistake, old, new)."""

STANDARDIZE = "    return centred * (masked_variance(x, mask) + VARIANCE_FLOOR).rsqrt()"

MASKING: Changes = {
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

K3 = "            return torch.expm1(-log_ratio) + log_ratio"
ERROR = "min(max(measured_kl / target - 1, -MAX_CONTROLLER_ERROR), MAX_CONTROLLER_ERROR)"
NEXT = "    return kl_coef * (1 + error * num_sequences / horizon)"

KL: Changes = {
    "kl_estimate": [
        ("sign", "log_ratio = logprobs - ref_logprobs", "log_ratio = ref_logprobs - logprobs"),
        ("k1 without sign", "            return log_ratio\n", "            return log_ratio.abs()\n"),
        ("k2 without the half", "0.5 * log_ratio**2", "log_ratio**2"),
        ("k2 as absolute value", "0.5 * log_ratio**2", "0.5 * log_ratio.abs()"),
        ("k3 with the ratio inverted", K3, "            return torch.expm1(log_ratio) - log_ratio"),
        ("k3 without the -1", K3, K3.replace("expm1", "exp")),
        ("k3 with the wrong sign of the log-ratio", K3, K3.replace("+ log_ratio", "- log_ratio")),
        ("k3 that loses digits", K3, "            return torch.exp(-log_ratio) - 1 + log_ratio"),
    ],
    "next_kl_coef": [
        ("clip removed", ERROR, "measured_kl / target - 1"),
        ("clipped above only", ERROR, "min(measured_kl / target - 1, MAX_CONTROLLER_ERROR)"),
        ("clipped below only", ERROR, "max(measured_kl / target - 1, -MAX_CONTROLLER_ERROR)"),
        ("absolute error", ERROR, ERROR.replace("measured_kl / target - 1", "measured_kl - target")),
        ("ratio inverted", ERROR, ERROR.replace("measured_kl / target - 1", "target / max(measured_kl, 1e-9) - 1")),
        ("sign", NEXT, NEXT.replace("1 +", "1 -")),
        ("added, not multiplied", NEXT, "    return kl_coef + error * num_sequences / horizon"),
        ("number of sequences ignored", NEXT, NEXT.replace("error * num_sequences", "error")),
        ("NaN passes", "    if math.isnan(measured_kl):", "    if False:"),
    ],
}

LAST = "    is_last = columns == last_true_index(mask).unsqueeze(1)"
PLACE = "    return torch.where(is_last, scores.unsqueeze(1), 0.0)"
REMAINDER = "place_at_last_token(scores - dense.sum(dim=1), mask)"
REWARD = "    return zero_outside(remainder + dense - kl_coef * kl, mask)"
PENALTY = "    return torch.where(ended, shaped, shaped - missing_eos_penalty)"
MEAN = "        mean=moments.mean + delta * new.numel() / count,"
CROSS = " + delta**2 * moments.count * new.numel() / count"

REWARDS: Changes = {
    "place_at_last_token": [
        ("one too late", LAST, LAST.replace("last_true_index(mask)", "(last_true_index(mask) + 1)")),
        ("one too early", LAST, LAST.replace("last_true_index(mask)", "(last_true_index(mask) - 1)")),
        ("at every token up to the last", LAST, LAST.replace("==", "<=")),
        ("at every token from the last", LAST, LAST.replace("==", ">=")),
        ("at the last column", LAST, "    is_last = (columns == mask.shape[1] - 1).expand_as(mask)"),
        ("sign", PLACE, PLACE.replace("scores", "-scores")),
        ("not zero elsewhere", PLACE, PLACE.replace("0.0", "1.0")),
    ],
    "token_rewards": [
        ("sign of KL", REWARD, REWARD.replace("- kl_coef", "+ kl_coef")),
        ("KL coefficient ignored", REWARD, REWARD.replace("kl_coef * kl", "kl")),
        ("KL left out", REWARD, REWARD.replace(" - kl_coef * kl", "")),
        ("dense rewards left out", REWARD, REWARD.replace(" + dense", "")),
        ("dense rewards counted twice", REMAINDER, "place_at_last_token(scores, mask)"),
        ("dense rewards of the whole batch", REMAINDER, REMAINDER.replace("dense.sum(dim=1)", "dense.sum()")),
        ("mask ignored", REWARD, "    return remainder + dense - kl_coef * kl"),
        ("padding in the dense sum", "dense = zero_outside(dense_rewards, mask)", "dense = dense_rewards"),
        ("score left out", REWARD, REWARD.replace("remainder + dense", "dense")),
    ],
    "shape_scores": [
        ("clip removed", "shaped = shaped.clamp(-clip, clip)", "pass"),
        ("clipped above only", "shaped.clamp(-clip, clip)", "shaped.clamp(max=clip)"),
        ("clipped at zero", "shaped.clamp(-clip, clip)", "shaped.clamp(0, clip)"),
        ("multiplied by the scale", "shaped = scores / scale", "shaped = scores * scale"),
        ("scale ignored", "shaped = scores / scale", "shaped = scores"),
        ("sign of the penalty", PENALTY, PENALTY.replace("- missing", "+ missing")),
        ("penalty for ending", PENALTY, "    return torch.where(ended, shaped - missing_eos_penalty, shaped)"),
        ("penalty for everyone", PENALTY, "    return shaped - missing_eos_penalty"),
        ("penalty replaces the score", PENALTY, PENALTY.replace("shaped - missing", "-missing")),
    ],
    "update_moments": [
        ("spread between batches left out", CROSS, ""),
        ("sign of that spread", CROSS, CROSS.replace(" + ", " - ")),
        ("delta not squared", CROSS, CROSS.replace("delta**2", "delta")),
        ("mean of the new values only", MEAN, "        mean=new_mean.item(),"),
        ("means averaged without counts", MEAN, MEAN.replace("new.numel() / count", "0.5")),
        ("old spread forgotten", "m2=moments.m2 + ", "m2="),
        ("spread around zero", "((new - new_mean) ** 2)", "(new**2)"),
        ("count of batches", "count = moments.count + new.numel()", "count = moments.count + 1"),
        ("float32", "values.detach().double()", "values.detach().float()"),
        ("values that are not finite kept", "    new = new[new.isfinite()]", "    new = new[:]"),
        ("divisor n - 1", "return self.m2 / self.count if", "return self.m2 / (self.count - 1) if"),
        ("no root", "deviation = math.sqrt(self.variance)", "deviation = self.variance"),
        ("rounding errors as a scale", "deviation > 1e-8 * abs(self.mean)", "deviation > 0"),
    ],
}

DELTA = "        delta = rewards[:, t] + discount * next_value - values[:, t]"
RESIDUAL = "masked_variance(returns - values, mask)"
ADVANTAGE = "        next_advantage = delta + discount * gae_lambda * next_advantage"

ADVANTAGES: Changes = {
    "gae": [
        ("lambda dropped", ADVANTAGE, ADVANTAGE.replace("discount * gae_lambda", "discount")),
        ("discount dropped from the sum", ADVANTAGE, ADVANTAGE.replace("discount * gae_lambda", "gae_lambda")),
        ("discount dropped from the value", DELTA, DELTA.replace("discount * next_value", "next_value")),
        ("no bootstrapping", DELTA, DELTA.replace(" + discount * next_value", "")),
        ("baseline left out", DELTA, DELTA.replace(" - values[:, t]", "")),
        ("sign of the next value", DELTA, DELTA.replace("+ discount", "- discount")),
        ("forwards in time", "for t in reversed(range(values.shape[1])):", "for t in range(values.shape[1]):"),
        ("off by one", "reversed(range(values.shape[1]))", "reversed(range(values.shape[1] - 1))"),
        ("first token left out", "reversed(range(values.shape[1]))", "reversed(range(1, values.shape[1]))"),
        ("padding in the values", "values = zero_outside(values.to(dtype), mask)", "values = values.to(dtype)"),
        ("padding in the rewards", "rewards = zero_outside(rewards.to(dtype), mask)", "rewards = rewards.to(dtype)"),
        ("next value never set", "        next_value = values[:, t]\n", ""),
        ("returns without values", "return advantages, advantages + values", "return advantages, advantages"),
        ("returns are rewards + values", "return advantages, advantages +", "return advantages, rewards +"),
    ],
    "explained_variance": [
        ("ratio inverted", RESIDUAL + " / variance", "variance / " + RESIDUAL),
        ("not subtracted from one", "explained = 1 - masked", "explained = masked"),
        ("variance of the values", RESIDUAL, "masked_variance(values, mask)"),
        ("values added", "returns - values, mask", "returns + values, mask"),
        ("divided by that of the values", "masked_variance(returns, mask)", "masked_variance(values, mask)"),
        ("mask ignored", RESIDUAL, "(returns - values).var(correction=0)"),
        ("zero variance explained", "torch.where(variance > 0, explained, math.nan)", "explained"),
    ],
}

SURROGATE = "    loss = masked_sum(torch.maximum(unclipped, clipped), mask) / num_tokens"
CLAMP = "-advantages * ratio.clamp(1 - clip_range, 1 + clip_range)"
UPDATE_KL = "masked_sum(torch.expm1(log_ratio) - log_ratio, mask) / num_tokens"
VALUE = "    loss = 0.5 * masked_sum(torch.maximum(error, held_error), mask) / num_tokens"
HELD = "old_values + change.clamp(-clip_range, clip_range)"
ENTROPY = "LossOutput(loss=-masked_sum(entropy, mask) / num_tokens, metrics={})"
KL_LOSS = "LossOutput(loss=masked_sum(estimate, mask) / num_tokens, metrics={})"
NEW = "zero_outside(new_logprobs, mask)"
SFT = "LossOutput(loss=-masked_sum(logprobs, mask) / num_tokens, metrics={})"
RANKING = "-F.logsigmoid(margins).sum() / num_pairs"
ACCURACY = "((margins > 0).sum() + 0.5 * (margins == 0).sum()) / num_pairs"

LOSSES: Changes = {
    "ppo_policy_loss": [
        ("clip removed", SURROGATE, SURROGATE.replace("torch.maximum(unclipped, clipped)", "unclipped")),
        ("only the clipped one", SURROGATE, SURROGATE.replace("torch.maximum(unclipped, clipped)", "clipped")),
        ("max to min", SURROGATE, SURROGATE.replace("maximum", "minimum")),
        ("mask ignored", SURROGATE, SURROGATE.replace("masked_sum(", "(").replace(", mask)", ").sum()")),
        ("local count", SURROGATE, SURROGATE.replace("num_tokens", "mask.sum()")),
        ("ratio inverted", "zero_outside(new_logprobs - old_logprobs,", "zero_outside(old_logprobs - new_logprobs,"),
        ("overflow in padding", "zero_outside(new_logprobs - old_logprobs, mask)", "new_logprobs - old_logprobs"),
        ("sign of the advantage", "unclipped = -advantages * ratio", "unclipped = advantages * ratio"),
        ("sign where clipped", CLAMP, CLAMP[1:]),
        ("clipped above only", CLAMP, CLAMP.replace("1 - clip_range, ", "max=")),
        ("clipped below only", CLAMP, CLAMP.replace(", 1 + clip_range", "")),
        ("clip range doubled", CLAMP, CLAMP.replace("clip_range", "2 * clip_range")),
        ("clip fraction of the other side", "(clipped > unclipped) & mask", "(clipped < unclipped) & mask"),
        ("clip fraction with ties", "(clipped > unclipped) & mask", "(clipped >= unclipped) & mask"),
        ("clip fraction of padding", "((clipped > unclipped) & mask)", "((clipped != unclipped) | ~mask)"),
        ("largest ratio of padding", "torch.where(mask, ratio, -math.inf).max()", "ratio.max()"),
        ("smallest ratio from zero", "torch.where(mask, ratio, math.inf).min()", "zero_outside(ratio, mask).min()"),
        ("KL(new || old)", UPDATE_KL, UPDATE_KL.replace("expm1(log_ratio) - log", "expm1(-log_ratio) + log")),
        ("k1 for k3", UPDATE_KL, UPDATE_KL.replace("torch.expm1(log_ratio) - log_ratio", "-log_ratio")),
        ("local count in KL", UPDATE_KL, UPDATE_KL.replace("num_tokens", "mask.sum()")),
        (
            "metrics keep the graph",
            'with torch.no_grad():\n        metrics = {\n            "ppo',
            'if 1:\n        metrics = {\n            "ppo',
        ),
    ],
    "ppo_value_loss": [
        ("clip removed", VALUE, VALUE.replace("torch.maximum(error, held_error)", "error")),
        ("only the held one", VALUE, VALUE.replace("torch.maximum(error, held_error)", "held_error")),
        ("max to min", VALUE, VALUE.replace("maximum", "minimum")),
        ("half left out", VALUE, VALUE.replace("0.5 * ", "")),
        ("mask ignored", VALUE, VALUE.replace("masked_sum(", "(").replace(", mask)", ").sum()")),
        ("local count", VALUE, VALUE.replace("num_tokens", "mask.sum()")),
        ("overflow in padding", "values = zero_outside(new_values, mask)", "values = new_values"),
        ("held around zero", HELD, "change.clamp(-clip_range, clip_range)"),
        ("held above only", HELD, HELD.replace("-clip_range, ", "max=")),
        ("held around the return", HELD, HELD.replace("old_values", "returns")),
        ("error not squared", "error = (values - returns) ** 2", "error = (values - returns).abs()"),
        ("rounding counted as clipping", "torch.where(change.abs() > clip_range, " + HELD + ", values)", HELD),
        ("clip fraction of the other side", "(held_error > error) & mask", "(held_error < error) & mask"),
        ("clip fraction of padding", "((held_error > error) & mask)", "(~(held_error <= error))"),
    ],
    "entropy_bonus": [
        ("sign", ENTROPY, ENTROPY.replace("=-", "=")),
        ("mask ignored", ENTROPY, ENTROPY.replace("masked_sum(entropy, mask)", "entropy.sum()")),
        ("multiplied by the mask", ENTROPY, ENTROPY.replace("masked_sum(entropy, mask)", "(entropy * mask).sum()")),
        ("mask inverted", ENTROPY, ENTROPY.replace("entropy, mask", "entropy, ~mask")),
        ("local count", ENTROPY, ENTROPY.replace("num_tokens", "mask.sum()")),
        ("sum, not mean", ENTROPY, ENTROPY.replace(" / num_tokens", "")),
    ],
    "kl_loss": [
        ("sign", KL_LOSS, KL_LOSS.replace("loss=", "loss=-")),
        ("roles swapped", NEW + ", ref_logprobs,", "ref_logprobs, " + NEW + ","),
        ("overflow in padding", NEW, "new_logprobs"),
        ("estimator ignored", "ref_logprobs, estimator)", 'ref_logprobs, "k2")'),
        ("mask ignored", KL_LOSS, KL_LOSS.replace("masked_sum(estimate, mask)", "estimate.sum()")),
        ("local count", KL_LOSS, KL_LOSS.replace("num_tokens", "mask.sum()")),
        ("sum, not mean", KL_LOSS, KL_LOSS.replace(" / num_tokens", "")),
    ],
    "sft_loss": [
        ("sign", SFT, SFT.replace("=-", "=")),
        ("mask ignored", SFT, SFT.replace("masked_sum(logprobs, mask)", "logprobs.sum()")),
        ("multiplied by the mask", SFT, SFT.replace("masked_sum(logprobs, mask)", "(logprobs * mask).sum()")),
        ("local count", SFT, SFT.replace("num_tokens", "mask.sum()")),
        ("sum, not mean", SFT, SFT.replace(" / num_tokens", "")),
        ("mean per sequence", SFT, SFT.replace("num_tokens", "mask.shape[0]")),
    ],
    "ranking_loss": [
        ("sides swapped", "margins = chosen_scores - rejected_scores", "margins = rejected_scores - chosen_scores"),
        ("rejected ignored", "margins = chosen_scores - rejected_scores", "margins = chosen_scores"),
        ("sign", RANKING, RANKING[1:]),
        ("no logarithm", RANKING, RANKING.replace("logsigmoid", "sigmoid")),
        ("unstable logarithm", RANKING, RANKING.replace("F.logsigmoid(margins)", "margins.sigmoid().log()")),
        ("hinge", RANKING, "(1 - margins).clamp(min=0).sum() / num_pairs"),
        ("local count", RANKING, "-F.logsigmoid(margins).mean()"),
        ("ties wrong", ACCURACY, "(margins > 0).sum() / num_pairs"),
        ("ties right", ACCURACY, "(margins >= 0).sum() / num_pairs"),
        ("local count in accuracy", ACCURACY, ACCURACY.replace("num_pairs", "margins.numel()")),
        ("local count in margin", "margins.sum() / num_pairs,", "margins.mean(),"),
        ("size of the margin", "margins.sum() / num_pairs,", "margins.abs().sum() / num_pairs,"),
    ],
}

TABLES = {"masking": MASKING, "kl": KL, "rewards": REWARDS, "advantages": ADVANTAGES, "losses": LOSSES}
MUTANTS = [
    Mutant(module, function, *change)
    for module, table in TABLES.items()
    for function, changes in table.items()
    for change in changes
]
