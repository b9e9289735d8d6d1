"""Mistakes in `algorithms/preference_losses.py`: {function: [(what went wrong, source, source with the mistake)]}."""

IMPLICIT = "beta * zero_outside(logprobs - ref_logprobs, mask).sum(dim=1)"
PER_TOKEN = "beta * zero_outside(logprobs, mask).sum(dim=1) / mask.sum(dim=1)"
MARGINS = "margins = chosen - rejected"
RIGHT, WRONG = "F.logsigmoid(margins - gamma)", "F.logsigmoid(gamma - margins)"
LOSS = "-((1 - label_smoothing) * right + label_smoothing * wrong).sum() / num_pairs"
ACCURACY = "((margins > 0).sum() + 0.5 * (margins == 0).sum()) / num_pairs"
SUMS = "zero_outside(logprobs, mask).sum(dim=1).chunk(2)"

CHANGES = {
    "dpo_loss": [
        ("no reference", IMPLICIT, IMPLICIT.replace(" - ref_logprobs", "")),
        ("roles swapped", IMPLICIT, IMPLICIT.replace("logprobs - ref_logprobs", "ref_logprobs - logprobs")),
        ("beta forgotten", IMPLICIT, IMPLICIT.removeprefix("beta * ")),
        ("divided by beta", IMPLICIT, IMPLICIT.replace("beta * ", "1 / beta * ")),
        ("mask ignored", IMPLICIT, "beta * (logprobs - ref_logprobs).sum(dim=1)"),
        ("multiplied by the mask", IMPLICIT, "beta * ((logprobs - ref_logprobs) * mask).sum(dim=1)"),
        ("per token", IMPLICIT, f"{IMPLICIT} / mask.sum(dim=1)"),
        ("sides swapped", MARGINS, "margins = rejected - chosen"),
        ("rejected ignored", MARGINS, "margins = chosen"),
        ("sign", LOSS, LOSS[1:]),
        ("local count", LOSS, LOSS.replace(".sum() / num_pairs", ".mean()")),
        ("labels always trusted", LOSS, "-right.sum() / num_pairs"),
        ("labels never trusted", LOSS, LOSS.replace("(1 - label_smoothing)", "label_smoothing")),
        ("unstable logarithm", RIGHT, "(margins - gamma).sigmoid().log()"),
        ("no logarithm", RIGHT, "F.sigmoid(margins - gamma)"),
        ("ties wrong", ACCURACY, "(margins > 0).sum() / num_pairs"),
        ("local count in accuracy", ACCURACY, ACCURACY.replace("num_pairs", "margins.numel()")),
        ("local count in margin", "margins.sum() / num_pairs,", "margins.mean(),"),
        ("sides of the log-probs swapped", "of_chosen, of_rejected = zero", "of_rejected, of_chosen = zero"),
        ("log-probs of padding", SUMS, "logprobs.sum(dim=1).chunk(2)"),
        ("metrics keep the graph", "with torch.no_grad():", "if 1:"),
    ],
    "simpo_loss": [
        ("sum, not mean", PER_TOKEN, PER_TOKEN.removesuffix(" / mask.sum(dim=1)")),
        ("mean over columns", PER_TOKEN, PER_TOKEN.replace("mask.sum(dim=1)", "mask.shape[1]")),
        ("beta forgotten", PER_TOKEN, PER_TOKEN.removeprefix("beta * ")),
        ("mask ignored", PER_TOKEN, PER_TOKEN.replace("zero_outside(logprobs, mask)", "logprobs")),
        ("multiplied by the mask", PER_TOKEN, PER_TOKEN.replace("zero_outside(logprobs, mask)", "(logprobs * mask)")),
        ("gamma forgotten", "mask, gamma=gamma,", "mask, gamma=0.0,"),
        ("gamma added", RIGHT, "F.logsigmoid(margins + gamma)"),
        ("gamma on one side only", WRONG, "F.logsigmoid(-margins)"),
        ("accuracy by gamma", "(margins > 0)", "(margins > gamma)"),
    ],
}
