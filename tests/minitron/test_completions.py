"""Requests to OpenAI-compatible servers."""

from __future__ import annotations

import pytest
from helpers.completions_server import CompletionsServer, canned
from helpers.serving import serving

from minitron.completions import Served, completed, model_names


@pytest.mark.parametrize(
    ("listening", "named", "key"),
    [
        ("127.0.0.1", "127.0.0.1", "Bearer hunter2"),
        ("127.0.0.1", "LOCALHOST", "Bearer hunter2"),
        ("127.0.0.2", "127.0.0.2", "Bearer hunter2"),
        ("127.0.0.1", "0.0.0.0", None),  # leads to this machine here, but is not a loopback address
        ("127.0.0.1", "127.1", None),  # a name, as far as this can be told without resolving it
    ],
)
def test_the_key_is_sent_without_encryption_to_loopback_addresses_alone(monkeypatch, listening, named, key):
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2")
    with serving(CompletionsServer(canned, host=listening)) as server:
        served = Served(server.url.replace(listening, named), "served")
        assert model_names(served.url) == ["served"]
        completed(served, {"prompt": "a"})
        assert server.keys == [key]
