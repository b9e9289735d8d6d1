"""A reward service on this machine: what is sent, what may come back, retries, deadlines, and where the token goes."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hydra_rlhf.config_rewards import HttpSource
from hydra_rlhf.errors import ConfigError, RewardFunctionError
from hydra_rlhf.stages.scoring import service
from hydra_rlhf.stages.scoring.outcomes import Failure, ScoreRequest

TOKEN = "sesame-0123456789"
Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def give(status: int, content: Any, **headers: str) -> Answer:
    """Answer with a status and JSON (or bytes as they are)."""

    def answer(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def lengths(handler: BaseHTTPRequestHandler, sent: dict[str, Any]) -> None:
    give(200, {"scores": [len(text) for text in sent["responses"]]})(handler, sent)


def hang(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    handler.server.gone.wait(20)  # pyright: ignore[reportAttributeAccessIssue]


def drip(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    """A byte now and then: each of them comes in time, the answer never does."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not handler.server.gone.wait(0.05):  # pyright: ignore[reportAttributeAccessIssue]
        try:
            handler.wfile.write(b" ")
        except OSError:
            return


class Server(ThreadingHTTPServer):
    """Gives its answers one after the other, the last one again and again."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = [lengths]
        self.seen: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.gone = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((sent, dict(self.headers)))
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self, sent)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests look at what is printed."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there: a proxy must not be asked
    monkeypatch.setattr(service, "FIRST_WAIT_S", 0.01)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.gone.set()
        running.shutdown()
        thread.join()


def source(server: Server, **settings: Any) -> HttpSource:
    return HttpSource(name="judge", kind="http", **({"url": server.url, "timeout_s": 10.0} | settings))


REQUEST = ScoreRequest(
    prompts=["<user>a", "<user>b"],
    originals=["a", "b"],
    responses=["one", "three"],
    response_ids=[[1], [2]],
    columns={"answer": [4, None], "secret": ["x", "y"], "day": [float("nan"), 1.0], "object": [object(), object()]},
)


def test_request_and_reply(server: Server) -> None:
    assert service.RewardService(source(server, columns=("answer",)))(REQUEST) == [3.0, 5.0]
    ((sent, headers),) = server.seen
    assert sent == {"prompts": ["<user>a", "<user>b"], "responses": ["one", "three"], "columns": {"answer": [4, None]}}
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (give(200, {"scores": [1, None]}), [1.0, Failure("returned None, not a number")]),
        (give(200, b'{"scores": [NaN, 2]}'), [Failure("returned nan; a finite number of at most 1e15 is needed"), 2.0]),
        (give(200, {"scores": [1]}), [Failure("returned 1 values for 2 responses")] * 2),
        (give(200, {"scores": "12"}), [Failure("returned '12', not a list of scores")] * 2),
        (give(200, {"score": [1, 2]}), [Failure('answered without "scores" (attempt 1 of 3)')] * 2),
        (give(200, [1, 2]), [Failure('answered without "scores" (attempt 1 of 3)')] * 2),
        (give(200, b"<html>"), [Failure("answered with something that is not JSON (attempt 1 of 3)")] * 2),
        (give(200, b"[" * 100_000), [Failure("answered with something that is not JSON (attempt 1 of 3)")] * 2),
        (give(404, {}), [Failure("answered with status 404 (attempt 1 of 3)")] * 2),
        (give(500, {}), [Failure("answered with status 500 (attempt 3 of 3)")] * 2),
    ],
)
def test_what_a_service_may_answer(answer: Answer, expected: list[Any], server: Server) -> None:
    server.answers = [answer]
    assert service.RewardService(source(server))(REQUEST) == expected


@pytest.mark.parametrize("status", [429, 500, 503])
def test_failures_that_may_pass_are_tried_again(status: int, server: Server) -> None:
    server.answers = [give(status, {}), give(status, {}), lengths]
    assert service.RewardService(source(server))(REQUEST) == [3.0, 5.0]
    assert len(server.seen) == 3
    server.answers = [give(status, {}), give(status, {}), lengths]
    once = service.RewardService(source(server, num_retries=1))(REQUEST)
    assert once == [Failure(f"answered with status {status} (attempt 2 of 2)")] * 2


def test_waits_double_between_attempts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(service.time, "sleep", waits.append)
    server.answers = [give(500, {})]
    service.RewardService(source(server, num_retries=3))(REQUEST)
    assert waits == [0.01, 0.02, 0.04]


@pytest.mark.parametrize("answer", [hang, drip], ids=["hangs", "drips"])
def test_the_deadline_covers_retries_and_slow_replies(answer: Answer, server: Server) -> None:
    server.answers = [answer]
    began = time.monotonic()
    found = service.RewardService(source(server, timeout_s=1.0, num_retries=5))(REQUEST)
    assert 1.0 <= time.monotonic() - began <= 1.1
    assert found == [Failure("took longer than timeout_s=1 (attempt 1 of 6)")] * 2


def test_no_attempt_begins_after_the_deadline(server: Server) -> None:
    """0.01 s + 0.02 s + 0.04 s + 0.08 s + 0.16 s of waiting fit into 0.35 s, another 0.32 s do not."""
    server.answers = [give(500, {})]
    began = time.monotonic()
    service.RewardService(source(server, timeout_s=0.35, num_retries=50))(REQUEST)
    assert time.monotonic() - began <= 0.35
    assert len(server.seen) <= 6


def test_a_service_that_is_not_there(server: Server) -> None:
    config = source(server, url="http://127.0.0.1:9/score", num_retries=1)
    (first, second) = service.RewardService(config)(REQUEST)
    assert first == second
    assert isinstance(first, Failure)
    assert first.reason.startswith("cannot be reached: ")
    assert first.reason.endswith("(attempt 2 of 2)")


def test_the_token_comes_from_the_environment_and_goes_into_the_header_only(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = source(server, token_env="JUDGE_TOKEN")
    with pytest.raises(ConfigError, match="token_env=JUDGE_TOKEN"):
        service.RewardService(config)
    monkeypatch.setenv("JUDGE_TOKEN", f"{TOKEN}\n")
    asked = service.RewardService(config)
    assert asked(REQUEST) == [3.0, 5.0]
    assert server.seen[0][1]["Authorization"] == f"Bearer {TOKEN}"
    server.answers = [give(403, {"you sent": TOKEN})]
    assert TOKEN not in repr((asked(REQUEST), config))
    assert TOKEN not in "".join(capfd.readouterr())
    monkeypatch.setenv("JUDGE_TOKEN", "two\nlines")
    with pytest.raises(ConfigError, match="is no token") as refused:
        service.RewardService(config)
    assert "two" not in str(refused.value)


def test_a_redirect_is_not_followed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would carry the token along."""
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    server.answers = [give(307, {}, Location=server.url), lengths]
    found = service.RewardService(source(server, token_env="JUDGE_TOKEN"))(REQUEST)
    assert found == [Failure("answered with status 307 (attempt 1 of 3)")] * 2
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("url", "is_sent"),
    [
        ("http://localhost:8000/score", True),
        ("http://[::1]:8000/score", True),
        ("https://judge.example.org/score", True),
        ("http://judge.example.org/score", False),
        ("http://10.0.0.1/score", False),
    ],
)
def test_a_token_goes_unencrypted_to_this_machine_only(
    url: str, is_sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    config = HttpSource(name="judge", kind="http", url=url, token_env="JUDGE_TOKEN")
    if is_sent:
        assert service.authorization(config) == {"Authorization": f"Bearer {TOKEN}"}
    else:
        with pytest.raises(ConfigError, match="unencrypted"):
            service.authorization(config)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "nothing",
            r"sends the column 'nothing', which the data does not have \(it has: answer, secret, day, object\)",
        ),
        ("object", "JSON cannot hold"),
        ("day", "JSON cannot hold"),
    ],
)
def test_columns_that_cannot_be_sent(column: str, message: str, server: Server) -> None:
    with pytest.raises(RewardFunctionError, match=message):
        service.RewardService(source(server, columns=(column,)))(REQUEST)
    assert server.seen == []
