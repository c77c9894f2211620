"""Measurements of a search besides the KL: benchmarks of the best candidates, and the time to first token."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from helpers.searching import json_files, search_task

from minitron import storage
from minitron.evaluation import Task, evaluate
from minitron.models import load_tokenizer
from minitron_search import search
from minitron_search.benchmarks import Benchmarks, benchmark_best
from minitron_search.latency import Latency
from minitron_search.pool import Pool
from minitron_search.trial import run_trial
from minitron_search.trial_store import trial_result, weights


def test_a_private_ray_listens_at_the_loopback_interface_alone(ray_here):
    """Its control store, node and workers ask for a token, but nobody else should even reach them."""
    assert ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote()) != os.getpid()
    listening, commands = {}, []
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # or a zombie
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    listening[each.laddr.ip] = process.name()
            commands.append(" ".join(process.cmdline()[:3]))
    assert all(any(name in command for command in commands) for name in ("gcs_server", "raylet"))
    # nothing to add nodes, to print what workers print, to serve a dashboard or to send it anything
    unused = ("monitor.py", "dashboard.py", "agent.py", "runtime_env")
    assert not [command for command in commands if any(name in command for name in unused)]
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening
    assert listening


@pytest.fixture(scope="module")
def searched(made, ray_here, tmp_path_factory):
    """Three candidates, their search task with weights kept, its result, and the pool."""
    folder = tmp_path_factory.mktemp("trials")
    found, task = made[2][:3], search_task(made, folder, rungs=(), keep_weights=True)
    return found, task, search(task, found), Pool(str(folder / "tune"), share={"CPU": 2}, max_failures=0)


def test_benchmarks_run_once_on_the_winner_and_the_next_best(made, bench, searched):
    found, task, plain, pool = searched
    tasks = (Task("arc_easy", data=str(bench / "arc.jsonl"), limit=10),)
    asked = Benchmarks(tasks=tasks, keep=2, tokenizer=made[0].teacher)
    assert all(storage.is_committed(weights(task.folder, a)) for a in found)

    result = benchmark_best(task, plain, found, asked, pool)
    assert [replace(candidate, benchmarks=()) for candidate in result.ranking] == plain.ranking
    scored = {candidate.architecture for candidate in result.ranking if candidate.benchmarks}
    ordered = sorted(plain.ranking, key=lambda candidate: (not candidate.winner, candidate.rank))
    assert scored == {candidate.architecture for candidate in ordered[:2]}
    assert result.table["arc_easy_stderr"].notna().sum() == 2
    assert result.failures == {}
    assert not any(storage.exists(weights(task.folder, a)) for a in found)

    # with one more candidate: stored scores are read, and the third is distilled again with the same result
    third = ordered[2].architecture
    before, known = json_files(task.folder), trial_result(task.folder, third)
    again = benchmark_best(task, plain, found, replace(asked, keep=3), pool)
    assert all(candidate.score("arc_easy") for candidate in again.ranking)
    changed = {path for path, time in json_files(task.folder).items() if before.get(path) != time}
    assert {path.name for path in changed} == {"result.json", Path(asked.path(task.folder, third)).name}
    assert trial_result(task.folder, third).per_row_kl == known.per_row_kl

    # the scores are those of the distilled student
    from minitron.models import load_model

    run_trial(task, third, lambda event: None)
    model = load_model(weights(task.folder, third))
    expected = evaluate(model, load_tokenizer(made[0].teacher), tasks)["arc_easy"]
    (score,) = next(candidate.benchmarks for candidate in again.ranking if candidate.architecture == third)
    assert (score.task, score.metric, score.value, score.stderr) == ("arc_easy", "acc", expected.value, expected.stderr)


def test_stored_scores_are_of_the_chat_template_if_a_task_uses_it_and_of_the_generation_settings():
    for chat_template in (False, True):
        asked = Benchmarks((Task("gsm8k", chat_template=chat_template),), 1, "teacher")
        templates = [replace(asked, chat_template=template).identity() for template in ("", "one", "another")]
        assert len({str(identity) for identity in templates}) == (3 if chat_template else 1)
        assert replace(asked, generation="other").identity() != asked.identity()


def test_a_failed_benchmark_is_reported_and_does_not_change_the_ranking(made, searched, tmp_path):
    found, task, plain, pool = searched
    (tmp_path / "arc.jsonl").write_text(json.dumps({"no": "question"}) + "\n")
    (tmp_path / "pages.jsonl").write_text(json.dumps({"page": "river stone light"}) + "\n")
    tasks = Task("arc_easy", data=str(tmp_path / "arc.jsonl")), Task("wikitext", data=str(tmp_path / "pages.jsonl"))
    asked = Benchmarks(tasks, keep=1, tokenizer=made[0].teacher)
    result = benchmark_best(task, plain, found, asked, pool)
    assert len(result.ranking) == 3
    for candidate in result.ranking:  # the score of the other task is kept
        metrics = [(score.task, score.metric) for score in candidate.benchmarks]
        assert metrics == ([("wikitext", "word_perplexity")] if candidate.winner else [])
    assert list(result.failures) == [plain.winner]
    assert "its benchmarks: arc_easy: " in result.failures[plain.winner]
    assert "does not fit" in result.failures[plain.winner]


def test_the_latency_of_an_architecture_is_measured_once(made, ray_here, tmp_path):
    large = made[2][0]
    small = replace(large, num_layers=1, hidden_size=24, intermediate_size=24)
    latency = Latency(made[0].teacher, "float32", batch=4, context=64, folder=str(tmp_path))
    counts = []
    found = latency.measure([large, small], share={"CPU": 1}, progress=lambda done, total: counts.append((done, total)))
    assert 0 < found[small] < found[large] < 10_000
    assert counts == [(2, 2)]
    before = json_files(tmp_path)
    assert len(before) == 2
    assert latency.measure([large, small], share={"CPU": 1}) == found
    assert json_files(tmp_path) == before
    longer = replace(latency, context=128).measure([small], share={"CPU": 1})
    assert longer[small] != found[small]
    assert len(json_files(tmp_path)) == 3
