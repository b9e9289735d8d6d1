"""Do the intervals of the evaluation hold what they promise, and is no comparison of an LLM judge lost?

    python benchmarks/evaluation_statistics.py --out benchmarks/results/evaluation_statistics.json

Coverage of win-rate intervals by six methods (exact, and in 1,000 simulated studies a cell), of Bradley-Terry strengths
(one seed, three and five), of length-controlled rates and of the calibration error; and 200 comparisons through a local
endpoint that fails. About ten minutes on one core.
"""

import argparse
import json
import math
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from chat_server import chat_server

from hydra_rlhf.evaluation import bradley_terry, length_control
from hydra_rlhf.evaluation.llm_judge import PROMPTS, LLMJudge, Match
from hydra_rlhf.evaluation.statistics import calibration_error, calibration_interval, win_rate_interval
from hydra_rlhf.runtime.endpoint import Endpoint

Z = NormalDist().inv_cdf(0.975)
Interval = tuple[float, float]
Method = Callable[[int, int, int], Interval]
"""(wins, losses, n) -> interval of the win rate; the rest are ties."""
CELLS = [
    (n, rate, ties)
    for n in (50, 200)
    for rate, shares in ((0.5, (0.0, 0.1, 0.3)), (0.8, (0.0, 0.1, 0.3)), (0.95, (0.0, 0.02, 0.05, 0.1)))
    for ties in shares
]
"""(n, win rate, tie share); at 0.95 a tie share of 0.1 leaves no losses at all."""


def rate_of(wins: int, losses: int, n: int) -> float:
    """Wins and half the ties, of n."""
    return 0.5 + (wins - losses) / (2 * n)


def variance_of(wins: int, losses: int, n: int) -> float:
    """Variance of one outcome in the sample."""
    return (wins + 0.25 * (n - wins - losses)) / n - rate_of(wins, losses, n) ** 2


def wilson_at(rate: float, n: float) -> Interval:
    """Wilson's interval."""
    centre, half = rate + Z * Z / (2 * n), Z * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    return (centre - half) / (1 + Z * Z / n), (centre + half) / (1 + Z * Z / n)


def score(wins: int, losses: int, n: int) -> Interval:
    """The interval in use: score interval of paired proportions."""
    return win_rate_interval([1.0] * wins + [0.0] * losses + [0.5] * (n - wins - losses))


def wilson(wins: int, losses: int, n: int) -> Interval:
    """Ties as half a win and half a loss."""
    return wilson_at(rate_of(wins, losses, n), n)


def agresti_coull(wins: int, losses: int, n: int) -> Interval:
    """Ties as half a win and half a loss."""
    rate = (rate_of(wins, losses, n) * n + Z * Z / 2) / (n + Z * Z)
    half = Z * math.sqrt(rate * (1 - rate) / (n + Z * Z))
    return rate - half, rate + half


def wald(wins: int, losses: int, n: int) -> Interval:
    """Estimate -+ z standard errors of the sample."""
    rate, half = rate_of(wins, losses, n), Z * math.sqrt(max(variance_of(wins, losses, n), 0.0) / n)
    return rate - half, rate + half


def wilson_at_effective_n(wins: int, losses: int, n: int) -> Interval:
    """Wilson's interval for as many wins and losses as have the sample's standard error."""
    rate, variance = rate_of(wins, losses, n), variance_of(wins, losses, n)
    return wilson_at(rate, n * rate * (1 - rate) / variance if variance > 1e-12 and 0 < rate < 1 else n)


def percentile_bootstrap(wins: int, losses: int, n: int) -> Interval:
    """2,000 resamples of the outcomes."""
    generator = np.random.default_rng(wins * 1000 + losses)
    drawn = generator.multinomial(n, [wins / n, losses / n, 1 - (wins + losses) / n], 2000)
    rates = 0.5 + (drawn[:, 0] - drawn[:, 1]) / (2 * n)
    return float(np.quantile(rates, 0.025)), float(np.quantile(rates, 0.975))


METHODS: dict[str, Method] = {
    "score": score,
    "wilson_at_effective_n": wilson_at_effective_n,
    "wilson": wilson,
    "agresti_coull": agresti_coull,
    "wald": wald,
    "percentile_bootstrap": percentile_bootstrap,
}


