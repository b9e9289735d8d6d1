"""Mistakes in `algorithms/advantages.py`: {function: [(what went wrong, source, source with the mistake)]}."""

DELTA = "        delta = rewards[:, t] + discount * next_value - values[:, t]"
RESIDUAL = "masked_variance(returns - values, mask)"
ADVANTAGE = "        next_advantage = delta + discount * gae_lambda * next_advantage"

CHANGES = {
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
