"""Benchmark scores equal those of lm-eval for each kind of request, and are shown in the unit of their metric."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from helpers import tiny
from helpers.evaluating import arc_documents, byte_tokenizer, pages, results_of_lm_eval, sums, tiny_model, write_jsonl
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from minitron.errors import InputError, one_line
from minitron.evaluation import Task, evaluate, task_metric
from minitron.evaluation.scorer import Scorer
from minitron.evaluation.tasks import parts, read_definition


def by_lm_eval(model, tokenizer, task, file, limit=None):
    """The results of lm-eval itself for the stock definition of `task` on the same documents."""
    config = read_definition(next(parts(Task(task))).definition, functions=True)
    for split in ("training_split", "validation_split", "fewshot_split", "dataset_name"):
        config.pop(split, None)
    config |= {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")},
        "test_split": "test",
        "num_fewshot": 0,
    }
    return results_of_lm_eval(model, tokenizer, config, limit=limit)["results"][task]


@pytest.fixture(scope="module")
def student():
    return tiny_model(1)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def generated(monkeypatch):
    """The lists of answers that lm-eval's transformers backend generates during a test."""
    answers = []
    original = HFLM.generate_until

    def generate_until(self, *args, **options):
        answers.append(original(self, *args, **options))
        return answers[-1]

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    return answers


@pytest.mark.parametrize("name", ["arc_easy", "wikitext", "gsm8k"])
def test_each_kind_of_request_gives_the_scores_of_lm_eval(student, tokenizer, tmp_path, generated, name):
    # pages of about 60 to 1,800 bytes; the longest need four windows of this model
    documents = {"arc_easy": arc_documents(9), "wikitext": [*pages(5, 10), *pages(2, 300)], "gsm8k": sums(3)}[name]
    file = write_jsonl(tmp_path / "test.jsonl", documents)
    calls = []

    score = evaluate(
        student, tokenizer, [Task(name, str(file))], batch_size=4, progress=lambda *call: calls.append(call)
    )[name]
    expected = by_lm_eval(student.eval(), tokenizer, name, file)

    metric = {"arc_easy": "acc,none", "wikitext": "word_perplexity,none", "gsm8k": "exact_match,strict-match"}[name]
    assert score.metric == metric.split(",")[0]
    assert score.value == pytest.approx(expected[metric], rel=1e-5)
    assert score.higher_is_better is (name != "wikitext")
    assert score.stderr > 0
    assert score.num_documents == len(documents)
    assert calls == [(done, len(documents)) for done in range(1, len(documents) + 1)]
    if name == "gsm8k":
        ours, theirs = generated
        assert ours == theirs
        assert all(ours)


def test_a_text_without_context_begins_with_bos_as_in_lm_eval_also_if_the_tokenizer_does_not_add_it(student, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "a", "b"
    file = write_jsonl(tmp_path / "test.jsonl", pages(3, 40))

    def perplexity(**options):
        return evaluate(student, tokenizer, [Task("wikitext", str(file))], **options)["wikitext"].value

    expected = by_lm_eval(student, tokenizer, "wikitext", file)["word_perplexity,none"]
    assert perplexity() == pytest.approx(expected, rel=1e-5)
    assert perplexity(add_bos=False) != pytest.approx(expected, rel=1e-5)  # then EOS, as between documents


OWN = """task: own
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
target_delimiter: ""
"""


@pytest.mark.parametrize(("context", "text"), [("", " one two"), (" ", "one two"), (" \n", " one two")])
def test_a_context_without_tokens_is_scored_as_no_context(context, text, student, tokenizer, tmp_path):
    metrics = "output_type: loglikelihood\nmetric_list:\n  - metric: perplexity\n"
    (tmp_path / "own.yaml").write_text(f"{OWN}{metrics}")
    file = write_jsonl(tmp_path / "test.jsonl", [{"text": context, "target": text}])
    score = evaluate(student, tokenizer, [Task("own", str(file), folder=str(tmp_path))])["own"]
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(f"{context}{text}", add_special_tokens=False)]])
    with torch.no_grad():
        log_p = student(ids).logits[0, :-1].double().log_softmax(-1)
    expected = -float(log_p.gather(1, ids[0, 1:, None]).sum())
    assert math.log(score.value) == pytest.approx(expected, rel=1e-5)


def test_an_empty_prompt_is_continued_from_the_token_before_a_text(student, tokenizer, tmp_path, generated):
    settings = "output_type: generate_until\ngeneration_kwargs: {max_gen_toks: 8, until: []}\n"
    (tmp_path / "own.yaml").write_text(f"{OWN}{settings}metric_list:\n  - metric: exact_match\n")
    file = write_jsonl(tmp_path / "test.jsonl", [{"text": "", "target": "one"}])
    evaluate(student, tokenizer, [Task("own", str(file), folder=str(tmp_path))])
    ids = torch.tensor([[tokenizer.eos_token_id]])
    made = student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, 1:]
    assert generated == [[tokenizer.decode(made, skip_special_tokens=True)]]


