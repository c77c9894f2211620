"""`minitron generate` and `minitron chat` write what the model writes."""

from __future__ import annotations

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
