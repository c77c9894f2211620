"""Samples show the choice that the metric counts, and what a model wrote beside what was extracted from it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import yaml
from helpers.evaluating import WORDS, byte_tokenizer, sums, tiny_model, write_jsonl

from minitron.evaluation import Task, evaluate_documents
from minitron.evaluation.requests import DocumentRequests
from minitron.evaluation.result_file import ModelResults
from minitron_platform.cli.evaluation_tables import sample_lines

METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")


def test_the_answer_is_the_target_exactly_if_the_metric_says_so(tmp_path):
    draw = random.Random(0)
    documents = [
        {
            "question": f"A {draw.choice(WORDS)}",
            "choices": [" ".join(draw.sample([*WORDS, "ärger", "übel öde"], length)) for length in (1, 2, 3, 4)],
            "label": draw.randrange(4),
        }
        for _ in range(60)
    ]
    data = str(write_jsonl(tmp_path / "test.jsonl", documents))
    (tmp_path / "mine").mkdir()
    for metric in METRICS:
        definition = {
            "task": f"own_{metric}",
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        }
        (tmp_path / "mine" / f"{metric}.yaml").write_text(yaml.safe_dump(definition))
    tasks = [Task(f"own_{metric}", data, folder=str(tmp_path / "mine")) for metric in METRICS]
    results = evaluate_documents(tiny_model(1), byte_tokenizer(), tasks, samples=60, batch_size=16)
    answers = {}
    for metric in METRICS:
        samples = results[f"own_{metric}"].samples
        assert len(samples) == 60
        assert all((sample.value == 1) == (sample.answer == sample.target) for sample in samples)
        assert {sample.value for sample in samples} == {0.0, 1.0}
        answers[metric] = tuple(sample.answer for sample in sorted(samples, key=lambda sample: int(sample.id)))
    assert len(set(answers.values())) == len(METRICS)  # so that one is not taken for another


def test_what_a_model_wrote_and_what_was_extracted_are_both_there(tmp_path, monkeypatch):
    texts = [" One. #### 1", " I do not know.", " 2 + 3\n#### 7"]
    monkeypatch.setattr(
        DocumentRequests, "generate_until", lambda self, requests, **_: [texts[each.doc_id] for each in requests]
    )
    task = Task("gsm8k", str(write_jsonl(tmp_path / "test.jsonl", sums(3))))
    samples = evaluate_documents(tiny_model(1), byte_tokenizer(), [task], samples=3)["gsm8k"].samples
    found = {int(sample.id): (sample.answer, sample.extracted, sample.value) for sample in samples}
    assert found == {0: (texts[0], "1", 1.0), 1: (texts[1], "[invalid]", 0.0), 2: (texts[2], "7", 0.0)}


DEFINITION = {
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "output_type": "multiple_choice",
}


def own(folder, name, metric, aggregation, **settings):
    """The file of a task whose main metric is `metric`."""
    metrics = [{"metric": metric, "aggregation": aggregation}]
    definition = {"task": name, **DEFINITION, "metric_list": metrics, **settings}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))


def test_a_choice_is_right_or_wrong_where_the_metric_is_one_of_all_documents(tmp_path):
    documents = [{"question": f"A {word}", "choices": ["yes", "no"], "label": n % 2} for n, word in enumerate(WORDS)]
    data = str(write_jsonl(tmp_path / "test.jsonl", documents))
    mine = tmp_path / "mine"
    for name, metric, aggregation, better in (
        ("by_accuracy", "acc", "mean", True),
        ("by_f1", "f1", "f1", True),
        ("by_mcc", "mcc", "matthews_corrcoef", True),
        ("by_brier", "brier_score", "brier_score", False),
    ):
        entry = [{"metric": metric, "aggregation": aggregation, "higher_is_better": better}]
        own(mine, name, metric, aggregation, metric_list=entry)
    names = ("by_accuracy", "by_f1", "by_mcc", "by_brier")
    tasks = [Task(name, data, folder=str(mine)) for name in names]
    results = evaluate_documents(tiny_model(1), byte_tokenizer(), tasks, samples=len(WORDS))
    accuracy = results["by_accuracy"].samples
    assert {sample.value for sample in accuracy} == {0.0, 1.0}
    assert {sample.is_right for sample in accuracy} == {None}
    for name in names[1:]:
        samples = results[name].samples
        assert [replace(sample, is_right=None) for sample in samples] == list(accuracy)  # the wrong ones first
        assert all(sample.is_right == (sample.answer == sample.target) == (sample.value == 1) for sample in samples)


def test_texts_are_shown_with_their_own_perplexity_and_the_worst_first(tmp_path):
    data = str(write_jsonl(tmp_path / "test.jsonl", [{"page": " ".join([word] * 9)} for word in WORDS[:5]]))
    tasks = [Task("wikitext", data)]
    settings = {
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "doc_to_choice": None,
        "output_type": "loglikelihood_rolling",
    }
    own(tmp_path / "mine", "bits", "bits_per_byte", "bits_per_byte", **settings)
    own(tmp_path / "mine", "target", "perplexity", "perplexity", **settings | {"output_type": "loglikelihood"})
    tasks += [Task(name, data, folder=str(tmp_path / "mine")) for name in ("bits", "target")]
    results = evaluate_documents(tiny_model(1, initializer_range=0.05), byte_tokenizer(), tasks, samples=5)
    for name, value in (
        ("wikitext", lambda total, words: math.exp(-total / words)),
        ("bits", lambda total, size: -total / size / math.log(2)),
        ("target", lambda total, _: math.exp(min(700.0, -total))),
    ):
        result = results[name]
        documents = {document.id: document for document in result.documents}
        values = [sample.value for sample in result.samples]
        assert values == sorted(values, reverse=True)
        assert len(values) == 5
        for sample in result.samples:
            document = documents[sample.id]
            expected = value(document.values[result.main], document.weights.get(result.main, 1.0))
            assert sample.value == pytest.approx(expected)
        if name != "target":
            texts = {sample.id: sample.prompt.split()[0] for sample in result.samples}
            assert texts == {str(number): word for number, word in enumerate(WORDS[:5])}
            assert {sample.target for sample in result.samples} == {""}


def test_the_terminal_shows_them_or_says_why_there_are_none(tmp_path):
    documents = [{"question": f"A {word}", "choices": ["yes", "no"], "label": n % 2} for n, word in enumerate(WORDS)]
    data = str(write_jsonl(tmp_path / "test.jsonl", documents))
    mine = tmp_path / "mine"
    own(mine, "by_f1", "f1", "f1")
    texts = {"output_type": "generate_until", "doc_to_target": "{{question}}", "doc_to_choice": None}
    own(mine, "by_bleu", "bleu", "bleu", generation_kwargs={"until": ["e"], "max_gen_toks": 2}, **texts)
    pages = str(write_jsonl(tmp_path / "pages" / "test.jsonl", [{"page": "river stone light"}]))
    tasks = [Task("by_f1", data, folder=str(mine)), Task("by_bleu", data, folder=str(mine)), Task("wikitext", pages)]
    done = evaluate_documents(tiny_model(1), byte_tokenizer(), tasks, samples=11)
    shown = "\n".join(sample_lines([ModelResults("tiny", "", 1, "float32", "cpu", tasks=done)], 1_000))
    assert shown.count("wrong\n") + shown.count("right\n") == len(WORDS)
    assert "tiny · by_bleu[/]  no samples: bleu is computed from all documents together" in shown
    wikitext = shown[shown.index("wikitext 0") :]
    assert "word_perplexity" in wikitext
    assert "river stone light" in wikitext
    assert "of 3 words" in wikitext
    assert "expected" not in wikitext
