"""Mistakes in `algorithms/kl.py`: {function: [(what went wrong, source, source with the mistake)]}."""

K3 = "            return torch.expm1(-log_ratio) + log_ratio"
ERROR = "min(max(measured_kl / target - 1, -MAX_CONTROLLER_ERROR), MAX_CONTROLLER_ERROR)"
NEXT = "    return kl_coef * (1 + error * num_sequences / horizon)"

CHANGES = {
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
