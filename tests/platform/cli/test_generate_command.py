"""`minitron generate` and `minitron chat` write what the model writes."""

from __future__ import annotations

import pytest
from helpers.command import minitron_here

from minitron.evaluation.generation import Sampling, answer, complete
from minitron.models import load_source

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def test_prompts_are_continued_by_each_model_and_a_chat_keeps_its_messages(bench, tmp_path):
    model, tokenizer = load_source(str(bench / "teacher"))
    options = ("--max-new-tokens", "6", "--dtype", "float32")
    done = minitron_here(
        "generate", bench / "teacher", "--prompt", "the model", "--prompt", "river", *options, cwd=bench
    )
    assert done.returncode == 0, done.stderr
    for prompt in ("the model", "river"):
        assert f"{prompt}\n{bench / 'teacher'}\n{complete(model, tokenizer, prompt, Sampling(6))}\n" in done.stdout

    without = minitron_here("chat", bench / "teacher", *options, cwd=bench, typed="river\n")
    assert (without.returncode, "no chat template" in without.stderr) == (2, True)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    done = minitron_here("chat", tmp_path / "chat", *options, cwd=tmp_path, typed="river\nstone\n/reset\nriver\n")
    assert done.returncode == 0, done.stderr
    messages = [{"role": "user", "content": "river"}]
    first = answer(model, tokenizer, messages, Sampling(6))
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "stone"}]
    second = answer(model, tokenizer, messages, Sampling(6))
    assert [line for line in done.stdout.splitlines() if line in (first, second)] == [first, second, first]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--prompt", ""], "--prompt: it is empty"),
        (["--prompt", "a", "--prompt", ""], "--prompt: it is empty"),
        (["--temperature", "-1"], "--temperature: -1.0 is not a temperature"),
        (["--temperature", "nan"], "--temperature: nan is not a temperature"),
        (["--temperature", "inf"], "--temperature: inf is not a temperature"),
        (["--top-p", "0"], "--top-p: 0.0 is not a share"),
        (["--top-p", "nan"], "--top-p: nan is not a share"),
        (["--max-new-tokens", "0"], "--max-new-tokens: 0 is less than 1"),
        (["--max-new-tokens", "2048"], "--max-new-tokens: 2,048 leave no room for a prompt in the 2,048 tokens"),
        (["--seed", str(2**63)], "--seed: 9223372036854775808 is not a seed"),
        (["--seed", "-1"], "--seed: -1 is not a seed"),
        (["--prompt", "a " * 2000], "teacher: the prompt has 2,001 tokens"),
        (["./gone"], "./gone does not exist"),
        (["teacher"], "MODEL: teacher is given twice"),
        (["gone@champion"], "there is no MLflow database"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_a_model_is_loaded(bench, tmp_path, monkeypatch, options, problem):
    monkeypatch.setattr("minitron_platform.cli.generate.load", lambda *_: pytest.fail("a model was loaded"))
    prompt = [] if "--prompt" in options else ["--prompt", "the"]
    done = minitron_here("generate", "teacher", *options, *prompt, "--storage", tmp_path / "runs", cwd=bench)
    assert (done.returncode, problem in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "runs").exists()
