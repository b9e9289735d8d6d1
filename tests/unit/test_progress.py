import io

from rich.console import Console

from hydra_rlhf.runtime.progress import Progress


class Clock:
    """A clock that tests move by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(num_steps: int, done: int = 0) -> tuple[Progress, Clock, io.StringIO]:
    stream, clock = io.StringIO(), Clock()
    return Progress("ppo", num_steps, done=done, console=Console(file=stream, width=40), clock=clock), clock, stream


def test_a_plain_line_has_stage_step_time_left_speed_and_numbers():
    progress, clock, stream = plain(10)
    with progress:
        clock.now = 90.0
        progress.advance(45_000, {"score": 1.23456, "KL": -0.5})
    # Nine more steps of 90 s are 810 s; 45,000 tokens in 90 s are 500 a second.
    assert stream.getvalue() == "ppo 1/10  0:13:30 left  500 tokens/s  score 1.23  KL -0.5\n"


def test_fast_stages_write_a_line_at_each_tenth_and_at_the_last_step():
    progress, clock, stream = plain(95)
    with progress:
        for _ in range(95):
            clock.now += 0.001
            progress.advance(1, {})
    steps = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert steps == [f"{step}/95" for step in (10, 19, 29, 38, 48, 57, 67, 76, 86, 95)]


def test_slow_stages_write_a_line_every_five_seconds():
    progress, clock, stream = plain(1000)
    with progress:
        for _ in range(12):
            clock.now += 2.0
            progress.advance(1, {})
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["3/1000", "6/1000", "9/1000", "12/1000"]


def test_steps_of_an_earlier_process_do_not_count_towards_the_speed():
    progress, clock, stream = plain(10, done=8)
    with progress:
        clock.now = 60.0
        progress.advance(60, {})
    assert stream.getvalue() == "ppo 9/10  0:01:00 left  1 tokens/s\n"


def test_on_a_terminal_it_is_a_bar_and_prints_stay_where_they_belong(capsys):
    stream = io.StringIO()
    with Progress("hydra_sft", 2, console=Console(file=stream, force_terminal=True, width=120)) as progress:
        progress.advance(10, {"loss": 0.25})
        print("a sample")
        progress.advance(10, {"loss": 0.125})
    shown = stream.getvalue()
    assert "hydra_sft" in shown
    assert "2/2" in shown
    assert "loss 0.125" in shown
    assert "tokens/s" in shown
    assert capsys.readouterr().out == "a sample\n"


def test_it_writes_to_stderr(capsys):
    with Progress("ppo", 1) as progress:
        progress.advance(1, {})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ppo 1/1")
