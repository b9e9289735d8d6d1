"""A reward function in its own process: what it may do, how long that takes, and what comes after it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydra_rlhf.errors import ConfigError, RewardFunctionError
from hydra_rlhf.stages.scoring import isolated
from hydra_rlhf.stages.scoring.isolated import IsolatedFunction
from hydra_rlhf.stages.scoring.outcomes import Failure, ScoreRequest

TIMEOUT_S = 0.5
FUNCTIONS = """
import os, subprocess, sys, time

calls = 0

def lengths(prompts, responses, response_ids):
    return [float(len(ids)) for ids in response_ids]

def per_token(prompts, responses, response_ids):
    return [[1.0] * len(ids) for ids in response_ids]

def anything(prompts, responses, **columns):
    return [float(len(columns)) + columns["source"][i] for i in range(len(responses))]

def bad_values(prompts, responses):
    return [float("nan"), None]

def too_few(prompts, responses):
    return [1.0]

def raises(prompts, responses):
    raise LookupError("no such thing")

def leaves(prompts, responses):
    sys.exit(5)

def ends(prompts, responses):
    os._exit(3)

def sleeps(prompts, responses):
    time.sleep(1e6)

def spins(prompts, responses):
    while True:
        pass

def has_children(prompts, responses):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
    print(os.getpid(), file=open("pid", "w"))
    time.sleep(1e6)

def floods(prompts, responses):
    for _ in range(100):
        os.write(1, b"x" * 65536)
        print("y" * 65536, file=sys.stderr)
    return [1.0] * len(responses)

def sometimes(prompts, responses):
    global calls
    calls += 1
    if responses[0] == "hang":
        time.sleep(1e6)
    return [float(calls)] * len(responses)

def takes_a_date(prompts, responses, day):
    return [0.0] * len(responses)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "isolated_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def start() -> Iterator[object]:
    """Starts functions and ends them."""
    started: list[IsolatedFunction] = []

    def make(name: str, timeout_s: float | None = TIMEOUT_S) -> IsolatedFunction:
        function = IsolatedFunction(f"isolated_functions:{name}", timeout_s=timeout_s)
        started.append(function)
        function.wait_until_ready()
        return function

    yield make
    for function in started:
        function.close()


def request(first="one", **columns):
    return ScoreRequest(
        prompts=["a", "b"],
        originals=["a", "b"],
        responses=[first, "two"],
        response_ids=[[1, 2, 3], [4]],
        columns={"source": [0.5, 0.25]} | columns,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lengths", [3.0, 1.0]),
        ("per_token", [[1.0, 1.0, 1.0], [1.0]]),
        ("anything", [2.5, 2.25]),
        ("floods", [1.0, 1.0]),
    ],
)
def test_scores_come_back(name, expected, start, capfd):
    """`anything` gets two columns: `source` and `response_ids`. What `floods` prints goes nowhere."""
    function = start(name, timeout_s=30.0)
    assert function(request()) == expected
    assert function(request()) == expected
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bad_values", "returned nan; a finite number of at most 1e15 is needed"),
        ("too_few", "returned 1 values for 2 responses"),
        ("raises", "raised LookupError: no such thing"),
        ("leaves", "raised SystemExit: 5"),
        ("ends", "ended its process (exit code 3)"),
    ],
)
def test_failures_come_back(name, reason, start):
    function = start(name, timeout_s=30.0)
    for _ in range(2):
        found = function(request())
        assert all(isinstance(outcome, Failure) for outcome in found)
        assert found[0] == Failure(reason)


@pytest.mark.parametrize("name", ["sleeps", "spins"])
def test_a_call_that_hangs_takes_its_timeout_and_a_tenth_at_most(name, start):
    function = start(name, timeout_s=1.0)
    began = time.monotonic()
    assert function(request()) == [Failure("took longer than timeout_s=1")] * 2
    assert 1.0 <= time.monotonic() - began <= 1.1


def test_after_a_hang_the_function_runs_again_in_a_new_process(start):
    function = start("sometimes")
    assert function(request()) == [1.0, 1.0]
    assert function(request()) == [2.0, 2.0]
    assert isinstance(function(request("hang"))[0], Failure)
    assert function(request()) == [1.0, 1.0], "nothing of the killed process is left"


def test_what_the_function_has_started_is_killed_with_it(start, tmp_path):
    function = start("has_children")
    assert isinstance(function(request())[0], Failure)
    group = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not members(group):
            break
        time.sleep(0.02)
    assert not members(group)


def members(group: int) -> list[str]:
    """Living processes of a group."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(status.parent.name)
    return found


def test_the_process_ends_with_ours(start):
    """Its stdin ends: it goes, also in the middle of a call."""
    function = start("sleeps")
    process = function._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.write(isolated.as_line(request(), {}, "sleeps"))
    process.stdin.close()
    assert process.wait(timeout=10) == 0


def test_a_request_larger_than_the_pipe_is_sent_whole(start):
    function = start("lengths", timeout_s=30.0)
    large = ScoreRequest(
        prompts=["p" * 300_000] * 2, originals=["", ""], responses=["r"] * 2, response_ids=[[1]] * 2, columns={}
    )
    assert function(large) == [1.0, 1.0]


def test_columns_that_cannot_be_sent_are_named_only_where_the_function_takes_them(start):
    import datetime

    day = [datetime.date(2024, 1, 1)] * 2
    assert start("lengths", timeout_s=30.0)(request(day=day)) == [3.0, 1.0]
    with pytest.raises(RewardFunctionError, match=r"isolated_functions:takes_a_date.*not JSON serializable"):
        start("takes_a_date")(request(day=day))


def test_a_function_that_is_not_there_is_told_when_it_is_opened():
    for name, message in (
        ("isolated_functions:none", "cannot be imported"),
        ("x", "is not of the form module:function"),
    ):
        function = IsolatedFunction(name, timeout_s=None)
        with pytest.raises(ConfigError, match=message):
            function.wait_until_ready()
        function.close()


def test_a_module_that_ends_its_process_is_told_when_it_is_opened(tmp_path):
    (tmp_path / "ends_at_once.py").write_text("import os\nos._exit(7)\n")
    function = IsolatedFunction("ends_at_once:f", timeout_s=None)
    with pytest.raises(ConfigError, match=r"did not start: it ended its process \(exit code 7\)"):
        function.wait_until_ready()


def test_the_working_folder_is_searched_as_for_other_functions(start):
    assert os.getcwd() not in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    assert start("lengths", timeout_s=30.0)(request()) == [3.0, 1.0]