def test_the_perplexity_of_a_random_model_is_near_its_vocabulary_size(tokenizer, tmp_path):
    model = tiny_model(1, initializer_range=1e-4)
    file = write_jsonl(tmp_path / "test.jsonl", pages(3, 200))
    score = evaluate(model, tokenizer, [Task("wikitext", str(file), limit=2)])["wikitext"]
    letters = [len(document["page"]) / len(document["page"].split()) for document in pages(2, 200)]
    assert score.value == pytest.approx(257 ** (sum(letters) / 2), rel=0.1)
    assert score.num_documents == 2


def test_a_prompt_that_is_truncated_for_its_answer_is_reported(tokenizer, tmp_path, caplog):
    model = tiny_model(1, max_position_embeddings=400)
    file = write_jsonl(tmp_path / "test.jsonl", [*sums(2), {"question": 30 * "winter ", "answer": "#### 1"}])
    with caplog.at_level(logging.WARNING):
        evaluate(model, tokenizer, [Task("gsm8k", str(file))])
    assert "gsm8k: 1 requests exceed the model's 400 tokens" in caplog.text


@pytest.mark.parametrize(
    ("task", "metric", "value", "stderr", "title", "shown"),
    [
        ("arc_easy", "acc", 0.4751, 0.0456, "acc, %", "47.5 ± 4.6"),
        ("hellaswag", "acc_norm", 0.5, None, "acc_norm, %", "50.0 ± -"),
        ("gsm8k", "exact_match", 0.0, 0.0, "exact_match, %", "0.0 ± 0.0"),
        ("ifeval", "prompt_level_strict_acc", 1.0, float("nan"), "prompt_level_strict_acc, %", "100.0 ± -"),
        ("squadv2", "f1", 45.25, None, "f1, %", "45.2 ± -"),
        ("wikitext", "word_perplexity", 15.216, None, "word_perplexity", "15.22 ± -"),
        ("wikitext", "word_perplexity", 123456.7, None, "word_perplexity", "123,457 ± -"),
        ("wikitext", "bits_per_byte", 0.71234, None, "bits_per_byte, bits", "0.712 ± -"),
        ("iwslt2017_en-de", "bleu", 27.312, 0.44, "bleu", "27.31 ± 0.44"),
        ("truthfulqa_gen", "bleu_acc", 0.31, None, "bleu_acc, %", "31.0 ± -"),
        ("longbench", "score", 12.5, None, "score", "12.50 ± -"),
    ],
)
def test_a_score_is_shown_in_the_unit_of_its_metric(task, metric, value, stderr, title, shown):
    found = task_metric(task, metric)
    assert found.title == title
    assert found.with_error(value, stderr) == shown
    assert found.text(value) == shown.split(" ±")[0]


def test_lower_is_better_for_perplexities_and_the_direction_of_unknown_metrics_is_none():
    better = [task_metric("t", m).higher_is_better for m in ("byte_perplexity", "ter", "acc", "bleu", "score")]
    assert better == [False, False, True, True, None]


def test_a_task_that_raises_is_reported_and_the_others_are_scored(student, tokenizer, tmp_path):
    good = Task("wikitext", str(write_jsonl(tmp_path / "pages.jsonl", pages(2, 10))))
    unfit = Task("hellaswag", str(write_jsonl(tmp_path / "unfit.jsonl", [{"no": "question"}])))
    # its documents are scored, and the aggregation afterwards raises
    broken = Task(
        "gsm8k", str(write_jsonl(tmp_path / "sums.jsonl", [*sums(1), {"question": "how many?", "answer": 3}]))
    )
    failed = {}

    scores = evaluate(student, tokenizer, [unfit, broken, good], on_failure=failed.__setitem__)

    assert scores == evaluate(student, tokenizer, [good])
    assert list(failed) == ["hellaswag", "gsm8k"]
    assert "fields are no" in one_line(failed["hellaswag"])
    with pytest.raises(type(failed["gsm8k"])):
        evaluate(student, tokenizer, [broken])


def test_an_answer_that_is_too_long_for_the_model_fails_its_task(student, tokenizer, tmp_path):
    documents = arc_documents(3)
    documents[1]["choices"]["text"][0] = 513 * "a"
    file = write_jsonl(tmp_path / "test.jsonl", documents)
    with pytest.raises(InputError, match="an answer has 514 tokens, but the model accepts 1 to 512"):
        evaluate(student, tokenizer, [Task("arc_easy", str(file))])


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_out_of_memory_and_interrupts_are_raised_and_not_recorded_as_failures(
    student, tokenizer, tmp_path, monkeypatch, error
):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr(student.model, "forward", stop)
    task = Task("arc_easy", str(write_jsonl(tmp_path / "test.jsonl", arc_documents(1))))
    with pytest.raises(error):
        evaluate(student, tokenizer, [task], on_failure=lambda name, failure: None)


def test_with_longrope_a_text_is_generated_with_the_factors_of_its_own_prompt(tokenizer):
    model = tiny.longrope_model(short_length=24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that texts depend on what stands before
    settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = ["the river", "a stone", "the river and the stone and the cloud and the tree", "word"]
    asked = [
        Instance("generate_until", {}, (prompt, settings), number, (None, None, None))
        for number, prompt in enumerate(prompts)
    ]
    texts = [Scorer(model, tokenizer, rows, None, len(asked), None, False).generate_until(asked) for rows in (1, 4)]
    assert texts[0] == texts[1]
