"""`minitron throughput` measures models in turns: in memory, at a server by its address, and by vLLM's command."""

from __future__ import annotations

import json
import os

import jsonschema
import pytest
from helpers import tiny
from helpers.command import minitron_here
from helpers.completions_server import CompletionsServer, canned, of_model, vllm_command
from helpers.serving import serving
from transformers import AutoModelForCausalLM

from minitron.throughput.result_file import SCHEMA

FIELDS = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of 64 tokens, and a command vllm that serves canned answers."""
    folder = tmp_path_factory.mktemp("throughput")
    tokenizer = tiny.tokenizer()
    tiny.model(vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    vllm_command(folder)
    return folder


def test_a_model_in_memory_and_one_at_a_server_are_measured_in_turns(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model").eval(), tiny.tokenizer()
    options = ("--shapes", "20/4,5/1", "--batch", "1,3", "--rounds", "3", "--dtype", "float32", "--out", "speed.json")
    with serving(CompletionsServer(of_model(model, tokenizer))) as server:
        done = minitron_here("throughput", "model", server.url, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "speed.json").read_text())
    jsonschema.validate(content, json.loads(SCHEMA.read_text()))
    results = content["results"]
    assert [(each["model"], each["engine"]) for each in results] == [
        ("model", "transformers"),
        (server.url, "server"),
    ] * 4
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for each in results:
        shape = each["workload"]
        assert each["rounds"] == 3
        assert each["output_tokens"] == shape["output_tokens"]
        assert each["input_tokens"] == pytest.approx(shape["input_tokens"], rel=0.5)
        requests, tokens = each["requests_per_second"], each["output_tokens_per_second"]
        assert tokens["median"] == pytest.approx(requests["median"] * shape["output_tokens"])
        assert requests["low"] <= requests["median"] <= requests["high"]
        assert (each["inter_token_seconds"] is None) == (shape["output_tokens"] == 1)
        assert 0 < each["first_token_seconds"]["median"] <= shape["batch"] / requests["median"] * 1.001
    for own, served in zip(results[::2], results[1::2], strict=True):
        shape = own["workload"]
        cached = shape["input_tokens"] + shape["output_tokens"] - 1  # the last token is not read again
        cache = 5 * 2 * 2 * 24 * 4 * cached * shape["batch"]  # layers, keys and values, heads, their size, bytes
        assert (own["memory_bytes"] - weights - cache) < 10_000  # buffers
        assert own["memory_bytes"] >= weights + cache
        assert own["ratio"] is None
        assert served["ratio"]["median"] > 0
    prompts = [request["prompt"] for request in server.requests if request["max_tokens"] == 4]
    assert len(set(prompts)) == len(prompts)  # no server may answer from a cache
    assert "20/4 x 3" in done.stdout


def test_vllm_serves_each_model_by_its_command_in_turns_with_transformers_and_ends(folder, monkeypatch):
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("minitron.throughput.vllm.POLLING_SECONDS", 0.0)
    options = ("--shapes", "16/8", "--batch", "2", "--rounds", "1", "--out", "vllm.json", "--dtype", "float32")
    both = ("--engine", "transformers", "--engine", "vllm")
    done = minitron_here("throughput", "model", *both, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    own, served = json.loads((folder / "vllm.json").read_text())["results"]
    assert (own["engine"], served["engine"]) == ("transformers", "vllm")
    assert (served["input_tokens"], served["output_tokens"]) == (16, 8)
    assert served["ratio"]["median"] == pytest.approx(
        served["output_tokens_per_second"]["median"] / own["output_tokens_per_second"]["median"]
    )
    assert "1  model (transformers)\n2  model (vllm)" in done.stdout
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "vllm.pid").read_text()), 0)
    # not most of the machine's memory, but what the requests need, in GiB: 960 bytes a token and value
    assert (folder / "vllm.cache").read_text() == "1\n"
    options = ("--engine", "vllm", *options)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert minitron_here("throughput", "model", *options, cwd=folder).returncode == 0
    assert (folder / "vllm.cache").read_text() == "3\n"
    (folder / "broken").symlink_to("model")
    failed = minitron_here("throughput", "broken", *options, cwd=folder)
    assert failed.returncode == 2
    assert "ValueError: this model has no weights" in failed.stderr
    monkeypatch.setenv("PATH", str(folder))
    missing = minitron_here("throughput", "model", *options, cwd=folder)
    assert "no command vllm on the PATH" in missing.stderr


def test_a_server_without_further_fields_is_measured_and_short_answers_are_pointed_out(folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-secret")
    with serving(CompletionsServer(canned)) as server:
        server.known = FIELDS
        options = ("--shapes", "8/16", "--rounds", "1")
        done = minitron_here("throughput", f"{server.url}#served", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "answers end after 14 tokens" in done.stdout
        assert set(server.keys) == {"Bearer not-a-secret"}
        server.counts = False
        uncounted = minitron_here("throughput", f"{server.url}#served", *options, cwd=folder)
        assert "its answers do not say how many tokens they have" in uncounted.stderr
        unknown = minitron_here("throughput", f"{server.url}#other", *options, cwd=folder)
        assert "the server answered 404" in unknown.stderr
        with serving(CompletionsServer(canned)) as elsewhere:
            server.redirect_to = f"{elsewhere.url}/completions"
            moved = minitron_here("throughput", f"{server.url}#served", *options, cwd=folder)
            assert "the server answered 307" in moved.stderr
            assert not elsewhere.keys
        server.models = ("one", "two")
        several = minitron_here("throughput", server.url, *options, cwd=folder)
        assert "has the models one, two" in several.stderr
        assert "put #NAME behind its address" in several.stderr
    gone = minitron_here("throughput", server.url, *options, cwd=folder)
    assert "cannot be reached" in gone.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("model", "--shapes", "60/5"), "60 + 5 tokens exceed its context of 64"),
        (("model", "--shapes", "128"), "not pairs of lengths"),
        (("model", "--batch", "1,0"), "'1,0': not numbers"),
        (("model", "model"), "MODEL: model is given twice"),
        (("model", "--engine", "vllm", "--engine", "vllm"), "--engine: one is given twice"),
        (("model", "./missing"), "./missing does not exist"),
        (("model", "--out", "/proc/x.json"), "--out /proc/x.json: "),
        (("http://me:hunter2@host/v1",), "host: the address was given with a user"),
        (("http://host:port/v1",), "not the address of a server"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, arguments, problem):
    done = minitron_here("throughput", *arguments, cwd=folder)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "pw@" not in done.stderr
