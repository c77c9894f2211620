"""Kept answers: a killed evaluation is resumed, a repeated one computes nothing, and the scores are the same bit for bit."""

from __future__ import annotations

import pytest
from helpers.evaluating import arc_documents, byte_tokenizer, sums, tiny_model, write_jsonl

from minitron.checkpoints.identity import model_identity
from minitron.evaluation import Task, evaluate_documents
from minitron.evaluation.answers import AnswerStore


@pytest.fixture
def tasks(tmp_path):
    write_jsonl(tmp_path / "arc" / "test.jsonl", arc_documents(9))
    write_jsonl(tmp_path / "sums" / "test.jsonl", sums(3))
    return [Task("arc_easy", str(tmp_path / "arc")), Task("gsm8k", str(tmp_path / "sums"))]


class _KilledError(BaseException):
    pass


def counted(model):
    """The number of forward passes of a model from now on, as a list of one."""
    passes = [0]
    model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    model.model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    return passes


def test_an_interrupted_evaluation_is_resumed_and_a_repeated_one_computes_nothing(tasks, tmp_path, monkeypatch):
    model, tokenizer = tiny_model(1), byte_tokenizer()
    expected = evaluate_documents(model, tokenizer, tasks, batch_size=2, samples=2)
    store = AnswerStore(str(tmp_path / "answers"), model_identity(model, tokenizer))
    monkeypatch.setattr("minitron.evaluation.answers.FLUSH_SECONDS", 0.0)
    passes = counted(model)

    def kill(done, total):
        if done == 7:
            raise _KilledError

    with pytest.raises(_KilledError):
        evaluate_documents(model, tokenizer, tasks, batch_size=2, answers=store, progress=kill)
    first = passes[0]
    assert evaluate_documents(model, tokenizer, tasks, batch_size=2, answers=store, samples=2) == expected
    without = passes[0] - first
    assert evaluate_documents(model, tokenizer, tasks, batch_size=2, answers=store, samples=2) == expected
    assert passes[0] == first + without
    again = counted(tiny := tiny_model(1))
    assert evaluate_documents(tiny, tokenizer, tasks, batch_size=2) == {
        name: type(each)(each.score, each.filter, each.metrics, each.documents) for name, each in expected.items()
    }
    assert 0 < without < again[0]


def test_another_model_has_other_answers(tasks, tmp_path):
    tokenizer, folder = byte_tokenizer(), str(tmp_path / "answers")
    results = []
    for seed in (1, 2):
        model = tiny_model(seed)
        store = AnswerStore(folder, model_identity(model, tokenizer))
        results.append(evaluate_documents(model, tokenizer, tasks[:1], answers=store)["arc_easy"])
        assert results[-1] == evaluate_documents(model, tokenizer, tasks[:1])["arc_easy"]
    assert results[0].documents != results[1].documents


def test_damaged_files_are_computed_again_with_a_warning_for_each(tasks, tmp_path, monkeypatch, caplog):
    model, tokenizer = tiny_model(1), byte_tokenizer()
    store = AnswerStore(str(tmp_path / "answers"), model_identity(model, tokenizer))
    monkeypatch.setattr("minitron.evaluation.answers.FLUSH_SECONDS", 0.0)  # a file for each batch

    def evaluated():
        return evaluate_documents(model, tokenizer, tasks, batch_size=2, answers=store)

    expected = evaluated()
    files = sorted((tmp_path / "answers" / store.model).glob("*/*.json"))
    whole = {file: file.read_bytes() for file in files}
    contents = [b"[]", b"", b"\xff", b"[" * 100_000]
    for number, file in enumerate(files):
        file.write_bytes(contents[number] if number < len(contents) else whole[file][:-9])
    assert evaluated() == expected
    for file in files:
        assert f"{file}: is damaged; it is deleted, and its answers are computed again" in caplog.messages
    assert {file: file.read_bytes() for file in files} == whole
    caplog.clear()
    passes = counted(model)
    assert evaluated() == expected
    assert (passes, caplog.messages) == ([0], [])


def test_texts_are_kept_by_the_generation_settings_and_choices_are_not(tasks, tmp_path):
    folder = tmp_path / "answers"
    identities = set()
    for changes in ({}, {"repetition_penalty": 3.0}, {"eos_token_id": list(range(40, 120))}, {"clean up": True}):
        model, tokenizer = tiny_model(1), byte_tokenizer()
        tokenizer.clean_up_tokenization_spaces = changes.pop("clean up", False)
        model.generation_config.update(**changes)
        store = AnswerStore(str(folder), model_identity(model, tokenizer))
        identities.add(store.model)
        results = evaluate_documents(model, tokenizer, tasks, batch_size=4, samples=3, answers=store)
        assert results == evaluate_documents(model, tokenizer, tasks, batch_size=4, samples=3)
    assert len(identities) == 1
    assert len(list((folder / store.model).iterdir())) == 1 + 4  # of the choices, and of the texts