def win_rate_coverage(num_studies: int) -> list[dict[str, Any]]:
    """Exact and simulated coverage of every method in every cell."""
    rows: list[dict[str, Any]] = []
    methods = {name: cache(method) for name, method in METHODS.items()}
    for n, rate, ties in CELLS:
        losses = 1 - rate - ties / 2
        shares = [rate - ties / 2, losses if losses > 1e-12 else 0.0, ties]
        counts = [(wins, lost, chance) for wins, lost, chance in likely_counts(n, shares) if chance > 1e-7]
        studies = np.random.default_rng(round(1e6 * rate + 1e3 * ties) + n).multinomial(n, shares, num_studies)
        for name, method in methods.items():
            exact = sum(chance * holds(method(wins, lost, n), rate) for wins, lost, chance in counts)
            simulated = fmean(holds(method(int(wins), int(lost), n), rate) for wins, lost, _ in studies)
            cell = {"n": n, "win_rate": rate, "tie_share": ties}
            rows.append(cell | {"method": name, "exact": exact, "simulated": simulated})
    return rows


def holds(interval: Interval, rate: float) -> bool:
    """Whether the truth is in an interval, whose ends may be off by rounding."""
    return interval[0] - 1e-12 <= rate <= interval[1] + 1e-12


def likely_counts(n: int, shares: list[float]) -> list[tuple[int, int, float]]:
    """(wins, losses, chance) of every possible count."""
    found: list[tuple[int, int, float]] = []
    for wins in range(n + 1):
        for losses in range(n + 1 - wins):
            counts = (wins, losses, n - wins - losses)
            if any(count and not share for count, share in zip(counts, shares, strict=True)):
                continue
            log = math.lgamma(n + 1) - sum(math.lgamma(count + 1) for count in counts)
            log += sum(c * math.log(s) for c, s in zip(counts, shares, strict=True) if c)
            found.append((wins, losses, math.exp(log)))
    return found


def tournament(rng: np.random.Generator, strengths: np.ndarray, n: int) -> np.ndarray:
    """Outcomes of entries with these strengths."""
    e = len(strengths)
    outcomes = np.full((e, e, n), np.nan)
    for i in range(e):
        for j in range(i):
            outcomes[i, j] = rng.random(n) < 1 / (1 + np.exp(strengths[j] - strengths[i]))
            outcomes[j, i] = 1 - outcomes[i, j]
    return outcomes


def strengths_study(num_studies: int) -> list[dict[str, Any]]:
    """Error and coverage of strengths over the first player; of players with several seeds, whose strengths scatter."""
    known = np.array([0.0, 0.5, 1.5, -1.0])
    rows: list[dict[str, Any]] = []
    for n, num_seeds in ((50, 1), (200, 1), (200, 3), (200, 5)):
        player_of = np.repeat(np.arange(4), [1, *[num_seeds] * 3])
        hits, errors = np.zeros(4), np.zeros(4)
        for study in range(num_studies):
            rng = np.random.default_rng((n, num_seeds, study))
            scatter = rng.normal(0, 0.3 if num_seeds > 1 else 0.0, len(player_of)) * (player_of > 0)
            outcomes = tournament(rng, known[player_of] + scatter, n)
            for p in range(4):
                same = np.ix_(player_of == p, player_of == p)
                outcomes[same] = np.nan
            ones = np.ones((1, n)), np.ones((1, len(player_of)))
            wins, _ = bradley_terry.pair_totals(outcomes, player_of, *ones)
            found = bradley_terry.strengths_of(wins[0])
            _, drawn = bradley_terry.bootstrap(outcomes, player_of, seed=study)
            low, high = bradley_terry.percentiles(drawn - drawn[:, :1])
            hits += (low <= known) & (known <= high)
            errors += found - found[0] - known
        rows.append(
            {
                "n": n,
                "seeds": num_seeds,
                "coverage": (hits / num_studies)[1:].tolist(),
                "mean_error": (errors / num_studies)[1:].tolist(),
            }
        )
    return rows


