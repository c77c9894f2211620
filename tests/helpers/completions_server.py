"""A small OpenAI-compatible server on this machine: /v1/models and /v1/completions, streamed by server-sent events.

As a program it stands in for the command `vllm`: `completions_server.py serve MODEL --port N ...`, with canned tokens.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# What answers a request's body: the number of tokens of its prompt, and those of the answer as they are computed.
Answering = Callable[[dict[str, Any]], tuple[int, Iterator[str]]]
# What answers a request that is not streamed: the first choice.
Completing = Callable[[dict[str, Any]], dict[str, Any]]


def canned(body: dict[str, Any]) -> tuple[int, Iterator[str]]:
    """One token per word of the prompt, and two answers' tokens fewer than requested unless the end of a text is ignored."""
    length = body["max_tokens"] if body.get("ignore_eos") else max(1, body["max_tokens"] - 2)
    return len(body["prompt"].split()), iter(["a "] * length)


def of_model(model: Any, tokenizer: Any) -> Answering:
    """Greedy answers of a transformers model, one request at a time."""
    import torch

    lock = threading.Lock()

    def tokens(ids: Any, count: int) -> Iterator[str]:
        for _ in range(count):
            with lock, torch.inference_mode():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            yield tokenizer.decode(ids[0, -1:])

    def answer(body: dict[str, Any]) -> tuple[int, Iterator[str]]:
        ids = torch.tensor([tokenizer.encode(body["prompt"])])
        return ids.shape[1], tokens(ids, body["max_tokens"])

    return answer


def completing(model: Any, tokenizer: Any) -> Completing:
    """Whole answers of a transformers model to prompts of token ids, as vLLM gives them."""
    import torch

    lock = threading.Lock()

    def logits(ids: list[int]) -> Any:
        with lock, torch.inference_mode():
            return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def complete(body: dict[str, Any]) -> dict[str, Any]:
        ids = list(body["prompt"])
        if body.get("echo"):
            rows = logits(ids)
            following = [*ids[1:], int(rows[-1].argmax())]
            own = [None, *(float(row[token]) for row, token in zip(rows, following, strict=True))]
            best = [None, *({"the best": float(row.max())} for row in rows)]
            return {"text": "", "logprobs": {"token_logprobs": own, "top_logprobs": best}}
        text = ""
        for _ in range(body["max_tokens"]):
            ids.append(int(logits(ids)[-1].argmax()))
            text = tokenizer.decode(ids[len(body["prompt"]) :])
            if any(stop in text for stop in body["stop"]):
                text = min((text.split(stop)[0] for stop in body["stop"]), key=len)
                break
        return {"text": text}

    return complete


class CompletionsServer(ThreadingHTTPServer):
    """`requests` has the bodies that it was sent, `keys` the Authorization headers; `known` are the fields that it accepts."""

    def __init__(
        self, answering: Answering, models: tuple[str, ...] = ("served",), port: int = 0, host: str = "127.0.0.1"
    ) -> None:
        super().__init__((host, port), _Handler)
        self.answering = answering
        self.models = models
        self.known: set[str] | None = None
        self.completing: Completing = lambda _: {"text": "", "logprobs": None}
        self.redirect_to = ""
        self.counts = True  # whether an answer says how many tokens it has
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = f"http://{host}:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: CompletionsServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json(200, {"data": [{"id": name, "object": "model"} for name in self.server.models]})
        else:
            self._json(404, {"error": "no such path"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        known = self.server.known
        if self.server.redirect_to:
            self.send_response(307)
            self.send_header("Location", self.server.redirect_to)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif body["model"] not in self.server.models:
            self._json(404, {"error": f"no model {body['model']}"})
        elif known is not None and (unknown := set(body) - known):
            self._json(400, {"error": f"unknown fields: {', '.join(sorted(unknown))}"})
        elif body.get("stream"):
            self._stream(body)
        else:
            self._json(200, {"choices": [self.server.completing(body)]})

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        length, tokens = self.server.answering(body)
        count = 0
        for text in tokens:
            count += 1
            self._event(json.dumps({"choices": [{"index": 0, "text": text}]}))
        usage = {"prompt_tokens": length, "completion_tokens": count} if self.server.counts else None
        self._event(json.dumps({"choices": [], "usage": usage}))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def vllm_command(folder: Path) -> Path:
    """A folder for the PATH with a command vllm that is this file; it writes its process id to `folder`/vllm.pid, and the size
    of its KV cache on a CPU to `folder`/vllm.cache."""
    command = folder / "bin" / "vllm"
    command.parent.mkdir()
    told = f'echo "$$" > {folder}/vllm.pid\necho "$VLLM_CPU_KVCACHE_SPACE" > {folder}/vllm.cache'
    command.write_text(f'#!/bin/sh\n{told}\nexec {sys.executable} {__file__} "$@"\n')
    command.chmod(0o755)
    return command.parent


if __name__ == "__main__":
    if sys.argv[2] == "broken":
        sys.exit("ValueError: this model has no weights")
    given = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=False))
    CompletionsServer(canned, (given["--served-model-name"],), int(given["--port"])).serve_forever()
