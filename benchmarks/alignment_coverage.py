"""How often the alignment study's intervals of a win rate hold the true one: simulated studies, as a Markdown table.

    python benchmarks/alignment_coverage.py

A study has 3 seeds and 300 prompts. Log-odds of a win = what the rate asks for + a part of the seed + a part of the
prompt, both normal. The true rate is that over all seeds and prompts. Beside the study's interval: one that takes all
outcomes for independent, and Student's over the seeds' own rates.
"""

import math

import numpy as np
from alignment_numbers import over_seeds, rate

from hydra_rlhf.evaluation.statistics import win_rate_interval

NUM_SEEDS, NUM_PROMPTS, NUM_STUDIES = 3, 300, 1000
PROMPT_DEVIATION = 1.0
CELLS = [(log_odds, deviation) for log_odds in (0.0, 2.0) for deviation in (0.0, 0.1, 0.3, 1.0)]
"""(mean log-odds, deviation between seeds)."""


def cell(log_odds: float, deviation: float) -> tuple[str, ...]:
    """One row of the table."""
    generator = np.random.default_rng(round(1000 * log_odds + 10 * deviation))
    spread = math.hypot(deviation, PROMPT_DEVIATION)
    truth = float(np.mean(1 / (1 + np.exp(-log_odds - spread * generator.standard_normal(10**6)))))
    held = np.zeros(3)
    width = 0.0
    for _ in range(NUM_STUDIES):
        seeds = deviation * generator.standard_normal((NUM_SEEDS, 1))
        prompts = PROMPT_DEVIATION * generator.standard_normal(NUM_PROMPTS)
        chances = 1 / (1 + np.exp(-log_odds - seeds - prompts))
        won = (generator.random(chances.shape) < chances).astype(float)
        found = rate(won)
        student = over_seeds(found["per_seed"])["ci"]
        intervals = (found["ci"], win_rate_interval(won.ravel().tolist()), student)
        held += [low <= truth <= high for low, high in intervals]
        width += found["ci"][1] - found["ci"][0]
    shares = (f"{100 * share / NUM_STUDIES:.1f}" for share in held)
    return f"{truth:.2f}", f"{deviation:.1f}", *shares, f"{width / NUM_STUDIES:.2f}"


def main() -> None:
    """Print the table."""
    columns = ("win rate", "between seeds, log-odds", "the study's", "all independent", "Student's over seeds", "width")
    for line in (columns, ("---",) * len(columns), *(cell(*values) for values in CELLS)):
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
