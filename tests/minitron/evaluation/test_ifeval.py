"""IFEval is scored without network, from a folder; the data that its checks need is never downloaded unasked."""

from __future__ import annotations

import nltk
import pytest
import torch
from helpers import tiny
from helpers.evaluating import byte_tokenizer, write_jsonl

from minitron.errors import InputError
from minitron.evaluation import Task, check_requirements, evaluate_documents

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}reply "
ANSWER = "ok"


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """A folder with NLTK's data for sentences, as NLTK's downloader writes it, of a language without abbreviations."""
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("downloaded"))
    folder = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    return str(tmp_path / "nltk")


def _of_one_answer(tokenizer):
    """A model that answers everything with ANSWER: what follows a token depends on that token alone."""
    o, k = tokenizer.encode(ANSWER)
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_hidden_layers": 1,
    }
    model = tiny.model(tied=False, vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding, head = model.model.embed_tokens.weight.zero_(), model.lm_head.weight.zero_()
        embedding[:, 0] = 1
        for number, (token, following) in enumerate(((o, k), (k, tokenizer.eos_token_id)), start=1):
            embedding[token, 0], embedding[token, number] = 0, 1
            head[following, number] = 1
        head[o, 0] = 1
    return model


def test_instructions_are_checked_without_network_and_missing_data_is_refused(punkt, tmp_path, monkeypatch):
    kinds = [
        ("punctuation:no_comma", {}, True),
        ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 2}, True),
        ("change_case:english_lowercase", {}, None),  # what langdetect takes two letters for
        ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, False),
        ("detectable_format:json_format", {}, False),
    ]
    documents = [
        {"key": number, "prompt": "Write.", "instruction_id_list": [kind], "kwargs": [arguments]}
        for number, (kind, arguments, _) in enumerate(kinds)
    ]
    task = Task("ifeval", str(write_jsonl(tmp_path / "data" / "ifeval" / "train.jsonl", documents)), chat_template=True)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = _of_one_answer(tokenizer)
    for run in (check_requirements, lambda task: evaluate_documents(model, tokenizer, [task])):
        with pytest.raises(InputError, match="NLTK's data punkt_tab is not on this machine") as refusal:
            run(task)
        assert refusal.value.remedy.startswith("python -m nltk.downloader punkt_tab, or set NLTK_DATA")
    monkeypatch.setattr(nltk.data, "path", [punkt])
    check_requirements(task)
    (first, second) = [evaluate_documents(model, tokenizer, [task], samples=5)["ifeval"] for _ in range(2)]
    assert {sample.answer for sample in first.samples} == {ANSWER}
    assert all(sample.prompt.startswith("user Write. reply") for sample in first.samples)
    for document, (_, _, followed) in zip(first.documents, kinds, strict=True):
        if followed is not None:
            assert document.values["prompt_level_strict_acc,none"] == followed
    assert first.documents == second.documents  # langdetect draws at random
    assert {metric.metric for metric in first.metrics} == {
        f"{level}_level_{kind}_acc" for level in ("prompt", "inst") for kind in ("strict", "loose")
    }
