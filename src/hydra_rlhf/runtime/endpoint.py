"""A thin client for OpenAI-compatible chat endpoints: one POST, retries with back-off and jitter, answers kept on disk.

On the standard library: the HTTP client that the hub library brings along has changed its name between the versions
this package supports, and one JSON request needs none of its features. Keys come from the environment, are sent to the
one given address (no redirect is followed, for the key would go along) and are cut out of every message.
"""

import hashlib
import http.client
import ipaddress
import json
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra_rlhf.errors import ConfigError, JudgeError
from hydra_rlhf.runtime.files import clear_write_errors, write_file

MAX_REPLY_BYTES = 4_000_000
"""A longer body is not read to its end."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Waits between attempts double from the first to the longest."""
RETRIED = {408, 409, 425, 429}
"""Client errors that may pass; so may all of 500 and above."""
FATAL = {401, 403, 404, 405}
"""A wrong key, model or address: the same for every request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came of one request."""

    text: str
    """The model's words; of a failed request the reason."""
    accepted: bool
    """Whether it could be read as asked."""
    prompt_tokens: int = 0
    """Tokens read, as the endpoint counts them, over all attempts that were answered."""
    completion_tokens: int = 0
    """Tokens written."""
    num_requests: int = 0
    """Requests sent for it; 0 where it came from the cache."""
    answered: bool = True
    """Whether the endpoint gave any reply of a model; a reply that cannot be read is one."""


class Passing(Exception):  # noqa: N818 (caught inside this module)
    """An attempt failed in a way that another one may not."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        """What the endpoint asked for (Retry-After)."""


class Refused(Exception):  # noqa: N818 (caught inside this module)
    """This one request is refused, and would be again."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect an error."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """None of them."""
        del req, fp, code, msg, headers, newurl


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where requests go, and how patiently."""

    url: str
    """Base address, e.g. http://127.0.0.1:8000/v1."""
    key: str | None
    """Sent as a bearer token."""
    cache: Path
    """Folder of answers, a file each."""
    timeout_s: float
    """Longest time for one attempt, its whole body included."""
    num_retries: int
    """Further attempts after the first."""

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is not an address such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"the address on {parts.hostname} has more than scheme, host, port and path; a key belongs in an "
                "environment variable (key=NAME), since addresses are written to results"
            )
        if self.key and parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ConfigError(f"{self.url}: a key is not sent in the clear; use https, or unset the key's variable")
        if self.key and not re.fullmatch(r"[\x21-\x7e]+", self.key):
            raise ConfigError("the judge's key has characters that no HTTP header can hold (a line break?); check it")

    def ask(self, body: Mapping[str, Any], is_readable: Callable[[str], bool]) -> Reply:
        """The answer to one request: from the cache, or asked for until one is readable or all attempts are used up.

        An unreadable last answer is kept too, so that asking again costs nothing; failures of the way there are not.
        Raises `JudgeError` where every request would fail alike.
        """
        file = self.cache / f"{self.name_of(body)}.json"
        known = read_reply(file)
        if known is not None:
            return known
        reply = self.ask_endpoint(body, is_readable)
        if reply.answered:
            with clear_write_errors(file):
                self.cache.mkdir(parents=True, exist_ok=True)
                write_file(file, json.dumps({"request": body, "reply": asdict(reply)}, indent=1).encode())
        return reply

    def name_of(self, body: Mapping[str, Any]) -> str:
        """The name an answer is kept under: a hash of address and request."""
        return hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()

    def ask_endpoint(self, body: Mapping[str, Any], is_readable: Callable[[str], bool]) -> Reply:
        """The attempts themselves, with waits between them; tokens of unreadable answers are counted too."""
        prompt_tokens, completion_tokens, unreadable, reason = 0, 0, None, ""
        for attempt in range(self.num_retries + 1):
            asked_wait_s = 0.0
            try:
                text, read, written = self.post(body)
            except Passing as error:
                reason, asked_wait_s = str(error), error.wait_s
            except Refused as error:
                return Reply(text=str(error), accepted=False, num_requests=attempt + 1, answered=False)
            else:
                prompt_tokens, completion_tokens = prompt_tokens + read, completion_tokens + written
                if is_readable(text):
                    return Reply(
                        text=text,
                        accepted=True,
                        prompt_tokens=prompt_tokens,
                        completion_tokens=completion_tokens,
                        num_requests=attempt + 1,
                    )
                unreadable, reason = text, "the answer cannot be read"
            if attempt < self.num_retries:
                time.sleep(wait_before(attempt, asked_wait_s, random.random()))
        return Reply(
            text=reason if unreadable is None else unreadable,
            accepted=False,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            num_requests=self.num_retries + 1,
            answered=unreadable is not None,
        )

    def post(self, body: Mapping[str, Any]) -> tuple[str, int, int]:
        """One attempt: (text, prompt tokens, completion tokens). Raises `Passing`, `Refused` or `JudgeError`."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "hydra-rlhf"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        host = urllib.parse.urlsplit(self.url).hostname or ""
        proxies = [urllib.request.ProxyHandler({})] if is_loopback(host) else []  # none stands before this machine
        opener = urllib.request.build_opener(NoRedirect, *proxies)
        deadline = time.monotonic() + self.timeout_s
        try:
            with opener.open(request, timeout=self.timeout_s) as response:
                content = read_until(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                self.raise_status(error)
        except (OSError, http.client.HTTPException) as error:  # timeouts, refusals, cut connections
            raise Passing(self.hide_key(f"{type(error).__name__}: {error}")) from error
        text, read, written = read_completion(content)
        return self.hide_key(text), read, written

    def raise_status(self, error: urllib.error.HTTPError) -> NoReturn:
        """Turn an HTTP status into `Passing`, `Refused` or `JudgeError`."""
        try:
            said = error.read(2000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        words = self.hide_key(f"HTTP {error.code} from {self.url}: {' '.join(said.split())[:200]}")
        if error.code in FATAL or 300 <= error.code < 400:
            raise JudgeError(f"{words}; check the judge's address, model name and key") from None
        if error.code in RETRIED or error.code >= 500:
            raise Passing(words, retry_after(error.headers.get("Retry-After"))) from None
        raise Refused(words) from None

    def hide_key(self, text: str) -> str:
        """Text without the key, which some servers repeat."""
        return text.replace(self.key, "<key>") if self.key else text


def wait_before(attempt: int, asked_s: float, chance: float) -> float:
    """Seconds before the attempt after number `attempt` (from 0): doubling, times 0.5 to 1 by `chance` in [0, 1), so
    that requests which failed together do not come back together; at least what the endpoint asked for."""
    return max(asked_s, min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * (0.5 + chance / 2))


def retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, at most a minute; 0 for none, a date or nonsense."""
    return min(float(value), 60.0) if value is not None and re.fullmatch(r"\d{1,6}(\.\d+)?", value) else 0.0


