"""Mistakes in `algorithms/losses.py`: {function: [(what went wrong, source, source with the mistake)]}."""

SURROGATE = "    loss = masked_sum(_weighted(torch.maximum(unclipped, clipped), row_weights), mask) / num_tokens"
MAX = "torch.maximum(unclipped, clipped)"
CLAMP = "-advantages * ratio.clamp(1 - clip_range, 1 + clip_range)"
UPDATE_KL = "masked_sum(torch.expm1(log_ratio) - log_ratio, mask) / num_tokens"
VALUE = "    loss = 0.5 * masked_sum(torch.maximum(error, held_error), mask) / num_tokens"
HELD = "old_values + change.clamp(-clip_range, clip_range)"
ENTROPY_SUM = "masked_sum(_weighted(entropy, row_weights), mask)"
ENTROPY = f"LossOutput(loss=-{ENTROPY_SUM} / num_tokens, metrics={{}})"
KL_SUM = "masked_sum(_weighted(estimate, row_weights), mask)"
KL_LOSS = f"LossOutput(loss={KL_SUM} / num_tokens, metrics={{}})"
NEW = "zero_outside(new_logprobs, mask)"
SFT = "LossOutput(loss=-masked_sum(logprobs, mask) / num_tokens, metrics={})"
RANKING = "-F.logsigmoid(margins).sum() / num_pairs"
ACCURACY = "((margins > 0).sum() + 0.5 * (margins == 0).sum()) / num_pairs"

CHANGES = {
    "ppo_policy_loss": [
        ("clip removed", SURROGATE, SURROGATE.replace("torch.maximum(unclipped, clipped)", "unclipped")),
        (
            "weights ignored",
            SURROGATE,
            SURROGATE.replace("_weighted(torch.maximum(unclipped, clipped), row_weights)", MAX),
        ),
        ("weights make the loss wider", "row_weights.to(x.dtype).unsqueeze(1)", "row_weights.unsqueeze(1)"),
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
        ("mask ignored", ENTROPY, ENTROPY.replace(ENTROPY_SUM, "entropy.sum()")),
        ("weights ignored", ENTROPY, ENTROPY.replace("_weighted(entropy, row_weights)", "entropy")),
        ("multiplied by the mask", ENTROPY, ENTROPY.replace(ENTROPY_SUM, "(entropy * mask).sum()")),
        ("mask inverted", ENTROPY, ENTROPY.replace(", mask)", ", ~mask)")),
        ("local count", ENTROPY, ENTROPY.replace("num_tokens", "mask.sum()")),
        ("sum, not mean", ENTROPY, ENTROPY.replace(" / num_tokens", "")),
    ],
    "kl_loss": [
        ("sign", KL_LOSS, KL_LOSS.replace("loss=", "loss=-")),
        ("weights ignored", KL_LOSS, KL_LOSS.replace("_weighted(estimate, row_weights)", "estimate")),
        ("roles swapped", NEW + ", ref_logprobs,", "ref_logprobs, " + NEW + ","),
        ("overflow in padding", NEW, "new_logprobs"),
        ("estimator ignored", "ref_logprobs, estimator)", 'ref_logprobs, "k2")'),
        ("mask ignored", KL_LOSS, KL_LOSS.replace(KL_SUM, "estimate.sum()")),
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
