"""Mistakes in `algorithms/rewards.py`: {function: [(what went wrong, source, source with the mistake)]}."""

LAST = "    is_last = columns == last_true_index(mask).unsqueeze(1)"
PLACE = "    return torch.where(is_last, scores.unsqueeze(1), 0.0)"
REMAINDER = "place_at_last_token(scores - dense.sum(dim=1), mask)"
REWARD = "    return zero_outside(remainder + dense - kl_coef * kl, mask)"
PENALTY = "    return torch.where(ended, shaped, shaped - missing_eos_penalty)"
MEAN = "        mean=moments.mean + delta * new.numel() / count,"
CROSS = " + delta**2 * moments.count * new.numel() / count"

CHANGES = {
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
