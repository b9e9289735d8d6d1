"""A remote reward service: responses posted as JSON, scores back, within a deadline that retries do not extend."""

import ipaddress
import json
import os
import threading
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from hydra_rlhf.config_rewards import HttpSource
from hydra_rlhf.errors import ConfigError, RewardFunctionError
from hydra_rlhf.stages.scoring.outcomes import Outcome, ScoreRequest, all_failed, check_returned

FIRST_WAIT_S = 0.5
"""Before the first retry; doubled before each further one."""
MAX_REPLY_BYTES = 64 * 2**20
"""A longer reply is cut, and then no JSON."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An attempt without scores."""

    reason: str
    may_pass: bool
    """Whether another attempt may do."""


class _NoRedirect(HTTPRedirectHandler):
    """A redirected request would carry the token to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the answer is then an `HTTPError` with the status of the redirection."""


class RewardService:
    """Scores by POST {"prompts", "responses", "columns"} -> {"scores": [...]}; null is a response it cannot score."""

    def __init__(self, config: HttpSource) -> None:
        self.config = config
        self._headers = {"Content-Type": "application/json", "User-Agent": "hydra-rlhf"} | authorization(config)
        # A proxy of the environment is for other machines.
        proxies = [ProxyHandler({})] if is_loopback(config.url) else []
        self._opener = build_opener(_NoRedirect, *proxies)

    def __call__(self, request: ScoreRequest) -> list[Outcome]:
        """The service's scores; all failed where it gives none in time."""
        body = self._body(request)
        deadline = time.monotonic() + self.config.timeout_s
        attempts = self.config.num_retries + 1
        for attempt in range(1, attempts + 1):
            reply = self._post_until(body, deadline)
            if isinstance(reply, dict):
                return check_returned(reply["scores"], request.lengths)
            wait = FIRST_WAIT_S * 2 ** (attempt - 1)
            if not reply.may_pass or attempt == attempts or time.monotonic() + wait >= deadline:
                return all_failed(f"{reply.reason} (attempt {attempt} of {attempts})", len(request.responses))
            time.sleep(wait)
        raise AssertionError("there is at least one attempt")

    def _post_until(self, body: bytes, deadline: float) -> dict[str, Any] | Refusal:
        """One attempt, given up at the deadline.

        In a thread, because a socket's timeout is one of each read: a service that drips would never meet it.
        """
        left = deadline - time.monotonic()
        replies: list[dict[str, Any] | Refusal] = []
        thread = threading.Thread(target=lambda: replies.append(self._post(body, left)), daemon=True)
        thread.start()
        thread.join(max(0.0, left))
        return replies[0] if replies else self._too_slow

    @property
    def _too_slow(self) -> Refusal:
        return Refusal(f"took longer than timeout_s={self.config.timeout_s:g}", True)

    def _post(self, body: bytes, timeout_s: float) -> dict[str, Any] | Refusal:
        """One attempt."""
        request = Request(self.config.url, data=body, headers=self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                reply = response.read(MAX_REPLY_BYTES)
        except HTTPError as error:
            with error:
                return Refusal(f"answered with status {error.code}", error.code == 429 or error.code >= 500)
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError) and reason.errno is None:  # our own limit, a moment before the thread's
                return self._too_slow
            return Refusal(f"cannot be reached: {reason}", True)
        return parse_reply(reply)

    def _body(self, request: ScoreRequest) -> bytes:
        """The request as JSON. Raises `RewardFunctionError` for columns that are not there or have no form in JSON."""
        missing = [name for name in self.config.columns if name not in request.columns]
        if missing:
            raise RewardFunctionError(
                f"the source {self.config.name!r} sends the column {missing[0]!r}, which the data does not have "
                f"(it has: {', '.join(request.columns) or 'none'}); correct its columns"
            )
        columns = {name: request.columns[name] for name in self.config.columns}
        content = {"prompts": request.prompts, "responses": request.responses, "columns": columns}
        try:
            return json.dumps(content, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RewardFunctionError(
                f"the source {self.config.name!r} sends a column that JSON cannot hold: {error}; correct its columns"
            ) from error


def parse_reply(reply: bytes) -> dict[str, Any] | Refusal:
    """The JSON object of a reply, or what is wrong with it."""
    try:
        content = json.loads(reply)
    except (ValueError, RecursionError):
        return Refusal("answered with something that is not JSON", False)
    if not isinstance(content, dict) or "scores" not in content:
        return Refusal('answered without "scores"', False)
    return content


def authorization(config: HttpSource) -> dict[str, str]:
    """The header with the token of `token_env`, if there is one. Raises `ConfigError`."""
    if config.token_env is None:
        return {}
    token = os.environ.get(config.token_env, "").strip()
    if not token:
        raise ConfigError(
            f"token_env={config.token_env} of the source {config.name!r}: there is no such environment variable, or it "
            "is empty; set it before the run, or remove token_env"
        )
    if not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"the value of token_env={config.token_env} is no token: it has characters no header may have"
        )
    if config.url.startswith("http:") and not is_loopback(config.url):
        raise ConfigError(
            f"the source {config.name!r} would send the token of {config.token_env} over an unencrypted connection; "
            "use an https address"
        )
    return {"Authorization": f"Bearer {token}"}


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
