"""The chat client against a real server on 127.0.0.1 that fails in every way a server can."""

import json

import pytest
from chat_server import chat_server

from hydra_rlhf.errors import ConfigError, JudgeError
from hydra_rlhf.runtime import endpoint as endpoint_module
from hydra_rlhf.runtime.endpoint import Endpoint, read_completion, retry_after, wait_before

BODY = {
    "model": "m",
    "messages": [
        {
            "role": "user",
            "content": "[response A]\nlong one\n[end of response A]\n[response B]\nshort\n[end of response B]",
        }
    ],
}


def endpoint(url, folder, *, key=None, retries=3, timeout_s=5.0):
    return Endpoint(url=url, key=key, cache=folder / "cache", timeout_s=timeout_s, num_retries=retries)


def readable(text: str) -> bool:
    return "Verdict" in text


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_S", 0.001)


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "cut", "html", "timeout", "malformed"])
def test_what_may_pass_is_tried_again(fault, tmp_path):
    with chat_server(misbehave=lambda number, _: fault if number < 2 else "", hang_s=0.3) as server:
        reply = endpoint(server.url, tmp_path, timeout_s=0.15 if fault == "timeout" else 5).ask(BODY, readable)
    assert reply.accepted
    assert reply.text.endswith("Verdict: A")
    assert reply.num_requests == len(server.bodies) == 3
    # An unreadable answer was paid for too: three answers then, else one.
    assert reply.prompt_tokens == (300 if fault == "malformed" else 100)
    assert reply.completion_tokens == (30 if fault == "malformed" else 10)


def test_failures_end_after_the_last_attempt_and_are_not_kept(tmp_path):
    with chat_server(misbehave=lambda *_: "500") as server:
        where = endpoint(server.url, tmp_path, retries=2)
        reply = where.ask(BODY, readable)
        assert (reply.accepted, reply.answered, reply.num_requests) == (False, False, 3)
        assert "HTTP 500" in reply.text
        where.ask(BODY, readable)
    assert len(server.bodies) == 6


def test_an_answer_that_cannot_be_read_is_kept_as_such(tmp_path):
    with chat_server(misbehave=lambda *_: "malformed") as server:
        where = endpoint(server.url, tmp_path, retries=1)
        for _ in range(2):
            reply = where.ask(BODY, readable)
            assert (reply.accepted, reply.answered) == (False, True)
    assert len(server.bodies) == 2


def test_answers_are_kept_and_asked_for_once(tmp_path):
    with chat_server() as server:
        where = endpoint(server.url, tmp_path)
        first = where.ask(BODY, readable)
        again = where.ask(BODY, readable)
        assert (first.num_requests, again.num_requests) == (1, 0)
        assert again.text == first.text
        where.ask(BODY | {"temperature": 1}, readable)  # another request
        assert len(server.bodies) == 2
        (file, _) = sorted((tmp_path / "cache").iterdir(), key=lambda f: f.stat().st_mtime_ns)
        for damage in (b"", b"{", b'{"reply": {"text": 3, "accepted": true}}', b'{"reply": {"other": 1}}'):
            file.write_bytes(damage)
            assert where.ask(BODY, readable).num_requests == 1


@pytest.mark.parametrize("status", ["401", "403", "404", "302"])
def test_what_every_request_would_meet_stops_at_once(status, tmp_path):
    with chat_server(misbehave=lambda *_: status) as server, pytest.raises(JudgeError, match=f"HTTP {status}"):
        endpoint(server.url, tmp_path).ask(BODY, readable)
    assert len(server.bodies) == 1


def test_a_request_that_is_refused_is_not_repeated(tmp_path):
    with chat_server(misbehave=lambda *_: "400") as server:
        reply = endpoint(server.url, tmp_path).ask(BODY, readable)
    assert (reply.answered, reply.num_requests, len(server.bodies)) == (False, 1, 1)


def test_the_key_is_sent_and_appears_nowhere(tmp_path):
    key = "sk-do-not-tell-0123456789"
    with chat_server(misbehave=lambda number, _: "400" if number else "") as server:
        where = endpoint(server.url, tmp_path, key=key)
        where.ask(BODY, readable)
        refused = where.ask(BODY | {"n": 1}, readable)
        assert server.headers[0]["Authorization"] == f"Bearer {key}"
        with chat_server(misbehave=lambda *_: "401") as other, pytest.raises(JudgeError) as error:
            endpoint(other.url, tmp_path, key=key).ask(BODY, readable)
    assert "<key>" in refused.text
    assert key not in refused.text + str(error.value)
    assert all(key not in file.read_text() for file in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("url", "key", "words"),
    [
        ("ftp://example.org", None, "is not an address"),
        ("example.org/v1", None, "is not an address"),
        ("https://name:secret@example.org/v1", None, "key belongs in an environment variable"),
        ("https://example.org/v1?key=secret", None, "key belongs in an environment variable"),
        ("http://example.org/v1", "k", "in the clear"),
        ("https://example.org/v1", "k\n", "no HTTP header"),
    ],
)
def test_addresses_that_are_refused(url, key, words, tmp_path):
    with pytest.raises(ConfigError, match=words) as error:
        endpoint(url, tmp_path, key=key)
    assert "secret" not in str(error.value)


def test_waits_double_with_jitter_and_heed_the_server(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_S", 0.5)
    # 0.5 s x 2^attempt x between a half and one; never above 30 s; never below what was asked for.
    assert [wait_before(k, 0.0, 0.0) for k in range(3)] == [0.25, 0.5, 1.0]
    assert wait_before(2, 0.0, 0.5) == 1.5
    assert wait_before(20, 0.0, 1.0) == 30.0
    assert wait_before(0, 7.0, 0.0) == 7.0
    assert [retry_after(value) for value in ("3", "0.5", "1000", None, "soon", "-1", "1e9")] == [3, 0.5, 60, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"choices": []},
        {"choices": [{"message": {"content": None}}]},
        {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}},
    ],
)
def test_other_replies_are_no_completions(content):
    with pytest.raises(endpoint_module.Passing, match="not a chat completion"):
        read_completion(json.dumps(content).encode())


def test_a_completion_without_usage_counts_no_tokens():
    assert read_completion(json.dumps({"choices": [{"message": {"content": "x"}}]}).encode()) == ("x", 0, 0)
