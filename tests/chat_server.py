"""An OpenAI-compatible chat endpoint on 127.0.0.1 that judges by a rule and misbehaves on demand."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Misbehave = Callable[[int, dict[str, Any]], str]
"""(number of the request from 0, its body) -> "", "500", "429", "timeout", "drop", "cut", "malformed", "html", or a
status such as "401"."""


def between(text: str, name: str) -> str:
    """What a judge's prompt holds between the marks of `name`."""
    return text.split(f"[{name}]\n", 1)[1].split(f"\n[end of {name}]", 1)[0]


def longer_is_better(content: str) -> str:
    """A verdict: the longer response, whatever its place."""
    a, b = (len(between(content, f"response {name}")) for name in "AB")
    return "A" if a > b else "B" if b > a else "tie"


class ChatServer:
    """What was asked of the server, and how it answers."""

    def __init__(self, verdict: Callable[[str], str], misbehave: Misbehave, hang_s: float) -> None:
        self.verdict, self.misbehave, self.hang_s = verdict, misbehave, hang_s
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[str] = []
        self.lock = threading.Lock()
        self.url = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """One POST."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            fault = self.misbehave(len(self.bodies), body)
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.faults.append(fault)
        text = f"Both have merits.\nVerdict: {self.verdict(body['messages'][0]['content'])}"
        if fault == "timeout":
            time.sleep(self.hang_s)
        if fault in ("drop", "timeout"):
            handler.connection.close()
            return
        if fault == "malformed":
            text = "Both are fine, I could not say which."
        content = json.dumps(
            {
                "choices": [{"message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            }
        ).encode()
        status = int(fault) if fault.isdigit() else 200
        if status != 200:
            content = f"the key was {handler.headers.get('Authorization')}".encode()
        if fault == "html":
            content = b"<html>busy</html>"
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        if status in (301, 302):
            handler.send_header("Location", "http://127.0.0.1:9/elsewhere")
        if status == 429:
            handler.send_header("Retry-After", "0.05")
        handler.end_headers()
        handler.wfile.write(content[:20] if fault == "cut" else content)


@contextmanager
def chat_server(
    verdict: Callable[[str], str] = longer_is_better,
    misbehave: Misbehave = lambda *_: "",
    hang_s: float = 1.0,
) -> Iterator[ChatServer]:
    """The server, listening on a free port for as long as the block lasts."""
    chat = ChatServer(verdict, misbehave, hang_s)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with suppress(OSError):  # the client has gone away, after its own timeout
                chat.handle(self)

        def log_message(self, *args: Any) -> None:
            del args

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def shutdown_request(self, request: Any) -> None:
            with suppress(OSError):  # closed already, on purpose
                super().shutdown_request(request)

        def handle_error(self, request: Any, client_address: Any) -> None:
            del request, client_address  # of connections cut on purpose

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
