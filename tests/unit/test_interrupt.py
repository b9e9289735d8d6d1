import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hydra_rlhf.errors import Interrupted
from hydra_rlhf.runtime.interrupt import StopRequest

WORKER = """
import sys, time
from hydra_rlhf.errors import Interrupted
from hydra_rlhf.runtime.interrupt import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.01)
            if sys.argv[1] == "polite":
                stop.check()
    except Interrupted as error:
        print("left", flush=True)
        sys.exit(error.exit_code)
"""


def stopped_worker(kind: str, *signals: int) -> tuple[int, str]:
    """Exit code and output of a worker that gets `signals`."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    for number in signals:
        worker.send_signal(number)
        time.sleep(0.2)
    output, _ = worker.communicate(timeout=20)
    return worker.returncode, output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_leaves_at_the_next_check(number, code):
    assert stopped_worker("polite", number) == (code, "left\n")


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM, signal.SIGTERM), 143),
        ((signal.SIGINT, signal.SIGTERM), 143),
    ],
)
def test_second_signal_ends_the_process_at_once(signals, code):
    # This worker never checks, so only the second signal can end it.
    assert stopped_worker("deaf", *signals) == (code, "")


def test_flag_check_and_handlers_restored(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        stop.check()
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        for _ in range(2):
            with pytest.raises(Interrupted, match="signal 15") as caught:
                stop.check()
            assert caught.value.exit_code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "next safe point" in capfd.readouterr().err


def test_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def fail() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert seen != [before]
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_the_main_thread_it_changes_nothing():
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def enter() -> None:
        with StopRequest() as stop:
            stop.check()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
