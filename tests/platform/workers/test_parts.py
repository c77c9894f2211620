"""Independent parts as tasks of Ray: order, retries, cancellation; the text of a run packed by them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import tiny
from helpers.part_work import logged, with_a_death, work

from minitron.data import InParts, TextSource, pack, parts
from minitron.environment import environment_variables
from minitron.errors import InputError, MinitronError
from minitron.storage import manifest, verify
from minitron_platform import load_recipe, run
from minitron_platform.cluster.ray_session import ray_session
from minitron_platform.stages import data
from minitron_platform.workers.look import no_look
from minitron_platform.workers.parts import run_parts


@pytest.fixture(scope="module", autouse=True)
def session():
    helpers = str(Path(__file__).parents[2])  # workers import the work from there
    path = os.pathsep.join([helpers, *filter(None, [os.environ.get("PYTHONPATH")])])
    with environment_variables({"PYTHONPATH": path}), ray_session(None, num_cpus=2):
        yield


def test_results_are_in_order_and_a_part_whose_worker_dies_is_run_again(tmp_path):
    said = []
    begun = []

    def numbers():
        for number in range(7):
            begun.append(number)
            yield number

    results = run_parts(work, str(tmp_path), numbers(), max_failures=1, say=said.append, look=no_look)
    assert next(results) == 0
    assert len(begun) <= 5, "not many more parts are started than results were taken"
    assert list(results) == [1, 4, 9, 16, 25, 36]
    assert len(said) == 1
    assert "part 1: its worker or node died, running it again (1 of 1 failures)" in said[0]
    calls = {path.name: len(path.read_text()) for path in tmp_path.iterdir()}
    assert calls == {str(number): 2 if number == 1 else 1 for number in range(7)}


def test_an_error_ends_all_parts_and_too_many_deaths_are_one(tmp_path):
    with pytest.raises(InputError, match="part 7 is wrong") as error:
        list(run_parts(work, str(tmp_path), [7, 100, 101], max_failures=0, say=print, look=no_look))
    assert error.value.remedy == "correct it"
    with pytest.raises(MinitronError, match="part 0 failed 1 times: its worker or node died"):
        list(run_parts(work, str(tmp_path), [1], max_failures=0, say=print, look=no_look))
    assert list(run_parts(work, str(tmp_path), [2, 3], max_failures=0, say=print, look=no_look)) == [4, 9], (
        "both CPUs are free again"
    )


def test_what_libraries_log_in_a_worker_has_no_secrets(tmp_path):
    said = "retrying https://me:hunter2@host/text?token=abc"
    assert list(run_parts(logged, "", [said], max_failures=0, say=print, look=no_look)) == [
        "retrying https://host/text"
    ]


def test_a_worker_that_dies_costs_the_shard_that_it_was_writing(tmp_path, monkeypatch):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in tiny.texts(600)))
    source, tokenizer = TextSource("jsonl", f"{tmp_path}/text.jsonl"), tiny.tokenizer()
    sizes = {"seq_length": 24, "train_rows": 400, "heldout_rows": 40, "heldout_fraction": None, "shard_rows": 64}
    monkeypatch.setattr(parts, "PART_BYTES", 4000)
    calls, said = tmp_path / "calls", []
    calls.mkdir()

    def in_tasks(function, common, jobs):
        work = (function, common, str(calls))
        return run_parts(with_a_death, work, jobs, max_failures=1, say=said.append, look=no_look)

    pack(source, tokenizer, f"{tmp_path}/rows", in_parts=InParts(f"{tmp_path}/parts", in_tasks), **sizes)
    pack(source, tokenizer, f"{tmp_path}/one-go", **sizes)
    assert manifest(f"{tmp_path}/rows") == manifest(f"{tmp_path}/one-go")
    verify(f"{tmp_path}/rows")
    names = ["heldout-00000.bin", *(f"train-0000{number}.bin" for number in range(7))]
    assert {call.name: len(call.read_text()) for call in calls.iterdir()} == dict.fromkeys(names, 1) | {names[2]: 2}
    assert len(said) == 1
    assert "its worker or node died, running it again" in said[0]


def test_tasks_of_ray_pack_the_rows_that_one_process_packs(bench, tmp_path, empty_database, monkeypatch, capsys):
    lines = (bench / "text.jsonl").read_text().splitlines()
    for name, part in (
        ("a", lines[::3]),
        ("b", [json.dumps({"text": None}), *lines[1::3], lines[0]]),
        ("held", lines[2::3]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    paths = [f"{tmp_path}/{name}.jsonl" for name in "ab"]
    texts = [{"kind": "jsonl", "path": path, "weight": 0.5, "on_missing": "skip"} for path in paths]
    recipe = load_recipe(
        str(bench / "recipe.yaml"),
        [
            f"data.sources={json.dumps(texts)}",
            f"data.heldout={json.dumps({'kind': 'jsonl', 'path': f'{tmp_path}/held.jsonl'})}",
            "data.kind=null",
            "data.path=''",
            "data.drop_duplicates=true",
        ],
    )
    monkeypatch.setattr(parts, "PART_BYTES", 10_000)
    folders, asked = {}, []
    for way, tokens in (("here", 10**9), ("tasks", 0)):
        (tmp_path / way).mkdir()
        shutil.copy(empty_database, tmp_path / way / "mlflow.db")
        monkeypatch.setattr(data, "TASK_TOKENS", tokens)
        monkeypatch.setattr(data, "InParts", lambda *arguments: asked.append(arguments) or InParts(*arguments))
        result = run(recipe, storage_path=str(tmp_path / way), until="data")
        (folders[way],) = (tmp_path / way).glob("**/rows/manifest.json")
    assert folders["here"].read_text() == folders["tasks"].read_text()
    assert len(asked) == 1
    assert not list((tmp_path / "tasks").glob("**/parts/*"))
    output = capsys.readouterr().out
    assert "tokens/s" in output
    assert "a.jsonl" in output
    assert "documents, left out: 1 without text" in output
    assert f"held-out text: jsonl {tmp_path}/held.jsonl" in output
    packed = result.output(data.Data)
    assert [source.name for source in packed.sources] == [
        f"jsonl {path}" for path in [*paths, f"{tmp_path}/held.jsonl"]
    ]
    assert packed.sources[2].tokens == packed.heldout_tokens
    metrics = data.Data().metrics(packed)
    for name, source in zip(("source_0", "source_1", "heldout_source"), packed.sources, strict=True):
        assert metrics[f"tokens.{name}"] == source.tokens > 0
        assert metrics[f"documents.{name}"] == source.documents > 0
    assert metrics["left_out.missing"] == metrics["left_out.missing.source_1"] == 1