def length_study(num_studies: int) -> list[dict[str, Any]]:
    """Coverage of length-controlled rates for judges that like length by `slope`."""
    rows: list[dict[str, Any]] = []
    for n in (50, 200):
        for rate in (0.5, 0.8, 0.95):
            for slope in (0.0, 1.0):
                intercept, hits, plain = math.log(rate / (1 - rate)), 0, 0.0
                for study in range(num_studies):
                    rng = np.random.default_rng((n, round(100 * rate), round(slope), study))
                    ours, theirs = rng.normal(115, 30, n), rng.normal(100, 30, n)
                    terms = np.tanh((ours - theirs) / math.sqrt(15**2 + 2 * 30**2))
                    won = (rng.random(n) < 1 / (1 + np.exp(-intercept - slope * terms))).astype(float)
                    _, (low, high) = length_control.length_controlled_win_rate(
                        won, ours, theirs, np.arange(n), num_resamples=400, seed=study
                    )
                    hits += low <= rate <= high
                    plain += won.mean() / num_studies
                rows.append(
                    {"n": n, "rate": rate, "slope": slope, "plain_win_rate": plain, "coverage": hits / num_studies}
                )
    return rows


def calibration_study(num_studies: int) -> list[dict[str, Any]]:
    """Coverage of the calibration error where margins are `factor` times the true log-odds."""

    def margins(rng: np.random.Generator, n: int, factor: float) -> list[float]:
        log_odds = rng.normal(0, 1.5, n)
        signs = np.where(rng.random(n) < 1 / (1 + np.exp(-np.abs(log_odds))), 1.0, -1.0)
        return (signs * factor * np.abs(log_odds)).tolist()

    rows: list[dict[str, Any]] = []
    for factor in (1.0, 1.5, 3.0):
        truth = calibration_error(margins(np.random.default_rng(0), 1_000_000, factor))
        for n in (100, 500):
            hits, plain = 0, 0.0
            for study in range(num_studies):
                found = margins(np.random.default_rng((n, round(10 * factor), study)), n, factor)
                low, high = calibration_interval(found, num_resamples=400, seed=study)
                hits += low <= truth <= high
                plain += calibration_error(found) / num_studies
            rows.append(
                {"n": n, "factor": factor, "truth": truth, "mean_estimate": plain} | {"coverage": hits / num_studies}
            )
    return rows


def judge_study() -> dict[str, Any]:
    """200 comparisons: 10 % of requests fail (500, dropped, timed out), 5 % have no verdict; then the same again."""
    rng = random.Random(0)

    def misbehave(number: int, _: dict[str, Any]) -> str:
        draw = rng.random()
        return ("500", "drop", "timeout")[number % 3] if draw < 0.10 else "malformed" if draw < 0.15 else ""

    matches = [Match(prompt=f"q {k}", ours=f"ours {k}", theirs=f"theirs {k}" + "!" * (k % 2)) for k in range(200)]
    with chat_server(misbehave=misbehave, hang_s=1.5) as server, tempfile.TemporaryDirectory() as folder:
        endpoint = Endpoint(url=server.url, key=None, cache=Path(folder), timeout_s=1.0, num_retries=5)
        judge = LLMJudge(model="local", endpoint=endpoint, template=PROMPTS["helpfulness"], options={}, num_parallel=8)
        started = time.monotonic()
        outcomes, tally = judge.outcomes(matches)
        seconds, sent = time.monotonic() - started, len(server.bodies)
        again, second = judge.outcomes(matches)
        faults = {fault or "none": server.faults.count(fault) for fault in sorted(set(server.faults))}
    assert all(math.isnan(outcome) or outcome == 0.0 for outcome in outcomes)  # theirs is always longer
    return {
        "comparisons": tally.num_comparisons,
        "judged": tally.num_judged,
        "failed": tally.num_failed,
        "requests": tally.num_requests,
        "requests_seen_by_the_server": sent,
        "faults": faults,
        "seconds": seconds,
        "second_run_requests": second.num_requests,
        "second_run_equal": again == outcomes,
    }


STUDIES = {
    "win_rate_coverage": win_rate_coverage,
    "strengths": strengths_study,
    "length_controlled": length_study,
    "calibration_error": calibration_study,
}


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--only", choices=STUDIES, help="measure this again and keep the file's other parts")
    args = parser.parse_args()
    content: dict[str, Any] = json.loads(args.out.read_text()) if args.only else {}
    content["machine"] = {"processor": platform.machine(), "python": platform.python_version(), "numpy": np.__version__}
    content["studies"] = args.studies
    content["llm_judge"] = content.get("llm_judge") or judge_study()
    for name in [args.only] if args.only else STUDIES:
        content[name] = STUDIES[name](args.studies)
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
