"""An OpenAI-compatible server's completions, by HTTP: its models, and answers as they arrive.

Redirects are not followed, and proxies not used: the key goes to the address that the user wrote or nowhere.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from minitron.errors import InputError, MinitronError
from minitron.loopback import is_loopback

KEY = "OPENAI_API_KEY"
SECONDS = 600.0  # without a byte from the server, after which a request has failed


class RefusedError(MinitronError):
    """A request that the server answered with an error. status: HTTP's."""

    def __init__(self, problem: str, remedy: str = "", status: int = 0) -> None:
        super().__init__(problem, remedy)
        self.status = status


@dataclass(frozen=True)
class Served:
    """A model at a server. url: http://HOST:PORT/v1, without the model's name."""

    url: str
    model: str

    @classmethod
    def parse(cls, address: str) -> Served:
        """From URL or URL#MODEL; without a name the server must have one model.

        Raises InputError for another address, for one that cannot be reached, and for a server with several models.
        """
        parts = _split(address)
        url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        if parts.fragment:
            return cls(url, parts.fragment)
        names = model_names(url)
        if len(names) != 1:
            known = f"has the models {', '.join(names)}" if names else "lists no model"
            raise InputError(f"{url}: {known}", "put #NAME behind its address")
        return cls(url, names[0])


def is_served(model: str) -> bool:
    """Whether a model is named by the address of a server."""
    return model.startswith(("http://", "https://"))


def model_entry(served: Served) -> dict[str, Any]:
    """What a server says about a model, without what changes with every start; empty if it lists no such model."""
    entries = _entries(served.url)
    entry = next((each for each in entries if each.get("id") == served.model), {})
    return {key: value for key, value in entry.items() if key not in ("created", "permission")}


def model_names(url: str) -> list[str]:
    """The models that a server lists. Raises InputError if it cannot be reached."""
    return [str(each["id"]) for each in _entries(url)]


def _entries(url: str) -> list[dict[str, Any]]:
    with _answer(url, "GET", "/models", None) as response:
        try:
            entries = json.loads(response.read())["data"]
            return [{**entry, "id": entry["id"]} for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{url}/models: is not a list of models ({type(error).__name__}: {error})",
                "give the address of an OpenAI-compatible server, which often ends in /v1",
            ) from error


@dataclass(frozen=True)
class Streamed:
    """One answer. first, last: `time.perf_counter()` when its first and its last token came."""

    input_tokens: int
    output_tokens: int
    first: float
    last: float


def streamed(served: Served, body: dict[str, Any]) -> Streamed:
    """Send a completion request and time its answer. Tokens are those of the server's `usage`.

    Raises RefusedError if the server answers with an error, and InputError for an answer without tokens or their number.
    """
    request = {"model": served.model, **body, "stream": True, "stream_options": {"include_usage": True}}
    first = last = 0.0
    usage: dict[str, Any] = {}
    with _answer(served.url, "POST", "/completions", request) as response:
        for event in _events(response):
            now = time.perf_counter()
            if "error" in event:
                raise RefusedError(f"{served.url}: {str(event['error'])[:300]}")
            if event.get("choices"):
                first, last = first or now, now
            usage = event.get("usage") or usage
    if not first:
        raise InputError(f"{served.url}: the answer of {served.model} has no tokens", "look at the server's log")
    try:
        return Streamed(int(usage["prompt_tokens"]), int(usage["completion_tokens"]), first, last)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{served.url}: its answers do not say how many tokens they have",
            "use a server that knows stream_options.include_usage, such as vLLM or llama.cpp",
        ) from error


def completed(served: Served, body: dict[str, Any]) -> dict[str, Any]:
    """Send a completion request and wait for its answer, the first choice of it.

    Raises RefusedError if the server answers with an error, and InputError for something else than a completion.
    """
    with _answer(served.url, "POST", "/completions", {"model": served.model, **body}) as response:
        try:
            choice: dict[str, Any] = json.loads(response.read())["choices"][0]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{served.url}: the answer of {served.model} is not a completion ({type(error).__name__}: {error})",
                "give the address of an OpenAI-compatible server, which often ends in /v1",
            ) from error
    return choice


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON values of server-sent events, as they arrive."""
    while line := response.readline():
        text = line.decode().strip()
        if text.startswith("data:") and text != "data: [DONE]":
            yield json.loads(text.removeprefix("data:"))


@contextmanager
def _answer(url: str, method: str, path: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
    parts = _split(url)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=SECONDS)
    headers = {"Content-Type": "application/json", "User-Agent": "minitron"}
    if (key := os.environ.get(KEY)) and (secure or is_loopback(parts.hostname)):
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.request(
            method, f"{parts.path.rstrip('/')}{path}", None if body is None else json.dumps(body), headers
        )
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise _refusal(f"{url}{path}", response)
        yield response
    except (OSError, http.client.HTTPException, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{url}: cannot be reached, or breaks off ({type(error).__name__}: {error})",
            "start the server, or correct the address",
        ) from error
    finally:
        connection.close()


def _refusal(address: str, response: http.client.HTTPResponse) -> RefusedError:
    said = " ".join(response.read(2_000).decode(errors="replace").split())[:300]
    remedy = {
        401: f"set {KEY} to the server's key, which is sent by https and on this machine only",
        404: "give the address with its path, which often ends in /v1, and the name of a model that the server has",
    }.get(response.status, "look at the server's log")
    return RefusedError(f"{address}: the server answered {response.status}: {said}", remedy, response.status)


def _split(address: str) -> SplitResult:
    remedy = "give http://HOST:PORT/v1, with #MODEL behind it if the server has several"
    try:
        parts = urlsplit(address)
        _ = parts.port  # computed, and checked, here
    except ValueError as error:
        raise InputError(f"not the address of a server ({error})", remedy) from error
    if "@" in parts.netloc or parts.query:
        raise InputError(
            f"{parts.hostname}: the address was given with a user or a query, and addresses are shown and logged",
            f"{remedy}, and the key in {KEY}",
        )
    if not parts.hostname:
        raise InputError(f"{address}: has no host", remedy)
    return parts
