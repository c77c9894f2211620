"""Groups whose score is no mean over documents have an uncertainty: of F1, correlations and perplexities."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import asdict

import pytest
from helpers.evaluating import WORDS, byte_tokenizer, tiny_model, write_jsonl

from minitron.evaluation import Evaluated, Task, evaluate_documents
from minitron.evaluation.comparison import compare
from minitron.evaluation.estimates import group_replicates
from minitron.evaluation.result_file import ModelResults
from minitron.evaluation.watch import TaskWatch

CHOOSING = """
task: {name}
dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}}]
metadata: {{version: 1}}
"""
ROLLING = """
task: {name}
dataset_path: json
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""
SIZES = {"first": 40, "second": 60, "third": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Groups of each kind of task, by documents and by tasks, with their documents."""
    folder = tmp_path_factory.mktemp("groups")
    (folder / "own").mkdir()
    draw = random.Random(1)
    for kind, definition in (("choosing", CHOOSING), ("rolling", ROLLING)):
        members = [f"{kind}_{name}" for name in SIZES]
        for member, size in zip(members, SIZES.values(), strict=True):
            (folder / "own" / f"{member}.yaml").write_text(definition.format(name=member))
            documents = [
                {"text": " ".join(draw.sample(WORDS, 4)), "choices": draw.sample(WORDS, 2), "label": draw.randint(0, 1)}
                for _ in range(size)
            ]
            write_jsonl(folder / "data" / member / "test.jsonl", documents)
        for name, by_size in (("by_size", "true"), ("by_task", "false")):
            metric = f"aggregate_metric_list: [{{metric: mcc, weight_by_size: {by_size}}}]"
            text = f"group: {kind}_{name}\ntask: [{', '.join(members)}]\n{metric}\n"
            (folder / "own" / f"{kind}_{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def scored(folder):
    """The results of two models, by name."""
    names = [f"{kind}_{end}" for kind in ("choosing", "rolling") for end in ("by_size", "by_task")]
    tasks = [Task(name, str(folder / "data"), folder=str(folder / "own")) for name in names]
    members = [
        Task(f"{kind}_{name}", str(folder / "data" / f"{kind}_{name}"), folder=str(folder / "own"))
        for kind in ("choosing", "rolling")
        for name in SIZES
    ]
    return {
        name: evaluate_documents(tiny_model(seed), byte_tokenizer(), [*tasks, *members])
        for name, seed in (("one", 0), ("other", 1))
    }


def of_members(results, kind, field):
    return [getattr(results[f"{kind}_{name}"].score, field) for name in SIZES]


def compared(scored, task):
    (difference,) = compare(
        [ModelResults(name, "0" * 16, 1, "float32", "cpu", {task: scored[name][task]}) for name in scored]
    )
    return difference


@pytest.mark.parametrize("kind", ["choosing", "rolling"])
def test_a_group_by_size_has_the_spread_of_its_tasks_scores_or_that_of_its_draws(kind, scored):
    sizes, whole = list(SIZES.values()), sum(SIZES.values())

    def clustered(values):
        mean = sum(size * value for size, value in zip(sizes, values, strict=True)) / whole
        squares = sum((size * (value - mean)) ** 2 for size, value in zip(sizes, values, strict=True))
        return math.sqrt(3 / 2 * squares) / whole  # a mean over three clusters of documents

    one, other = (scored[name][f"{kind}_by_size"] for name in scored)
    values = [of_members(scored[name], kind, "value") for name in scored]
    within = statistics.stdev(one.replicates) if kind == "choosing" else 0.0
    assert one.score.stderr == pytest.approx(max(clustered(values[0]), within))
    assert one.score.stderr == next(each.stderr for each in one.metrics if each.metric == one.score.metric)
    assert one.task_scores == dict(zip((f"{kind}_{name}" for name in SIZES), values[0], strict=True))
    assert all(each.stderr for each in one.metrics)
    difference = compared(scored, f"{kind}_by_size")
    assert difference.value == pytest.approx(other.score.value - one.score.value)
    assert difference.stderr == pytest.approx(clustered([b - a for a, b in zip(*values, strict=True)]))
    assert 0 <= difference.fixed_stderr < difference.stderr


@pytest.mark.parametrize("kind", ["choosing", "rolling"])
def test_a_group_by_tasks_has_the_error_of_a_mean_over_them(kind, scored):
    one, other = (scored[name][f"{kind}_by_task"] for name in scored)
    assert (one.values() is None) == (kind == "choosing")  # a perplexity is a ratio, whose error needs no draws
    errors = of_members(scored["one"], kind, "stderr")
    assert one.score.stderr == pytest.approx(math.hypot(*errors) / 3)
    difference = compared(scored, f"{kind}_by_task")
    assert difference.value == pytest.approx(other.score.value - one.score.value)
    alone = [compared(scored, f"{kind}_{name}").stderr for name in SIZES]
    assert difference.stderr == pytest.approx(math.hypot(*alone) / 3, rel=0.3)
    assert difference.fixed_stderr == 0


def test_such_a_group_is_watched_during_a_training_also_by_a_resumed_one(scored):
    watch = TaskWatch(2)
    before, after = ({"g": scored[name]["choosing_by_size"]} for name in scored)
    watch.add(10, before, 1.0)
    assert Evaluated.from_dict(json.loads(json.dumps(asdict(before["g"])))) == before["g"]
    resumed = TaskWatch(2, json.loads(json.dumps(watch.first)))
    changes, _ = resumed.add(20, after, 0.9)
    assert changes["g"].value == pytest.approx(after["g"].score.value - before["g"].score.value)
    assert changes["g"].band > 0


def test_tasks_of_one_size_are_drawn_independently():
    """The same draws of equal answers would move both tasks together, and the spread of their mean would be that of one."""
    draw = random.Random(0)
    drawn = [draw.gauss(0.5, 0.1) for _ in range(100)]
    whole = group_replicates({"a": drawn, "b": drawn}, {"a": 0.5, "b": 0.5})
    assert statistics.stdev(whole) == pytest.approx(statistics.stdev(drawn) / math.sqrt(2), rel=0.2)
    assert group_replicates({"a": drawn, "b": ()}, {"a": 0.5, "b": 0.5}) == ()


def test_a_score_that_is_the_same_for_every_draw_has_no_error(folder, tmp_path):
    """A model that always gives the same answer is not known to be no better than chance."""
    documents = [{"text": "a", "choices": ["a", "a" * 40], "label": number % 2} for number in range(6)]
    tasks = [
        Task(name, str(tmp_path / where), folder=str(folder / "own"))
        for name, where in (("choosing_first", "choosing_first"), ("choosing_by_size", "."), ("choosing_by_task", "."))
    ]
    for name in SIZES:
        write_jsonl(tmp_path / f"choosing_{name}" / "test.jsonl", documents)
    results = evaluate_documents(tiny_model(0), byte_tokenizer(), tasks)
    assert [(each.score.value, each.score.stderr) for each in results.values()] == [(0, None)] * 3
