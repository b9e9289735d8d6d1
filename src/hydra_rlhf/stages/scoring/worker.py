"""The process of an isolated reward function: JSON lines in, JSON lines out, and nothing else in between.

    python -m hydra_rlhf.stages.scoring.worker module:function

Started by `isolated.py`. The pipes are taken away from the function first: what it prints goes nowhere.
"""

import json
import os
import queue
import sys
import threading
from dataclasses import asdict
from typing import BinaryIO

from hydra_rlhf.errors import ConfigError
from hydra_rlhf.stages.reward_fn import call_reward_fn, import_function, names_taken
from hydra_rlhf.stages.scoring.outcomes import Failure, Outcome, ScoreRequest


def main(name: str) -> None:
    """Say whether the function is there, then answer requests until stdin ends."""
    requests, answers = take_pipes()
    try:
        function = import_function(name, setting=f"function={name!r}")
    except ConfigError as error:
        say(answers, {"error": str(error)})
        return
    say(answers, {"ready": os.getpid(), "takes": names_taken(function)})
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(requests, waiting), daemon=True).start()
    while True:
        request = ScoreRequest(**json.loads(waiting.get()))
        say(answers, {"outcomes": [as_json(outcome) for outcome in call_reward_fn(function, request)]})


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the training process, which stdin and stdout then no longer are, for this process's children too."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    return requests, answers


def listen(requests: BinaryIO, waiting: "queue.SimpleQueue[bytes]") -> None:
    """Queue requests; end the process when the training process has gone, also while the function is running."""
    for line in requests:
        waiting.put(line)
    os._exit(0)


def as_json(outcome: Outcome) -> object:
    """An outcome as JSON."""
    return asdict(outcome) if isinstance(outcome, Failure) else outcome


def say(answers: BinaryIO, message: dict[str, object]) -> None:
    """Write one line."""
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
