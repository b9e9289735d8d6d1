"""Small mistakes that the unit tests must notice: each mutant is one change of one place in the source.

`tests/unit/test_mutants.py` applies them one at a time. Every public loss, KL, reward and advantage function, and
`standardize`, has at least five.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong line. `old` occurs exactly once in the source of `hydra_rlhf.<package>.<module>`."""

    module: str
    """Module inside `algorithms`, or inside the package that `PACKAGES` names; its tests are `test_<module>.py`."""
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

SCALE = "scale = (weight.abs().amax(dim=1) / INT8_MAX)"

QUANTIZED: Changes = {
    "pack_int8": [
        ("one scale for all rows", SCALE, SCALE.replace("amax(dim=1)", "amax().expand(len(weight))")),
        ("scale of the columns", SCALE, SCALE.replace("amax(dim=1)", "amax(dim=0).amax().expand(len(weight))")),
        ("signs of the largest", SCALE, SCALE.replace("weight.abs()", "weight")),
        ("cut off, not rounded", ".round_()", ".trunc_()"),
        ("one code too many", "INT8_MAX = 127", "INT8_MAX = 128"),
        ("half the codes", "INT8_MAX = 127", "INT8_MAX = 63"),
        ("scale in float32", ").to(weight.dtype)\n", ").float()\n"),
    ],
    "pack_nf4": [
        ("mean not taken off", "state.absmax - mean", "state.absmax"),
        ("mean forgotten", '"scale_mean": mean', '"scale_mean": torch.zeros_like(mean)'),
        ("blocks of columns", "weight.contiguous(), blocksize", "weight.T.contiguous(), blocksize"),
        ("other codes", 'blocksize=NF4_BLOCK, quant_type="nf4")', 'blocksize=NF4_BLOCK, quant_type="fp4")'),
        ("scales of scales forgotten", '"scale_of_scale": scales.absmax', '"scale_of_scale": scales.absmax * 0'),
    ],
    "QuantizedLinear": [
        ("first row's scale", "self.scale[:, None]", "self.scale[:1, None]"),
        ("Conv1D left transposed", "else weight.T.contiguous()", "else weight"),
        ("bias lost", "nn.Parameter(bias.detach(), ", "nn.Parameter(torch.zeros_like(bias), "),
        ("bias trained", "bias.detach(), requires_grad=False", "bias.detach()"),
        ("mean of scales forgotten", "offset=self.scale_mean", "offset=0 * self.scale_mean"),
    ],
    "UnpackedProduct": [
        ("no bias", ", linear.bias)", ")"),
        ("sign of the gradient", "return grad @", "return -grad @"),
        ("x kept", "ctx.linear = linear", "ctx.linear = linear\n        ctx.save_for_backward(x)"),
        ("weight kept", "ctx.linear = linear", "ctx.linear = linear\n        ctx.save_for_backward(linear.weight)"),
        ("doubled", "return F.linear(", "return 2 * F.linear("),
    ],
}

ADAM8BIT: Changes = {
    "AdamW8bit": [
        ("betas swapped", "beta1, beta2 = group", "beta2, beta1 = group"),
        ("always the first step", 'int(state["step"]),', "1,"),
        ("no decay", 'group["weight_decay"],', "0.0,"),
        ("rate fixed", 'group["lr"],', "1e-3,"),
        (
            "code tables swapped",
            "self._signed,\n            self._unsigned,",
            "self._unsigned,\n            self._signed,",
        ),
        ("packed one size too late", "numel() < MIN", "numel() <= MIN"),
        ("all packed", "numel() < MIN_8BIT_SIZE", "numel() < 0"),
        ("transposed weights not written", "parameter.copy_(dense)", "pass"),
        ("not counted", 'state["step"] += 1', 'state["step"] += 1 if state["step"] < 1 else 0'),
    ],
}

CAPPED = "        if self.softcap is not None:\n            tile"
PEAK = "        peak = torch.maximum(self.peak, tile.amax(dim=1))"
WEIGHTED = "self.weighted.addcmul_(shift, self.total).mul_(shrink)"
TOTAL = "self.total.mul_(shrink).add_(exponentials.sum(dim=1))"
FOUND = "torch.where(inside, tile.gather(1, column).squeeze(1), self.target_logit)"
BY_LOGPROB = "gradient.mul_((-grad_logprobs / self.total)[:, None])"
OFFSET = "slope * (self.entropy() - self.total.log()) - grad_logprobs / self.total"
AT_TARGET = "shaping.pull_back_(torch.where(inside, grad_logprobs, 0.0), self.target_logit)"
FACTOR = "gradient.mul_(self.scale / self.temperature)"

ONLINE_SOFTMAX: Changes = {
    "LogitShaping": [
        ("scale ignored", "tile.mul_(self.scale)", "pass"),
        ("divided by the scale", "tile.mul_(self.scale)", "tile.div_(self.scale)"),
        ("temperature ignored", "tile.div_(self.temperature)", "pass"),
        ("multiplied by the temperature", "tile.div_(self.temperature)", "tile.mul_(self.temperature)"),
        ("cap left out", CAPPED, CAPPED.replace("is not None", "is None and False")),
        ("not scaled back to the cap", ".tanh_().mul_(self.softcap)", ".tanh_()"),
        ("not divided by the cap", "tile.div_(self.softcap).tanh_()", "tile.tanh_()"),
        ("cap has slope one", "value=-tanh_per_logit", "value=0"),
        ("slope of the cap above one", "value=-tanh_per_logit", "value=tanh_per_logit"),
        ("temperature left out of the cap's slope", "self.temperature / self.softcap", "1 / self.softcap"),
        ("scale left out of the gradient", FACTOR, "gradient.div_(self.temperature)"),
        ("temperature left out of the gradient", FACTOR, "gradient.mul_(self.scale)"),
        ("scale and temperature swapped", FACTOR, "gradient.mul_(self.temperature / self.scale)"),
    ],
    "RunningSoftmax.fold_": [
        ("peak starts at zero", "torch.finfo(dtype).min", "0.0"),
        ("peak of this tile alone", PEAK, "        peak = tile.amax(dim=1)"),
        ("peak not kept", "        self.peak.copy_(peak)\n", ""),
        ("old sum not rescaled", TOTAL, TOTAL.replace("mul_(shrink).", "")),
        ("old sum forgotten", TOTAL, TOTAL.replace("mul_(shrink)", "zero_()")),
        ("new sum left out", TOTAL, "self.total.mul_(shrink)"),
        ("weighted sum not rescaled", WEIGHTED, WEIGHTED.replace(".mul_(shrink)", "")),
        ("weighted sum not moved to the new peak", WEIGHTED, "self.weighted.mul_(shrink)"),
        ("moved by the sum after this tile", WEIGHTED + "\n        " + TOTAL, TOTAL + "\n        " + WEIGHTED),
        ("sum of exponentials for the weighted sum", "tile.mul_(exponentials).sum", "exponentials.sum"),
        ("targets elsewhere overwritten", FOUND, "tile.gather(1, column).squeeze(1)"),
        ("target never read", FOUND, "self.target_logit"),
        ("target less this tile's peak", FOUND, FOUND.replace("squeeze(1)", "squeeze(1) - tile.amax(dim=1)")),
        ("rows are copies", "self.total[tokens]", "self.total[tokens].clone()"),
    ],
    "RunningSoftmax.logprobs and entropy": [
        ("peak left out", "self.target_logit - self.peak - self.total.log()", "self.target_logit - self.total.log()"),
        ("sum without logarithm", "- self.peak - self.total.log()", "- self.peak - self.total"),
        ("normaliser left out", "- self.peak - self.total.log()", "- self.peak"),
        ("peak and sum joined", "- self.peak - self.total.log()", "- (self.peak + self.total.log())"),
        ("sign of the weighted sum", "log() - self.weighted / self.total", "log() + self.weighted / self.total"),
        ("weighted sum not normalised", "log() - self.weighted / self.total", "log() - self.weighted"),
    ],
    "RunningSoftmax.gradient": [
        ("probabilities not normalised", BY_LOGPROB, BY_LOGPROB.replace(" / self.total", "")),
        ("sign of the probabilities", BY_LOGPROB, BY_LOGPROB.replace("-grad", "grad")),
        (
            "same gradient for every row",
            BY_LOGPROB,
            BY_LOGPROB.replace("grad_logprobs", "grad_logprobs.mean()").replace(
                "mean()", "mean().expand_as(self.total)"
            ),
        ),
        ("entropy left out of its gradient", OFFSET, OFFSET.replace("self.entropy() - ", "-")),
        ("sign of the normaliser", OFFSET, OFFSET.replace("entropy() -", "entropy() +")),
        ("log-prob left out beside the entropy", OFFSET, OFFSET.replace(" - grad_logprobs / self.total", "")),
        ("sign of the entropy's gradient", "slope = -grad_entropy", "slope = grad_entropy"),
        ("target left out", " + at_target[:, None]", ""),
        ("target's share in every tile", AT_TARGET, AT_TARGET.replace("inside,", "inside | True,")),
        ("target's share without slope", AT_TARGET, "torch.where(inside, grad_logprobs, 0.0)"),
        ("slope of another logit", AT_TARGET, AT_TARGET.replace("self.target_logit", "self.peak * 0.5")),
        ("slope at the probabilities left out", "        shaping.pull_back_(gradient, logits)\n", ""),
        ("last column is outside", "(targets < num_columns)", "(targets < num_columns - 1)"),
        ("one column too many", "(targets < num_columns)", "(targets <= num_columns)"),
        ("first column is outside", "(targets >= 0)", "(targets > 0)"),
        ("columns before are inside", "(targets >= 0) & ", ""),
    ],
}

