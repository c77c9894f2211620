"""Samples show the choice that the metric counts, and what a model wrote beside what was extracted from it."""

from __future__ import annotations

import random

import yaml
from helpers.evaluating import WORDS, byte_tokenizer, sums, tiny_model, write_jsonl

from minitron.evaluation import Task, evaluate_documents
from minitron.evaluation.requests import DocumentRequests

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
