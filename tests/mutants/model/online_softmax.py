"""Mistakes in `model/online_softmax.py`: {function: [(what went wrong, source, source with the mistake)]}."""

CAPPED = "        if self.softcap is not None:\n            tile"
PEAK = "        peak = torch.maximum(self.peak, tile.amax(dim=1))"
WEIGHTED = "self.weighted.addcmul_(shift, self.total).mul_(shrink)"
TOTAL = "self.total.mul_(shrink).add_(exponentials.sum(dim=1))"
FOUND = "torch.where(inside, tile.gather(1, column).squeeze(1), self.target_logit)"
BY_LOGPROB = "gradient.mul_((-grad_logprobs / self.total)[:, None])"
OFFSET = "slope * (self.entropy() - self.total.log()) - grad_logprobs / self.total"
AT_TARGET = "shaping.pull_back_(torch.where(inside, grad_logprobs, 0.0), self.target_logit)"
FACTOR = "gradient.mul_(self.scale / self.temperature)"

CHANGES = {
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
