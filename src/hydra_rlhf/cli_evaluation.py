"""The commands that ask whether it got better: `eval` and `compare`. Imports torch only when one of them runs."""

import argparse
import json
from pathlib import Path
from typing import Any

JUDGES = """\
A judge (--judge SPEC, repeatable) is one of
  gold                    the built-in world's true score (data.train=world only)
  reward-head             the run's own reward head (of `compare`: the first run's); dpo and simpo have none
  reward-head:RUN         another run's, with that run's tokenizer and template
  classifier:PATH         a sequence classifier of transformers with its own tokenizer: folder or hub name, safetensors
                          only. Options: join=template|pair|text (how prompt and response become one input; default:
                          its chat template, else one text), label=N (which output, where there are several),
                          device=auto
  rule:module:function    a Python function (prompts, responses, **columns) -> one number per response; the folder you
                          start in is searched
  llm:MODEL@URL           a model behind an OpenAI-compatible endpoint, e.g. llm:my-model@http://127.0.0.1:8000/v1.
                          Every pair is asked in both orders; disagreement is a tie. Options: prompt=helpfulness,
                          summary or a file with {prompt}, {response_a}, {response_b}; parallel=8 requests;
                          retries=5; timeout=60 seconds; temperature=0 and max-tokens=512 (`default` leaves either
                          out); cache=FOLDER of answers (default: judge_cache in the first run's folder);
                          key=NAME of the environment variable that holds the key (default: HYDRA_RLHF_JUDGE_KEY)
Options follow a spec as ,name=value: llm:my-model@https://example.org/v1,prompt=summary,parallel=4
Without --judge: gold where there is one, and the reward head. A tie counts half; intervals are 95 %.
"""
RUN = "run folder, e.g. runs/quick"
COMPARE = """\
Every run's actor answers each prompt once, the start (the reference) too, and every judge compares everybody with
everybody. Runs that differ in nothing but their seed are one player; LABEL=RUN puts all runs of a label together.
Runs that hold out different prompts are refused.
"""


def add_evaluation_commands(commands: Any) -> None:
    """`eval` and `compare` with their arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    text = "held-out numbers of a run, with confidence intervals"
    command = commands.add_parser("eval", help=text, description=text, epilog=JUDGES, formatter_class=raw)
    command.add_argument("run", type=Path, help=RUN)
    add_checkpoint_option(command)
    command.add_argument(
        "--num-prompts", type=positive_int, default=None, help="held-out prompts (default: the recipe's number)"
    )
    add_judge_options(command)
    command.set_defaults(command=evaluate)
    text = "runs side by side on the same held-out prompts: win rates, strengths, a report"
    about = f"{text}.\n\n{COMPARE}"
    command = commands.add_parser("compare", help=text, description=about, epilog=JUDGES, formatter_class=raw)
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or LABEL=RUN")
    add_checkpoint_option(command)
    command.add_argument(
        "--num-prompts", type=positive_int, default=None, help="held-out prompts (default: the first recipe's number)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the samples and of the bootstrap (default: 0)")
    command.add_argument(
        "--json",
        type=Path,
        default=Path("compare.json"),
        metavar="FILE",
        help="where the numbers go; the report goes beside it as .md and .html (default: compare.json)",
    )
    add_judge_options(command)
    command.set_defaults(command=compare)


def add_checkpoint_option(command: argparse.ArgumentParser) -> None:
    """`--checkpoint`: which policy of a finished run."""
    command.add_argument(
        "--checkpoint",
        type=checkpoint_name,
        default="last",
        metavar="WHICH",
        help="policy to take: last (default), best by its held-out score, or the number of a PPO step whose checkpoint "
        "is still there",
    )


def add_trust_option(command: argparse.ArgumentParser) -> None:
    """`--trust-remote-code`: models' own code runs only where the command says so, never because a file does."""
    command.add_argument(
        "--trust-remote-code", action="store_true", help="let the model's repository run its own Python code"
    )


def add_judge_options(command: argparse.ArgumentParser) -> None:
    """What both commands may be asked for."""
    command.add_argument("--judge", action="append", default=[], metavar="SPEC", help="who judges; see below")
    command.add_argument(
        "--best-of",
        type=positive_int,
        default=None,
        metavar="N",
        help="a further player: the best of N samples of the start, by the reward head of the first run with one",
    )
    command.add_argument(
        "--rouge", action="store_true", help="ROUGE against the chosen responses (needs the `eval` extra)"
    )
    add_trust_option(command)


def positive_int(text: str) -> int:
    """An integer above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def checkpoint_name(text: str) -> str:
    """`last`, `best` or the number of a PPO step, for argparse."""
    if text not in ("last", "best") and not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither last nor best nor the number of a PPO step")
    return text


def evaluate(args: argparse.Namespace) -> None:
    """`eval`: measure a run again; writes evaluation-<checkpoint>.json beside its summary."""
    from hydra_rlhf.evaluation.evaluate import evaluate_again
    from hydra_rlhf.reporting.comparison import print_judges
    from hydra_rlhf.reporting.console import print_numbers

    numbers, file = evaluate_again(
        args.run,
        checkpoint=args.checkpoint,
        num_prompts=args.num_prompts,
        judges=args.judge,
        best_of=args.best_of,
        with_rouge=args.rouge,
        trust_remote_code=args.trust_remote_code,
    )
    print_numbers(numbers)
    print_judges(numbers.get("players", []), numbers.get("judges", []))
    print(f"written to {file}")


def compare(args: argparse.Namespace) -> None:
    """`compare`: a round robin over runs; writes compare.json, compare.md and compare.html."""
    from hydra_rlhf.evaluation.compare import compare_runs
    from hydra_rlhf.reporting.comparison import print_judges, write_comparison

    check_output(args.json)
    comparison = compare_runs(
        args.runs,
        judges=args.judge,
        num_prompts=args.num_prompts,
        checkpoint=args.checkpoint,
        best_of=args.best_of,
        seed=args.seed,
        with_rouge=args.rouge,
        trust_remote_code=args.trust_remote_code,
    )
    page = write_comparison(comparison, args.json)
    print_judges([player["name"] for player in comparison["players"]], comparison["judges"])
    print(f"numbers {args.json}\nreport  {page}")


def check_output(file: Path) -> None:
    """Raise `ConfigError` for a file that cannot be the result's, before hours of work are done for it."""
    from hydra_rlhf.errors import ConfigError

    if file.suffix != ".json" or file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"--json {file}: name a file that ends in .json, in a folder that exists")
    if file.exists():
        try:
            is_ours = isinstance(json.loads(file.read_bytes()), dict) and "players" in json.loads(file.read_bytes())
        except (OSError, ValueError):
            is_ours = False
        if not is_ours:
            raise ConfigError(f"--json {file} is there and is no earlier comparison; name another file")