def read_until(response: Any, deadline: float) -> bytes:
    """The body, as long as it comes before the deadline: a server that drips would else hold a request for ever."""
    parts: list[bytes] = []
    while part := response.read1(65536):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer took too long")
        if sum(map(len, parts)) > MAX_REPLY_BYTES:
            raise Passing(f"the answer is longer than {MAX_REPLY_BYTES} bytes")
    if response.length:  # of the announced bytes, those that never came
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def read_completion(content: bytes) -> tuple[str, int, int]:
    """(text, prompt tokens, completion tokens) of a chat completion; raises `Passing` for anything else."""
    try:
        found = json.loads(content)
        text = found["choices"][0]["message"]["content"]
        usage = found.get("usage") or {}
        counts = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Passing("the endpoint's reply is not a chat completion") from None
    if not isinstance(text, str) or not all(isinstance(count, int) for count in counts):
        raise Passing("the endpoint's reply is not a chat completion with text")
    return text, counts[0], counts[1]


def read_reply(file: Path) -> Reply | None:
    """An answer from the cache; None where there is none, or its file is damaged."""
    try:
        kept = json.loads(file.read_bytes())["reply"]
        reply = Reply(**{**kept, "num_requests": 0})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = isinstance(reply.text, str) and isinstance(reply.accepted, bool)
    return reply if whole and all(isinstance(n, int) for n in (reply.prompt_tokens, reply.completion_tokens)) else None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