SHIFTED = """targets[tokens] - vocabulary.start,
                    softmax.rows(tokens),
                    shaping,
                )"""
SUMMED = "total.add_(product(a, b))"

TILED_LOGPROBS: Changes = {
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

SWEPT_LOGPROBS: Changes = {
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

ORDER = "key=lambda i: (-sum(sizes[i]), -sizes[i][0], i)"
FILL = "(i - starts[-1] + 1) * (prompt + response) > max_tokens"
WIDEST = "prompt, response = max(prompt, own_prompt), max(response, own_response)"

MICRO_BATCHES: Changes = {
    "by_token_budget": [
        ("not sorted", "order = sorted(range(len(sizes)), " + ORDER + ")", "order = list(range(len(sizes)))"),
        ("shortest first", ORDER, "key=lambda i: (sum(sizes[i]), sizes[i][0], i)"),
        ("ties by prompt ignored", ORDER, "key=lambda i: (-sum(sizes[i]), i)"),
        (
            "not balanced",
            "starts = [*filled_up(ordered, budget), len(order)]",
            "starts = [*filled_up(ordered, max_tokens), len(order)]",
        ),
        ("one group more", "<= num_groups)", "<= num_groups + 1)"),
        ("a budget too low", "starts = [*filled_up(ordered, budget)", "starts = [*filled_up(ordered, budget - 1)"),
        ("last group lost", "budget), len(order)]", "budget)]"),
        ("positions in the sorted order", "[order[start:end] for", "[sorted(order)[start:end] for"),
    ],
    "filled_up": [
        ("budget not reached", FILL, FILL.replace(" > ", " >= ")),
        ("one row too many", FILL, FILL.replace(" + 1", "")),
        ("prompts padded alone", FILL, FILL.replace("(prompt + response)", "prompt")),
        ("only the longest row counts", WIDEST, WIDEST.replace("max(prompt, own_prompt)", "max(prompt, 0)")),
        ("width of the new row", WIDEST, "prompt, response = own_prompt, own_response"),
        ("width of the group before", "            prompt, response = own_prompt, own_response\n", ""),
        ("a long row is never alone", "not starts or (i", "not starts or i and (i - 1"),
    ],
    "micro_batches": [
        ("order of the rows matters", "else sorted(rows)", "else list(rows)"),
        ("responses do not count", "responses = batch.response_mask.sum", "responses = batch.response_mask[:, :1].sum"),
        (
            "padding of the prompt counts",
            "batch.attention_mask[:, : batch.num_prompt_columns].sum(dim=1)",
            "(batch.attention_mask[:, : batch.num_prompt_columns] >= 0).sum(dim=1)",
        ),
        (
            "prompts cut",
            "first = border - int(mask[:, :border].sum(dim=1).max())",
            "first = border - int(mask[:, :border].sum(dim=1).min())",
        ),
        (
            "responses cut",
            "response_mask.sum(dim=1).max())\n    columns",
            "response_mask.sum(dim=1).min())\n    columns",
        ),
        ("columns of all rows", "columns = slice(first, border + width)", "columns = slice(0, border + width)"),
    ],
}

HALF = "self.micro_batch_tokens = num_tokens // 2"
COUNTED = "which no batch may have come near\n        self.num_retries += 1"
ALONE = "        if num_items == 1:"

LIMITS: Changes = {
    "StageLimits": [
        ("half of the limit", HALF, "self.micro_batch_tokens //= 2"),
        ("as large as what failed", HALF, HALF.replace(" // 2", "")),
        ("a third", HALF, HALF.replace("// 2", "// 3")),
        ("retries not counted", COUNTED, ""),
        ("single sequences cut on and on", ALONE, "        if num_items == 0:"),
        ("pairs of rows never cut", ALONE, "        if num_items <= 2:"),
        ("single rows cut on and on", "        if num_rows == 1:", "        if num_rows == 0:"),
        ("rows not halved", "self.rollout_rows = num_rows // 2", "self.rollout_rows = num_rows"),
        (
            "evaluations unbounded",
            "config.sampling.batch_rows or config.rollout_batch_size * config.samples_per_prompt",
            "config.sampling.batch_rows",
        ),
        ("prompts for rows", "config.rollout_batch_size * config.samples_per_prompt", "config.rollout_batch_size"),
        ("setting ignored", "config.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS", "DEFAULT_MICRO_BATCH_TOKENS"),
    ],
    "map_micro_batches": [
        ("goes on after a failure", "                break\n", "                continue\n"),
        ("results alive until the next attempt", "        results.clear()\n", "        kept = results\n"),
        ("gradients not dropped", "        start_over()\n", ""),
        (
            "gradients dropped after the halving",
            "        start_over()\n        gc.collect()\n        release()\n        limits.halve_micro_batch(*failure)",
            "        gc.collect()\n        release()\n        limits.halve_micro_batch(*failure)\n        start_over()",
        ),
        ("failing result kept", "            results.append(result)\n        if", "        if"),
    ],
    "map_row_groups": [
        ("uneven", "size = -(-left // num_groups)", "size = min(left, limits.rollout_rows or left)"),
        (
            "groups above the limit",
            "num_groups = -(-left // (limits.rollout_rows or left))",
            "num_groups = max(1, left // (limits.rollout_rows or left))",
        ),
        (
            "all groups again",
            "            limits.halve_rollout_rows(size, result.reason)\n",
            "            limits.halve_rollout_rows(size, result.reason)\n            start, results = 0, []\n",
        ),
        (
            "failed group skipped",
            "            limits.halve_rollout_rows(size, result.reason)\n",
            "            limits.halve_rollout_rows(size, result.reason)\n            start += size\n",
        ),
        (
            "half of the limit, not of the group",
            "limits.halve_rollout_rows(size, result.reason)",
            "limits.halve_rollout_rows(num_rows, result.reason)",
        ),
    ],
    "attempt": [
        ("frames stay alive", "traceback.clear_frames(link.__traceback__)", "pass"),
        ("causes stay alive", "link = link.__cause__ or link.__context__", "link = None"),
        ("every error is memory", "if not is_out_of_memory(error):", "if False:"),
        (
            "only CUDA's error",
            "isinstance(error, MemoryError | torch.OutOfMemoryError)",
            "isinstance(error, torch.OutOfMemoryError)",
        ),
        ("the CPU allocator unknown", "any(text in str(error) for text in OUT_OF_MEMORY)", "False"),
        ("the last line for the reason", ".splitlines()[0]", ".splitlines()[-1]"),
        ("nothing handed back", "        trim(0)\n", "        pass\n"),
    ],
}

WRITE = "self._key_store[..., start : self._num_filled, :] = key_states"
MOVE = "filled[: len(rows)] = filled[rows]"

CACHE: Changes = {
    "PreallocatedLayer": [
        ("first columns overwritten", WRITE, WRITE.replace("start : self._num_filled", ": key_states.shape[-2]")),
        ("values not written", "self._value_store[..., start : self._num_filled, :] = value_states", "pass"),
        (
            "columns that are not filled",
            "self.keys = self._key_store[..., : self._num_filled, :]",
            "self.keys = self._key_store",
        ),
        ("values for keys", "self.keys = self._key_store[", "self.keys = self._value_store["),
        ("first rows kept", MOVE, "pass"),
        (
            "last column left behind",
            "filled = store[..., : self._num_filled, :]",
            "filled = store[..., : self._num_filled - 1, :]",
        ),
        ("rows that left stay", "        return store[: len(rows)]", "        return store"),
        (
            "new storage for fewer rows",
            "        return store[: len(rows)]",
            "        return store[: len(rows)].clone()",
        ),
        (
            "too many columns",
            "self._num_columns, key_states.shape[-1]))",
            "2 * self._num_columns, key_states.shape[-1]))",
        ),
        (
            "bytes of the filled part",
            "store.untyped_storage().nbytes() for",
            "store[..., : self._num_filled, :].numel() * 4 for",
        ),
        (
            "empty layers asked",
            "        if self.is_initialized:\n            self._key_store = ",
            "        assert self.is_initialized\n        if True:\n            self._key_store = ",
        ),
    ],
    "cache_bytes": [
        ("keys alone", "return 2 * num_layers", "return num_layers"),
        ("one layer", "return 2 * num_layers * ", "return 2 * "),
        ("one row", "num_rows * num_kv_heads", "num_kv_heads"),
        ("heads left out", "num_rows * num_kv_heads", "num_rows"),
        ("four bytes", "head_dim * itemsize", "head_dim * 4"),
    ],
}

NORMALISER = "log_normaliser = logits.logsumexp(dim=-1)"
TILE = "size = max(1, tile_bytes // (DRAW_BYTES * len(head.weight)))"

SAMPLE: Changes = {
    "draw_in_tiles": [
        ("no tiles", TILE, "size = len(states)"),
        ("float32 counted", TILE, TILE.replace("DRAW_BYTES", "4")),
        (
            "uniforms of the first tile",
            "draw(logits, uniforms[start : start + size], config)",
            "draw(logits, uniforms[: len(logits)], config)",
        ),
        (
            "states of the first tile",
            "head.logits(states[start : start + size])",
            "head.logits(states[: len(states[start : start + size])])",
        ),
        ("forbidden ids allowed", "logits[:, forbidden] = -torch.inf", "pass"),
        ("order of tiles", "return torch.cat(tokens)", "return torch.cat(tokens[::-1])"),
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

BISECTION = (
    "        if option(middle).peak <= budget:\n            high = middle\n        else:\n            low = middle"
)
TIME = "(1.0 + checkpointed_share / FORWARD_BACKWARD) * (1.0 + CALL_TOKENS / tokens)"
CHEAPEST = "min(fitting, key=lambda option: option.relative_time, default=None)"
FIRST_ROWS = "if rollout_bytes(work.plan, rows, layers) <= budget), given.rollout_rows or 1)"

CHOOSE: Changes = {
    "choose": [
        ("smallest peak, not cheapest", CHEAPEST, CHEAPEST.replace("relative_time", "peak")),
        ("slowest", CHEAPEST, CHEAPEST.replace("min(", "max(")),
        ("first that fits", CHEAPEST, "next(iter(fitting), None)"),
        ("budget not used up", "if option.peak <= budget]", "if option.peak < budget]"),
        ("what does not fit is chosen", "if option.peak <= budget]", "if option.peak]"),
        ("rows that just fit refused", FIRST_ROWS, FIRST_ROWS.replace("<= budget", "< budget")),
        (
            "rows not looked at",
            FIRST_ROWS,
            FIRST_ROWS.replace("rollout_bytes(work.plan, rows, layers) <= budget", "rows"),
        ),
        ("given rows forgotten where they do not fit", FIRST_ROWS, FIRST_ROWS.replace("given.rollout_rows or 1", "1")),
        ("rollout left out", 'sum(phases["rollout"].values()) if "rollout" in phases else 0', "0"),
    ],
    "fewest_layers": [
        ("all layers", BISECTION, BISECTION.replace("high = middle", "low = middle")),
        ("one layer too few", "    return option(high)", "    return option(low)"),
        ("none is not tried", "    if option(low).peak <= budget:\n", "    if option(low).peak < 0:\n"),
        ("given layers ignored", "if given.checkpointed_layers is not None:", "if False:"),
        ("zero given layers ignored", "if given.checkpointed_layers is not None:", "if given.checkpointed_layers:"),
        ("just enough is not enough", BISECTION, BISECTION.replace("<= budget", "< budget")),
    ],
    "fits_smallest": [
        ("largest parts", "or work.tokens_each,", "or work.tokens_each * work.num_sequences,"),
        ("given micro-batch ignored", "work.given.micro_batch_tokens or work.tokens_each", "work.tokens_each"),
        ("given rows ignored", "work.given.rollout_rows or 1,", "1,"),
        ("nothing recomputed", "layers = work.num_layers if", "layers = 0 if"),
        ("given layers ignored", "if work.given.checkpointed_layers is None else", "if True else"),
        ("just enough is not enough", "peak(work.plan(cuts)) <= budget", "peak(work.plan(cuts)) < budget"),
    ],
    "relative_time": [
        ("recomputing costs nothing", TIME, "1.0 + CALL_TOKENS / tokens"),
        ("recomputing costs a backward", TIME, TIME.replace(" / FORWARD_BACKWARD", "")),
        ("calls cost nothing", TIME, "1.0 + checkpointed_share / FORWARD_BACKWARD"),
        ("calls cost what they have tokens", TIME, TIME.replace("CALL_TOKENS / tokens", "tokens / CALL_TOKENS")),
        ("layers, not their share", "layers / num_layers)", "layers / 1.0)"),
    ],
    "micro_batch_sizes and row_groups": [
        ("no limit", "max(min(MAX_MICRO_BATCH_TOKENS, num_tokens), tokens_each)", "max(num_tokens, tokens_each)"),
        ("more than there are", "min(MAX_MICRO_BATCH_TOKENS, num_tokens)", "MAX_MICRO_BATCH_TOKENS"),
        ("less than a sequence", "    while size > tokens_each:", "    while size > tokens_each // 2:"),
        ("a single sequence left out", "        size //= 2\n    yield tokens_each\n", "        size //= 2\n"),
        ("quarters", "        size //= 2", "        size //= 4"),
        ("groups rounded down", "ceil(num_sequences / num_groups)", "num_sequences // num_groups"),
        ("a single row left out", "        num_groups *= 2\n    yield 1\n", "        num_groups *= 2\n"),
        ("given micro-batch ignored", "        yield given\n        return\n    size", "        yield given\n    size"),
    ],
}

AT = "return self.one_row + (num_rows - 1) * self.per_row"
DEEPER = "(num_layers - self.depth) * self.per_layer.at(num_rows)"
HIGHER = "        if not found or line.per_row > found[-1].per_row:"
FELL_APART = "highest = Line(max(one.moments), max(two.moments) - max(one.moments))"

COURSE: Changes = {
    "Line": [
        ("starts at no rows", AT, AT.replace("(num_rows - 1)", "num_rows")),
        ("one row for all", AT, "return self.one_row"),
        ("proportional", AT, "return num_rows * self.one_row"),
        ("steps of the first", AT, AT.replace("self.per_row", "self.one_row")),
        ("falls", AT, AT.replace("+ (", "- (")),
    ],
    "Need.of": [
        ("nothing deep", "(deep if i in one.deep else shallow)", "shallow"),
        ("all deep", "(deep if i in one.deep else shallow)", "deep"),
        ("two rows for one", "Line(a, b - a)", "Line(b, b - a)"),
        ("two rows' bytes a row", "Line(a, b - a)", "Line(a, b)"),
        ("kept of two rows", "Line(one.kept, two.kept - one.kept)", "Line(two.kept, two.kept - one.kept)"),
        ("layers of one row", "Line(one.per_layer, two.per_layer - one.per_layer)", "Line(one.per_layer, 0.0)"),
        ("moments that do not belong together", "        if not same:", "        if False:"),
        ("not deep where it may be", "deep, shallow = [highest], [highest]", "deep, shallow = [], [highest]"),
        ("first moments for the highest", FELL_APART, FELL_APART.replace("max(", "min(")),
    ],
    "Need.peak": [
        ("shallow moments left out", "return max(shallow, self.deep", "return max(0.0, self.deep"),
        ("deep moments left out", "return max(shallow, self.deep_peak(num_rows, num_layers))", "return shallow"),
        ("layers that were run again", DEEPER, DEEPER.replace(" - self.depth", "")),
        ("layers of one row", DEEPER, DEEPER.replace("at(num_rows)", "at(1)")),
        ("one layer too few", DEEPER, DEEPER.replace("self.depth)", "self.depth - 1)")),
    ],
    "highest_lines": [
        ("only the steepest", HIGHER, "        if line.per_row == max(x.per_row for x in lines):"),
        ("only the first", HIGHER, "        if not found:"),
        ("all", HIGHER, "        if True:"),
        ("equally steep ones too", HIGHER, HIGHER.replace("line.per_row >", "line.per_row >=")),
        ("lowest first", "reverse=True", "reverse=False"),
    ],
}

ONCE = "once=num == work.minibatch_size)"
LATE = "peak=need.peak - max(need.kept, need.head - need.kept)"
LOGITS = "max(0.0, need.head - max(need.kept, less)) if need.head >= need.peak else 0.0"
PAIRS = "sequence * (2 if pairs else 1), work.batch_size) * (2 if pairs else 1)"

PLAN: Changes = {
    "Planner.ppo": [
        ("scoring of the last pass only", "        score = max(\n", "        score = min(\n"),
        (
            "scored row by row",
            "micro = replace(group, num=micro_rows(cuts, sequence, work.num_sequences))",
            "micro = group",
        ),
        (
            "responses left out of the rows",
            "sequence = work.prompt_tokens + work.response_tokens\n        batch",
            "sequence = work.prompt_tokens\n        batch",
        ),
        ("cache counted twice", "replace(rollout, kept=0.0), less=rollout.kept)", "rollout)"),
        ("cache lost", 'held | {"cache": round(rollout.kept)}', "held"),
        ("batch of one sequence", "batch = work.num_sequences * (", "batch = ("),
        (
            "sampled without the adapter",
            'adapter=table["actor"].adapter is not None)\n        micro',
            "adapter=False)\n        micro",
        ),
        ("smallest learning pass", "return max(found, key=total)", "return min(found, key=total)"),
        ("entropy of the critic too", ' and "actor" in roles,', ","),
        ("nothing learns", "                learns=True,\n                entropy", "                entropy"),
        (
            "nothing recomputed",
            "need = self.simulation.micro_batch(kind, rows, checkpointed=cuts.checkpointed_layers)\n            found",
            "need = self.simulation.micro_batch(kind, rows)\n            found",
        ),
        ("always one micro-batch", ONCE, "once=True)"),
        ("never one micro-batch", ONCE, "once=False)"),
        ("no state", '            "optimizer": counted.optimizer,\n', ""),
        ("heads left out", "counted.adapters + counted.heads", "counted.adapters"),
    ],
    "Planner.stage1": [
        ("pairs as single rows", PAIRS, PAIRS.replace(" * (2 if pairs else 1)", "")),
        ("pairs cut as single rows", PAIRS, PAIRS.replace("sequence * (2 if pairs else 1)", "sequence")),
        ("responses of PPO", "response=work.data_response_tokens)", "response=work.response_tokens)"),
        ("all weights train", "[self.sizes.lora if lora else self.sizes.trunk, *heads]", "[self.sizes.trunk, *heads]"),
        ("all rows meet the LM head", "learns=True, half=pairs)", "learns=True)"),
        ("adapter lost", "(body.num_bytes if lora else 0)", "0"),
        ("adapter always", "(body.num_bytes if lora else 0)", "body.num_bytes"),
        (
            "single micro-batch of pairs missed",
            "once = num == work.batch_size * (2 if pairs else 1)",
            "once = num == work.batch_size",
        ),
    ],
    "learning and phase": [
        ("float32 step forgotten", "part.stepping_bytes for part", "part.gradient_bytes for part"),
        (
            "no gradients beside activations",
            'return [phase(held | {"gradients": gradients}, need), stepping]',
            "return [phase(held, need), stepping]",
        ),
        (
            "no step",
            '[phase(held | {"gradients": gradients}, need), stepping]',
            '[phase(held | {"gradients": gradients}, need)]',
        ),
        ("nothing gone when gradients are there", LATE, "peak=need.peak"),
        ("heads not gone", LATE, "peak=need.peak - need.kept"),
        ("activations not gone", LATE, "peak=need.peak - need.head + need.kept"),
        ("logits always named", LOGITS, "max(0.0, need.head - max(need.kept, less))"),
        ("logits never named", LOGITS, "0.0"),
        ("logits with what is kept", LOGITS, LOGITS.replace("need.head - max(need.kept, less)", "need.head")),
        ("peak is the sum", "    return max(total(parts) for", "    return sum(total(parts) for"),
    ],
    "micro_rows": [
        (
            "none where one is too large",
            "max(1, cuts.micro_batch_tokens // tokens_each)",
            "cuts.micro_batch_tokens // tokens_each",
        ),
        (
            "more than there are",
            "min(num, max(1, cuts.micro_batch_tokens // tokens_each))",
            "max(1, cuts.micro_batch_tokens // tokens_each)",
        ),
        ("rounded up", "cuts.micro_batch_tokens // tokens_each)", "-(-cuts.micro_batch_tokens // tokens_each))"),
        ("always all", "min(num, max(1, cuts.micro_batch_tokens // tokens_each))", "num"),
        ("always one", "min(num, max(1, cuts.micro_batch_tokens // tokens_each))", "min(num, 1)"),
    ],
}

HEADLESS = 'if any(role.trunk == trunk and role.head == "lm" for role in table.values()):'
SETS = "len(adapters(table)) * sizes.lora.num_bytes + len(trunks(table)) * sizes.below_bytes"

COUNT: Changes = {
    "count_method": [
        (
            "every role a trunk",
            "for name in trunks(table))\n    lora",
            "for name in (role.trunk for role in table.values()))\n    lora",
        ),
        ("one LoRA set", SETS, SETS.replace("len(adapters(table)) * ", "")),
        ("a set for each trunk", SETS, SETS.replace("len(adapters(table))", "len(trunks(table))")),
        ("one set below", SETS, SETS.replace("len(trunks(table)) * ", "")),
        ("no set below", SETS, SETS.replace(" + len(trunks(table)) * sizes.below_bytes", "")),
        ("every role a head", 'for role in table.values() if role.head != "lm"}', "for role in table.values()}"),
        (
            "gradients of all passes",
            "max((sum(part.gradient_bytes for part in parts) for parts in trained), default=0)",
            "sum(part.gradient_bytes for parts in trained for part in parts)",
        ),
        (
            "state of one pass",
            "sum(part.optimizer_bytes for parts in trained for part in parts)",
            "sum(part.optimizer_bytes for part in trained[0])",
        ),
        ("gradients left out of the total", "head_bytes + gradients + optimizer,", "head_bytes + optimizer,"),
        ("state as large as the weights", "sum(part.optimizer_bytes for parts", "sum(part.num_bytes for parts"),
    ],
    "trained_parts and trunk_part": [
        ("adapters train the trunk", "if adapter is None else sizes.lora\n    roles", "\n    roles"),
        (
            "heads do not learn",
            'return [body, *(sizes.scalar_head for role in roles if role.head != "lm")]',
            "return [body]",
        ),
        ("a head for each role", 'for role in roles if role.head != "lm")]', "for role in roles)]"),
        ("every trunk has an LM head", HEADLESS, "if True:"),
        ("no trunk has an LM head", HEADLESS, "if False:"),
        ("any trunk's LM head", HEADLESS, HEADLESS.replace("role.trunk == trunk and ", "")),
        ("gradients of the head", "whole.gradient_bytes - head.gradient_bytes", "whole.gradient_bytes"),
        ("state of the head", "whole.optimizer_bytes - head.optimizer_bytes", "whole.optimizer_bytes"),
        ("reference and reward learn", "{name: table[name] for name in TRAINABLE_ROLES if name in table}", "table"),
    ],
    "describe_role": [
        ("nothing is trained", "    if name in TRAINABLE_ROLES:\n        body", "    if False:\n        body"),
        ("everything is trained", "    if name in TRAINABLE_ROLES:\n        body", "    if True:\n        body"),
        ("head left out", ' + (0 if role.head == "lm" else sizes.scalar_head.num_bytes)', ""),
        (
            "head of the actor",
            '(0 if role.head == "lm" else sizes.scalar_head.num_bytes)',
            "sizes.scalar_head.num_bytes",
        ),
        (
            "trunk for its LoRA set",
            "sizes.lora if role.adapter is not None else trunk_part(table, role.trunk, sizes)",
            "trunk_part(table, role.trunk, sizes)",
        ),
    ],
}

OUTCOME = "0.5 * (1 + (a > b) - (a < b))"
WIDER = "observed - delta > z * math.sqrt(variance)"
MIRRORED = "2 * estimate - _quantile(errors, fraction)"
CENTRE = "centre = (rate + z * z / (2 * n)) / (1 + z * z / n)"
RADIUS = "math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)"
GAP = "sum(b.num_pairs * abs(b.accuracy - b.confidence) for b in bins) / len(margins)"

STATISTICS: Changes = {
    "pair_outcomes and win_rate": [
        ("ties are losses", OUTCOME, "1.0 * (a > b)"),
        ("ties are wins", OUTCOME, "1.0 * (a >= b)"),
        ("sides swapped", OUTCOME, "0.5 * (1 + (b > a) - (b < a))"),
        ("NaN is a loss", "math.nan if math.isnan(a) or math.isnan(b) else ", ""),
        ("lengths may differ", "list(zip(ours, theirs, strict=True))", "list(zip(ours, theirs))"),
    ],
    "win_rate_interval": [
        ("one-sided", "z = NormalDist().inv_cdf(0.5 + level / 2)\n    low", "z = NormalDist().inv_cdf(level)\n    low"),
        ("not halved", "return (1 + low) / 2, (1 + high) / 2", "return 1 + low, 1 + high"),
        (
            "sides not swapped",
            "-_lower_delta(losses, wins, len(outcomes), z)",
            "-_lower_delta(wins, losses, len(outcomes), z)",
        ),
        (
            "ties dropped",
            "high = -_lower_delta(losses, wins, len(outcomes), z)",
            "high = -_lower_delta(losses, wins, max(1, wins + losses), z)",
        ),
        (
            "variance without the losses",
            "max(2 * loss_rate + delta * (1 - delta), 0.0)",
            "max(delta * (1 - delta), 0.0)",
        ),
        ("variance of the difference alone", "delta * (1 - delta), 0.0) / n", "delta * (1 + delta), 0.0) / n"),
        ("z forgotten", WIDER, WIDER.replace("z * ", "")),
        (
            "smaller root",
            "(math.sqrt(max(b * b - 4 * a * c, 0.0)) - b)",
            "(-math.sqrt(max(b * b - 4 * a * c, 0.0)) - b)",
        ),
    ],
    "reliability_bins": [
        ("low end of the next bin", "low=0.5 + index / (2 * num_bins)", "low=0.5 + (index + 1) / (2 * num_bins)"),
        ("high end of its own low end", "high=0.5 + (index + 1) / (2 * num_bins)", "high=0.5 + index / (2 * num_bins)"),
        ("bins over all of 0 to 1", "int((confidence - 0.5) * 2 * num_bins)", "int(confidence * num_bins)"),
        ("empty bins kept out wrongly", "        if pairs\n", "        if len(pairs) > 1\n"),
        ("confidence of the sign", "math.exp(-abs(margin))", "math.exp(-margin)"),
        (
            "accuracy and confidence mixed up",
            "accuracy=fmean(right for _, right in pairs)",
            "accuracy=fmean(right for right, _ in pairs)",
        ),
    ],
    "calibration_error": [
        ("bins weighted alike", GAP, "fmean(abs(b.accuracy - b.confidence) for b in bins)"),
        ("signs cancel", GAP, GAP.replace("abs(b.accuracy - b.confidence)", "(b.accuracy - b.confidence)")),
        ("largest gap", GAP, "max(abs(b.accuracy - b.confidence) for b in bins)"),
        ("squared", GAP, GAP.replace("abs(b.accuracy - b.confidence)", "(b.accuracy - b.confidence) ** 2")),
        ("always ten bins", "bins = reliability_bins(margins, num_bins=num_bins)", "bins = reliability_bins(margins)"),
    ],
    "calibration_interval": [
        ("not mirrored", MIRRORED, "_quantile(errors, 1 - fraction)"),
        ("ends below the estimate", "max(high, estimate)", "high"),
        ("level ignored", "((1 + level) / 2, (1 - level) / 2))", "(0.975, 0.025))"),
        ("one-sided", "((1 + level) / 2, (1 - level) / 2))", "(level, 1 - level))"),
        (
            "signs cancel",
            "np.abs(generator.multinomial(len(margins), shares) @ gaps).sum()",
            "abs((generator.multinomial(len(margins), shares) @ gaps).sum())",
        ),
        (
            "chance is no excuse",
            "    if estimate <= _quantile(errors_if",
            "    if False and estimate <= _quantile(errors_if",
        ),
        (
            "chance always is",
            "    if estimate <= _quantile(errors_if",
            "    if True or estimate <= _quantile(errors_if",
        ),
        ("pairs not resampled", "generator.multinomial(len(margins), shares) @ gaps", "np.ones(len(margins)) @ gaps"),
    ],
    "interval_from_error": [
        ("Wald's centre", CENTRE, "centre = rate"),
        (
            "number of prompts always",
            "n = rate * (1 - rate) / standard_error**2 if standard_error > 0 else float(num_prompts)",
            "n = float(num_prompts)",
        ),
        ("error not squared", "/ standard_error**2", "/ standard_error"),
        ("no Wilson term", RADIUS, "math.sqrt(rate * (1 - rate) / n)"),
        ("radius not shrunk", "half = z / (1 + z * z / n) *", "half = z *"),
        ("all losses divide by zero made one", "n = n if n > 0 else float(num_prompts)", "n = n if n > 0 else 1.0"),
        (
            "one-sided",
            "z = NormalDist().inv_cdf(0.5 + level / 2)\n    centre",
            "z = NormalDist().inv_cdf(level)\n    centre",
        ),
    ],
}

ONE_HOT = "2 * np.eye(2)[generator.integers(0, 2, num)]"
DIRICHLET = "generator.dirichlet(np.full(k, (k - 2) / k), num)"
EXPECTED = "1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))"
GRADIENT = "(wins - games * expected).sum(-1)"

BRADLEY_TERRY: Changes = {
    "seed_weights": [
        ("plain Dirichlet", DIRICHLET, "generator.dirichlet(np.ones(k), num)"),
        ("not scaled to k", "weights[:, members] = k * generator", "weights[:, members] = generator"),
        ("two seeds always alike", ONE_HOT, "1.0"),
        ("two seeds not scaled", ONE_HOT, ONE_HOT.replace("2 * ", "", 1)),
        ("no weights for more", "elif k > 2:", "elif k > 99:"),
        ("bootstrap of seeds", DIRICHLET, "generator.multinomial(k, np.full(k, 1 / k), num) / k"),
    ],
    "pair_totals": [
        ("prompt weights ignored", "values @ prompt_weights.T", "values @ np.ones_like(prompt_weights).T"),
        ("entry weights ignored", " * pair_weights\n", "\n"),
        ("entries added up", "1 / np.bincount(player_of)[player_of]", "1.0"),
        ("failures are losses", "total(known.astype(float))", "total(np.ones_like(outcomes))"),
        ("failures are ties", "np.where(known, outcomes, 0.0)", "np.where(known, outcomes, 0.5)"),
        (
            "weights of one side",
            "entry_weights[:, :, None] * entry_weights[:, None, :]",
            "entry_weights[:, :, None] * np.ones_like(entry_weights)[:, None, :]",
        ),
    ],
    "fit_strengths": [
        ("sign", EXPECTED, "1 / (1 + np.exp(theta[..., :, None] - theta[..., None, :]))"),
        ("one step only", "for _ in range(200):\n        expected", "for _ in range(1):\n        expected"),
        ("games of one side", "games = wins + np.swapaxes(wins, -1, -2)", "games = 2 * wins"),
        ("win rates for strengths", "return theta\n", "return 1 / (1 + np.exp(-theta))\n"),
        ("stops early", "np.abs(step).max() < 1e-9", "np.abs(step).max() < 0.3"),
        ("gradient halved in games", GRADIENT, "(wins - games * expected / 2).sum(-1)"),
    ],
    "strengths_of": [
        ("no prior", "return fit_strengths(wins + PRIOR)", "return fit_strengths(wins + 1e-9)"),
        ("a whole win each", "return fit_strengths(wins + PRIOR)", "return fit_strengths(wins + 1.0)"),
        ("prior as a factor", "return fit_strengths(wins + PRIOR)", "return fit_strengths(wins * PRIOR + 1e-9)"),
        ("sign", "return fit_strengths(wins + PRIOR)", "return -fit_strengths(wins + PRIOR)"),
        ("turned round", "return fit_strengths(wins + PRIOR)", "return fit_strengths(wins.T + PRIOR)"),
    ],
    "bootstrap": [
        (
            "prior not weighted",
            "np.maximum(generator.standard_gamma(PRIOR, (num_resamples, num_players, num_players)), 1e-6)",
            "PRIOR",
        ),
        ("prior a whole win", "generator.standard_gamma(PRIOR, (num", "generator.standard_gamma(1.0, (num"),
        (
            "prompts not weighted",
            "generator.standard_exponential((num_resamples, outcomes.shape[-1]))",
            "np.ones((num_resamples, outcomes.shape[-1]))",
        ),
        (
            "weights too even",
            "generator.standard_exponential((num_resamples, outcomes.shape[-1]))",
            "generator.standard_gamma(2.0, (num_resamples, outcomes.shape[-1]))",
        ),
        (
            "seed ignored",
            "generator = np.random.default_rng(seed)\n    num_players",
            "generator = np.random.default_rng(0)\n    num_players",
        ),
        ("no prior", "fit_strengths(wins + prior)", "fit_strengths(wins + 1e-9)"),
        ("rates of the losers", "rates = wins / games", "rates = 1 - wins / games"),
    ],
    "percentiles": [
        ("level ignored", "((1 - level) / 2, (1 + level) / 2)", "(0.025, 0.975)"),
        ("one-sided", "((1 - level) / 2, (1 + level) / 2)", "(1 - level, level)"),
        ("ends swapped", "((1 - level) / 2, (1 + level) / 2)", "((1 + level) / 2, (1 - level) / 2)"),
        ("upper half", "((1 - level) / 2, (1 + level) / 2)", "(0.5, (1 + level) / 2)"),
        ("whole range", "((1 - level) / 2, (1 + level) / 2)", "(0.0, 1.0)"),
    ],
}

DEVIATION = "np.sqrt(np.mean(difference**2))"
STEP = "gradient = (weights * (y - expected)) @ features - penalty * coefficients"

LENGTH_CONTROL: Changes = {
    "length_term": [
        ("around the mean", DEVIATION, "(np.std(difference) or 1.0)"),
        ("not squared", DEVIATION, "np.mean(np.abs(difference))"),
        ("no tanh", "np.tanh(difference / deviation)", "difference / deviation"),
        ("not scaled", "np.tanh(difference / deviation)", "np.tanh(difference)"),
        ("sign", "difference = lengths - other_lengths", "difference = other_lengths - lengths"),
        ("variance for deviation", DEVIATION, "np.mean(difference**2)"),
    ],
    "fit_length_model": [
        ("weights ignored", STEP, STEP.replace("weights * ", "")),
        ("no penalty", "penalty = np.array([0.0, SLOPE_DEVIATION**-2])", "penalty = np.array([0.0, 1e-12])"),
        (
            "penalty on both",
            "penalty = np.array([0.0, SLOPE_DEVIATION**-2])",
            "penalty = np.array([SLOPE_DEVIATION**-2] * 2)",
        ),
        ("deviation for variance", "SLOPE_DEVIATION**-2", "SLOPE_DEVIATION**-1"),
        ("prior of wins only", "np.append(outcomes, [1.0, 0.0])", "np.append(outcomes, [1.0, 1.0])"),
        ("one step only", "for _ in range(200):", "for _ in range(1):"),
        ("no intercept", "np.stack([np.ones_like(x), x], axis=1)", "np.stack([1e-3 * np.ones_like(x), x], axis=1)"),
    ],
    "length_controlled_win_rate": [
        ("rate at the mean length", "np.exp(-point[0, 0])", "np.exp(-point[0, 0] - point[0, 1] * terms.mean())"),
        ("slope for intercept", "np.exp(-point[0, 0])", "np.exp(-point[0, 1])"),
        ("sign", "np.exp(-point[0, 0])", "np.exp(point[0, 0])"),
        ("every outcome its own prompt", "np.unique(prompts, return_inverse=True)", "(None, np.arange(len(prompts)))"),
        ("no prior", "np.full((1, 2), PRIOR)", "np.full((1, 2), 1e-6)"),
        (
            "prompts not resampled",
            "generator.standard_exponential((num_resamples, int(cluster.max()) + 1))[:, cluster]",
            "np.ones((num_resamples, len(cluster)))",
        ),
        ("interval of the slope", "prior)[:, 0]", "prior)[:, 1]"),
        (
            "runs not weighted",
            "drawn = drawn * seed_weights(generator, entries, num_resamples)[:, side]",
            "drawn = drawn",
        ),
        ("every pair of runs counts", "even = even / len(entries)", "even = even"),
        (
            "lengths swapped",
            "terms = length_term(lengths, other_lengths)",
            "terms = 0 * length_term(lengths, other_lengths)",
        ),
    ],
}

AGREED = "ours if ours == 1 - value_of(swapped) else 0.5"

LLM_JUDGE: Changes = {
    "read_verdict": [
        ("first line", "lines[-1].lower()", "lines[0].lower()"),
        ("anywhere in the line", 're.fullmatch(r"verdict', 're.search(r"verdict'),
        ("ties unread", "(a|b|tie)\\b", "(a|b)\\b"),
        ("A is B", '"A" if found[1] == "a" else "B"', '"B" if found[1] == "a" else "A"'),
        ("case matters", "lines[-1].lower()", "lines[-1]"),
        (
            "empty lines count",
            "for line in text.strip().splitlines() if line.strip",
            "for line in text.splitlines() if True or line.strip",
        ),
    ],
    "outcome_of": [
        ("first order only", AGREED, "ours"),
        ("second order only", AGREED, "1 - value_of(swapped)"),
        ("mean of both", AGREED, "(ours + 1 - value_of(swapped)) / 2"),
        ("places not swapped back", AGREED, "ours if ours == value_of(swapped) else 0.5"),
        ("failure is a tie", "        return math.nan\n    ours", "        return 0.5\n    ours"),
        (
            "one missing verdict is enough",
            "if straight is None or swapped is None:\n        return math.nan",
            "if straight is None:\n        return math.nan\n    if swapped is None:\n        return value_of(straight)",
        ),
        ("A loses", '{"A": 1.0, "tie": 0.5, "B": 0.0}', '{"A": 0.0, "tie": 0.5, "B": 1.0}'),
    ],
}

LENGTH_TARGET = "score -= abs(length - target) / target"
LENGTH_MAXIMUM = "score -= max(0, length - maximum) / maximum"
GRAMS = "for start in range(len(ids) - ngram + 1)"
DISTINCT = "return len(set(grams)) / len(grams) - 1.0"
SHARES = "return _share_found(text, wanted) - _share_found(text, unwanted)"
WORD = r'rf"(?<!\w){re.escape(word)}(?!\w)"'

RULE_REWARDS: Changes = {
    "length_score": [
        ("sign of the target", LENGTH_TARGET, LENGTH_TARGET.replace("-=", "+=")),
        ("not a share of the target", LENGTH_TARGET, "score -= abs(length - target)"),
        ("shorter is better than the target", LENGTH_TARGET, "score -= (length - target) / target"),
        ("shorter than the maximum is better", LENGTH_MAXIMUM, "score -= (length - maximum) / maximum"),
        ("not a share of the maximum", LENGTH_MAXIMUM, "score -= max(0, length - maximum)"),
        ("sign of the maximum", LENGTH_MAXIMUM, LENGTH_MAXIMUM.replace("-=", "+=")),
        ("the maximum alone counts", LENGTH_MAXIMUM, LENGTH_MAXIMUM.replace("-= ", "= -")),
        (
            "one too many is allowed",
            LENGTH_MAXIMUM,
            LENGTH_MAXIMUM.replace("length - maximum)", "length - maximum - 1)"),
        ),
    ],
    "format_score": [
        ("turned round", "return 0.0 if found is None else 1.0", "return 1.0 if found is None else 0.0"),
        (
            "any part will do",
            "re.fullmatch(pattern, text, re.DOTALL) if whole",
            "re.search(pattern, text, re.DOTALL) if whole",
        ),
        ("the beginning will do", "re.fullmatch(pattern", "re.match(pattern"),
        ("always the whole", "else re.search(pattern, text, re.DOTALL)", "else re.fullmatch(pattern, text, re.DOTALL)"),
        ("the beginning where any part will do", "else re.search(", "else re.match("),
        ("one line, whole", "re.fullmatch(pattern, text, re.DOTALL)", "re.fullmatch(pattern, text)"),
        ("one line, part", "re.search(pattern, text, re.DOTALL)", "re.search(pattern, text)"),
    ],
    "repetition_score": [
        ("sign", DISTINCT, "return 1.0 - len(set(grams)) / len(grams)"),
        ("repeats rewarded", DISTINCT, "return -len(set(grams)) / len(grams)"),
        ("single ids", "tuple(ids[start : start + ngram])", "ids[start]"),
        ("one id too many", "ids[start : start + ngram]", "ids[start : start + ngram + 1]"),
        ("last n-gram left out", GRAMS, "for start in range(len(ids) - ngram)"),
        ("ends counted as n-grams", GRAMS, "for start in range(len(ids))"),
        ("divided by ids", DISTINCT, DISTINCT.replace("/ len(grams)", "/ len(ids)")),
        ("side by side only", GRAMS, "for start in range(0, len(ids) - ngram + 1, ngram)"),
    ],
    "keyword_score": [
        ("sign", SHARES, SHARES.replace(" - ", " + ")),
        ("turned round", SHARES, "return _share_found(text, unwanted) - _share_found(text, wanted)"),
        ("unwanted words ignored", SHARES, "return _share_found(text, wanted)"),
        ("parts of words", WORD, "re.escape(word)"),
        ("beginnings of words", WORD, WORD.replace(r"(?!\w)", "")),
        ("ends of words", WORD, WORD.replace(r"(?<!\w)", "")),
        ("word borders of regular expressions", WORD, r'rf"\b{re.escape(word)}\b"'),
        ("words as patterns", "{re.escape(word)}", "{word.replace('++', '')}"),
        ("case matters", ", re.IGNORECASE)", ")"),
        ("count, not share", "return found / len(words)", "return float(found)"),
    ],
}

OUTCOMES: Changes = {
    "check_returned": [
        ("strings are lists", "if isinstance(returned, str | bytes | dict) or", "if isinstance(returned, dict) or"),
        ("mappings are lists", "isinstance(returned, str | bytes | dict)", "isinstance(returned, str | bytes)"),
        ("generators refused", 'not hasattr(returned, "__iter__")', "not isinstance(returned, Sequence)"),
        ("the first length for all", "check_value(value, length) for", "check_value(value, lengths[0]) for"),
        ("one failure for all", "return [Failure(reason)] * num_responses", "return [Failure(reason)]"),
    ],
    "check_value": [
        ("length not looked at", "if len(value) != length:", "if False:"),
        ("longer is fine", "if len(value) != length:", "if len(value) < length:"),
        (
            "bytes are per-token rewards",
            "isinstance(value, str | bytes):\n        return check_number",
            "isinstance(value, str):\n        return check_number",
        ),
        ("sum not looked at", "return total if isinstance(total, Failure) else rewards", "return rewards"),
        ("one number for all tokens", "return total if isinstance(total, Failure) else rewards", "return total"),
        (
            "a bad token left out",
            "        if isinstance(number, Failure):\n            return number\n",
            "        if isinstance(number, Failure):\n            continue\n",
        ),
    ],
    "check_number": [
        ("strings are numbers", "if isinstance(value, str | bytes) or not", "if not"),
        ("NaN passes", "not abs(number) <= LARGEST_SCORE", "abs(number) > LARGEST_SCORE"),
        ("negative infinity passes", "not abs(number) <= LARGEST_SCORE", "not number <= LARGEST_SCORE"),
        ("what float32 holds is enough", "LARGEST_SCORE = 1e15", "LARGEST_SCORE = 3.4e38"),
        ("the largest is refused", "not abs(number) <= LARGEST_SCORE", "not abs(number) < LARGEST_SCORE"),
        ("huge integers are 0", "        number = math.inf", "        number = 0.0"),
    ],
    "score_in_parts": [
        ("all at once", "size = batch_rows or num_responses", "size = num_responses"),
        ("one by one", "size = batch_rows or num_responses", "size = 1"),
        ("asks on", "if len(list(failures(outcomes))) > max_failed:", "if False:"),
        (
            "stops one too early",
            "if len(list(failures(outcomes))) > max_failed:",
            "if len(list(failures(outcomes))) >= max_failed > 0:",
        ),
        (
            "the rest is missing",
            'return outcomes + all_failed("was not asked any more", num_responses - len(outcomes))',
            "return outcomes",
        ),
        (
            "as many as all failed",
            "num_responses - len(outcomes))\n        outcomes",
            "num_responses)\n        outcomes",
        ),
        ("columns of the first rows", "column[start:stop]", "column[: stop - start]"),
    ],
}

FILLED = "filled = torch.where(own.isfinite(), own, config.failure_value)"
WEIGHED = "scores = scores + config.weight * (filled / scale)"
WEIGHED_DENSE = "dense = dense + config.weight * (own_dense / scale)"
ALLOWED = 'max_failed = 0 if config.on_failure == "raise" else math.floor(max_failed_frac * len(mask))'

REWARD_SOURCES: Changes = {
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

WORK: Changes = {
    "step_work": [
        ("a decode step for the first token", "max(0.0, batch.response_tokens - 1)", "batch.response_tokens"),
        ("context at its longest", "batch.response_tokens / 2", "batch.response_tokens"),
        ("cache of one row", "read += batch.num_sequences * context", "read += context"),
        ("LoRA not read", "model.decode_bytes + (model.lora_bytes if adapted else 0)", "model.decode_bytes"),
        ("one product of attention", "per_token += 4 *", "per_token += 2 *"),
        ("decoding one row", "num_steps * batch.num_sequences * per_token", "num_steps * per_token"),
        (
            "head on all of the prompt",
            "+ 2 * model.head_params * batch.num_sequences",
            "+ 2 * model.head_params * prompts",
        ),
        ("only what learns is scored", "roles in passes(table).items()", "roles in learning.items()"),
        ("forward left out of updating", "* (learned + backward)", "* backward"),
        ("forwards of all epochs shared", "shared_flops=learned", "shared_flops=batch.num_epochs * learned"),
    ],
    "forward_flops and head_flops": [
        ("LoRA always on", "batch.num_tokens, length, adapter is not None)", "batch.num_tokens, length, True)"),
        ("LoRA always off", "batch.num_tokens, length, adapter is not None)", "batch.num_tokens, length, False)"),
        (
            "attention over the prompt",
            "2 * model.num_layers * model.query_width * length",
            "2 * model.num_layers * length",
        ),
        ("head on every token", "batch.num_response_tokens if reads", "batch.num_tokens if reads"),
        ("every pass has an LM head", "if reads else 0.0", "if True else 0.0"),
        ("no pass has one", "if reads else 0.0", "if False else 0.0"),
    ],
    "backward_flops": [
        (
            "weights learn for nothing",
            "(4 * model.block_params + attention) + 2 * head",
            "(2 * model.block_params + attention) + 2 * head",
        ),
        ("head frozen where the trunk learns", "attention) + 2 * head", "attention) + head"),
        (
            "base learns too",
            "(2 * model.block_params + 4 * model.lora_params",
            "(4 * model.block_params + 4 * model.lora_params",
        ),
        ("LoRA frozen", "4 * model.lora_params + attention", "2 * model.lora_params + attention"),
        ("attention as in forward", "ATTENTION_BACKWARD * attention_flops", "attention_flops"),
    ],
    "bound": [
        ("the faster of the two", "decode = max(", "decode = min("),
        (
            "bandwidth alone",
            "max(work.decode_bytes / bandwidth, work.decode_flops / matrix_rate)",
            "work.decode_bytes / bandwidth",
        ),
        ("prefill left out", "decode + work.prefill_flops / matrix_rate", "decode"),
        ("shared forwards counted twice", "self.update_s - self.shared_s", "self.update_s"),
        ("scoring left out", "self.generate_s + self.score_s + self", "self.generate_s + self"),
    ],
}

PACKAGES = {
    "swept_logprobs": "model",
    "quantized": "model",
    "adam8bit": "runtime",
    "online_softmax": "model",
    "tiled_logprobs": "model",
}
"""Where a module is, if not among the algorithms."""
TABLES = {"masking": MASKING, "kl": KL, "rewards": REWARDS, "advantages": ADVANTAGES, "losses": LOSSES}
TABLES |= {"quantized": QUANTIZED, "adam8bit": ADAM8BIT}
TABLES |= {"online_softmax": ONLINE_SOFTMAX, "tiled_logprobs": TILED_LOGPROBS}
PACKAGES |= {"micro_batches": "stages", "limits": "stages", "cache": "model", "sample": "model"}
TABLES |= {"micro_batches": MICRO_BATCHES, "limits": LIMITS, "cache": CACHE, "sample": SAMPLE}
PACKAGES |= {"swept_logprobs": "model"}
TABLES |= {"swept_logprobs": SWEPT_LOGPROBS}
PACKAGES |= {"choose": "memory", "plan": "memory", "count": "memory", "course": "memory"}
TABLES |= {"choose": CHOOSE, "plan": PLAN, "count": COUNT, "course": COURSE}
PACKAGES |= dict.fromkeys(("statistics", "bradley_terry", "length_control", "llm_judge"), "evaluation")
TABLES |= {"statistics": STATISTICS, "bradley_terry": BRADLEY_TERRY, "length_control": LENGTH_CONTROL}
TABLES |= {"llm_judge": LLM_JUDGE}
PACKAGES |= {"outcomes": "stages.scoring", "reward_sources": "stages.scoring"}
TABLES |= {"rule_rewards": RULE_REWARDS, "outcomes": OUTCOMES, "reward_sources": REWARD_SOURCES}
PACKAGES |= {"work": "benchmark"}
TABLES |= {"work": WORK}
MUTANTS = [
    Mutant(module, function, *change)
    for module, table in TABLES.items()
    for function, changes in table.items()
    for change in changes
]
