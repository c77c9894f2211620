"""A recipe with every option of the search: a sampler, a limit on latency, benchmarks of the best candidates."""

from __future__ import annotations

import html
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import ClassVar

import datasets
import pytest
import yaml
from helpers.command import minitron_here
from helpers.tiny import texts
from mlflow.tracking import MlflowClient
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minitron.architecture import Architecture
from minitron.checkpoints.identity import checkpoint_identity
from minitron.errors import InputError, MinitronError
from minitron.evaluation import evaluate_documents, task_metric
from minitron_platform import plan, run, submit
from minitron_platform.estimates.outlook import Estimate
from minitron_platform.recipes.load import load_recipe
from minitron_platform.recipes.paths import with_absolute_paths
from minitron_platform.stages import order
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.evaluate import HELDOUT
from minitron_platform.stages.stage import Stage, StageOutput
from minitron_search.latency import Latency

SCORED, DISTILLED, BENCHMARKED = 8, 3, 2
PROMPTS = ["the model reads a row", "stone cloud"]


def _recipe(bench, latency_ms):
    values = yaml.safe_load((bench / "recipe.yaml").read_text())
    member = values["family"][0]
    member["space"] |= {"intermediate_size": {"from": 40, "to": 96, "step": 2}}
    member["points"] = [{"num_layers": 3, "hidden_size": 42, "intermediate_size": 77}]
    member["limits"] = {"batch": 2, "context": 64, "latency_ms": latency_ms, "token_latency_ms": 60_000}
    values["search"] |= {
        "sampler": {"candidates": SCORED, "seed": 1},
        "forward": {"keep": DISTILLED - 1},
        "rungs": [],
        "evaluate": {"keep": BENCHMARKED},
    }
    values["distill"] |= {"steps": 4, "warmup_steps": 1}
    pages = "".join(json.dumps({"page": text}) + "\n" for text in texts(3, seed=5))
    if not (bench / "pages.jsonl").exists():  # written once, because a new file has a new identity
        (bench / "pages.jsonl").write_text(pages)
    perplexity = {"name": "wikitext", "data": str(bench / "pages.jsonl")}
    values["search"]["evaluate"]["tasks"] = [*values["evaluate"]["tasks"], perplexity]
    values["evaluate"] = {"tasks": [perplexity], "prompts": PROMPTS}
    values["resources"] = {"workers": 1, "cpus_per_trial": 2}
    (bench / "all.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(str(bench / "all.yaml"))


def _outputs(result):
    """The outputs of the student's stages, as in their files."""
    outputs = result.state.family["tiny-student"].items()
    return {name: output.model_dump(mode="json") for name, output in outputs}


@pytest.fixture(scope="module")
def searched(bench, ray_here, empty_database):
    """The outputs of the student's stages, and the storage."""
    storage = bench / "all"
    storage.mkdir()
    shutil.copy(empty_database, storage)
    context = run(_recipe(bench, 60_000), storage_path=str(storage))
    return _outputs(context), storage


def test_the_plan_shows_how_many_candidates_are_sampled_timed_and_benchmarked(bench, searched):
    made = plan(_recipe(bench, 60_000), storage_path=str(searched[1]))
    (cost,) = [cost for cost in made.costs if cost.stage == "search"]
    assert cost.estimate.what.startswith(
        "at least 8 shapes timed, 8 candidates scored of 174 combinations, 3 distilled"
    )
    assert cost.estimate.what.endswith("arc_easy, wikitext for 2")
    assert made.candidates["tiny-student"][0].num_parameters <= 104_000


def test_the_sampled_candidates_are_scored_and_the_best_distilled(searched):
    found = searched[0]["search"]
    assert found["candidates"] == len(found["forward"]) == SCORED
    assert len(found["ranking"]) == DISTILLED
    distilled = [row["architecture"] for row in found["ranking"]]
    assert any((a["hidden_size"], a["intermediate_size"]) == (42, 77) for a in distilled)  # the point
    best = sorted(found["forward"], key=lambda row: row["kl_undistilled"])[: DISTILLED - 1]
    assert all(row["architecture"] in distilled for row in best)


def test_the_prompts_are_completed_by_the_teacher_and_the_student_before_and_after_its_distillation(searched):
    outputs, storage = searched
    completions = outputs["evaluate"]["completions"]
    assert completions["prompts"] == PROMPTS
    assert list(completions["texts"]) == ["teacher", "pruned", "distilled"]
    folder = outputs["distill"]["student"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompt, text in zip(PROMPTS, completions["texts"]["distilled"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=tokenizer.eos_token_id)[0]
        assert text == tokenizer.decode(expected[ids.shape[1] :], skip_special_tokens=True)
    assert len({tuple(texts) for texts in completions["texts"].values()}) > 1
    # its answers to the benchmark are kept for `minitron evaluate` and other recipes
    assert len(list((storage / "answers" / checkpoint_identity(Path(folder), tokenizer)).glob("*/*.json"))) == 1


def test_measurements_are_in_the_ranking_the_report_and_mlflow(searched):
    stages, storage = searched
    found = stages["search"]
    page = html.unescape(next((storage / "runs").glob("*/report.html")).read_text())
    scored = [row for row in found["ranking"] if row["benchmarks"]]
    assert len(scored) == BENCHMARKED
    assert any(row["winner"] for row in scored)
    for row in found["ranking"]:
        shape = Architecture.from_dict(row["architecture"])
        assert row["memory_bytes"] == 2 * shape.num_parameters + shape.kv_cache_bytes(2 * 64)
        assert row["latency_ms"] > 0
        assert all(f"<td>{row[name]:.3g}</td>" in page for name in ("latency_ms", "token_latency_ms"))
        for score in row["benchmarks"][:1]:
            assert score["task"] == "arc_easy"
            assert f"<td>{100 * score['value']:.1f} ± {100 * score['stderr']:.1f}</td>" in page
    assert '<th scope="col">arc_easy acc, %</th>' in page
    measured_on = scored[0]["benchmarks"][0]["measured_on"]
    assert measured_on.startswith("0-shot, ")
    assert re.search(rf"arc_easy: {re.escape(measured_on)}[^<]*\. ± is the standard error\.", page)
    assert "2 sequences of 64 tokens" in page
    times = [json.loads(path.read_text()) for path in (storage / "latency").glob("*.json")]
    measured = {(time["kind"], time["architecture"]): time["milliseconds"] for time in times}
    for row in found["ranking"]:
        shape = str(Architecture.from_dict(row["architecture"]))
        assert row["latency_ms"] == pytest.approx(measured["first", shape])
        assert row["token_latency_ms"] == pytest.approx(measured["further", shape])
    assert len(times) == 2 * SCORED  # only the candidates that were to be scored
    assert not list(Path(found["trials"]).glob("*/weights"))

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    trials = client.search_runs([experiment.experiment_id], "tags.`minitron.kind` = 'trial'")
    logged = {trial.data.metrics.get("arc_easy.acc") for trial in trials}
    assert {row["benchmarks"][0]["value"] for row in scored} <= logged
    assert all({"latency_ms", "token_latency_ms"} <= set(trial.data.metrics) for trial in trials)
    tags = [trial.data.tags.get("minitron.benchmark.arc_easy") for trial in trials]
    assert tags.count(f"acc, {measured_on}") == BENCHMARKED


def test_a_perplexity_is_shown_as_a_plain_number_everywhere(searched):
    stages, storage = searched
    page = html.unescape(next((storage / "runs").glob("*/report.html")).read_text())
    distilled = stages["evaluate"]["table"]["distilled"]["tasks"]["wikitext"]
    shown = task_metric("wikitext", "word_perplexity").with_error(distilled["value"], distilled["stderr"])
    assert shown == f"{distilled['value']:,.0f} ± {distilled['stderr']:,.0f}"  # in the thousands for a tiny model
    assert '<th scope="row">wikitext word_perplexity</th>' in page
    assert '<th scope="col">wikitext word_perplexity</th>' in page
    assert f"<td>{shown}</td>" in page
    assert "wikitext: word_perplexity (lower is better), 0-shot" in page
    assert f"{100 * distilled['value']:,.0f}" not in page

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    (evaluated,) = [run for run in runs if run.info.run_name == "evaluate"]
    assert evaluated.data.metrics["distilled.wikitext.word_perplexity"] == pytest.approx(distilled["value"])
    version = client.get_model_version("tiny-student", "1")
    assert version.tags["minitron.task.wikitext"] == f"word_perplexity {shown} (0-shot, all 3 documents of pages)"
    listed = minitron_here("models", "--storage", str(storage), cwd=storage)
    assert f"wikitext word_perplexity {shown} (0-shot, all 3" in listed.stdout


def test_a_submitted_recipe_has_absolute_paths_to_its_benchmarks(bench, monkeypatch):
    monkeypatch.chdir(bench)
    values = _recipe(bench, 60_000).model_dump(by_alias=True)
    values["search"]["evaluate"]["tasks"][0]["data"] = "arc.jsonl"
    sent = with_absolute_paths(type(load_recipe("all.yaml")).model_validate(values))
    assert sent.search.evaluate.tasks[0].data == str(bench / "arc.jsonl")


def test_a_latency_limit_that_no_candidate_meets_is_refused_with_the_lowest_latency(bench, searched):
    recipe = _recipe(bench, 1e-6)
    values = recipe.model_dump(by_alias=True)
    values["family"][0]["points"] = []
    values["family"][0]["space"]["intermediate_size"] = [72]
    values["search"]["sampler"] = None
    with pytest.raises(
        InputError,
        match=r"family.0.limits: no candidate .*timed, and the fastest takes .* ms to the first token, and .*further token",
    ):
        run(type(recipe).model_validate(values), storage_path=str(searched[1]))


def test_a_wait_for_room_to_measure_latency_can_be_ended(bench, ray_here, tmp_path):
    latency = Latency(str(bench / "teacher"), "float32", 1, 8, str(tmp_path))
    with pytest.raises(MinitronError, match="waited too long"):
        latency.measure(
            [Architecture.from_config(AutoConfig.from_pretrained(bench / "teacher"))],
            share={"CPU": 1000},  # more than there is
            look=partial(_raise, MinitronError("waited too long", "")),
        )


def _raise(error):
    raise error


class WordsOutput(StageOutput):
    words: int


class Words(Stage[WordsOutput]):
    """A stage that a user might add: it counts the words of the student's answers."""

    name = "words"
    version = 1
    per_model = True
    output_type = WordsOutput
    runs: ClassVar[list[str]] = []

    def inputs(self, state):
        return {"student": state.output(Distill).id}

    def estimate(self, outlook, member):
        return Estimate(f"what {member.model} answers", start_up_seconds=1)

    def run(self, context, folder):
        self.runs.append(context.member.model)
        return WordsOutput(words=7, summary="seven words")

    def metrics(self, output):
        return {"words": output.words}


def test_a_class_in_the_list_of_stages_adds_a_stage(bench, searched, monkeypatch, capsys):
    stages, storage = searched
    monkeypatch.setattr(order, "STAGES", (*order.STAGES, Words()))
    recipe = _recipe(bench, 60_000)
    (cost,) = [cost for cost in plan(recipe, storage_path=str(storage)).costs if cost.stage == "words"]
    assert (cost.estimate.what, cost.done) == ("what tiny-student answers", False)
    first, second = (run(recipe, storage_path=str(storage)) for _ in range(2))
    assert Words.runs == ["tiny-student"]  # run once
    assert first.output(Words) == second.output(Words)
    assert _outputs(first) == {**stages, "words": first.output(Words).model_dump(mode="json")}
    assert capsys.readouterr().out.count("seven words") == 2
    assert plan(recipe, storage_path=str(storage)).costs[-1].done
    assert (
        json.loads((first.report.parent / "results.json").read_text())["family"]["tiny-student"]["words"]["words"] == 7
    )
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert {run.data.metrics["words"] for run in runs if run.info.run_name == "words"} == {7.0}

    monkeypatch.setattr(Words, "version", 2)
    run(recipe, storage_path=str(storage), until="words")
    assert len(Words.runs) == 2


def test_a_metric_that_an_earlier_version_lacked_is_measured_by_itself_and_shown_everywhere(bench, searched):
    stages, storage = searched
    (finished,) = (storage / "stages" / "evaluate").glob(f"{stages['evaluate']['fingerprint']}")
    table = json.loads((finished / "stage.json").read_text())
    for figures in table["outputs"]["table"].values():
        del figures["top1_agreement"]
    (finished / "stage.json").write_text(json.dumps(table))
    for file in (finished / "pruned.json", finished / "distilled.json", *(storage / "quality").glob("*[!s].json")):
        quality = json.loads(file.read_text())
        del quality["top1_agreement"]
        file.write_text(json.dumps(quality))

    result = run(_recipe(bench, 60_000), storage_path=str(storage))
    assert _outputs(result) == stages
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    (evaluated,) = [run for run in runs if run.info.run_name == "evaluate"]
    page = html.unescape(result.report.read_text())
    for name, metric in HELDOUT.items():
        value = stages["evaluate"]["table"]["distilled"][name]
        assert evaluated.data.metrics[f"distilled.{name}"] == value
        assert result.table.loc["tiny-student distilled", name] == value
        assert f"<td>{metric.text(value)}</td>" in page


def test_the_result_of_a_run_has_students_a_table_and_a_report(bench, searched):
    result = run(_recipe(bench, 60_000), storage_path=str(searched[1]))
    (student,) = result.students
    assert (student.model, student.path) == ("tiny-student", searched[0]["distill"]["student"])
    assert list(result.table.index) == ["teacher", "tiny-student pruned", "tiny-student distilled"]
    assert result.table.loc["tiny-student distilled", "kl"] == student.kl
    assert "wikitext word_perplexity" in result.table.columns
    assert result.report.name == "report.html"
    assert result.output(Distill, "tiny-student").student == student.path
    with pytest.raises(
        InputError, match=r"model: 'tiny-studnet' is not in the recipe's family\n.*use one of tiny-student"
    ):
        result.output(Distill, "tiny-studnet")
    with pytest.raises(InputError, match=r"stage: 'distill' is not a stage"):
        result.output("distill")
    assert (
        repr(result)
        == f"RunResult({result.run_key}: tiny-student version 1: {student.parameters:,} parameters, KL {student.kl:.3f})"
    )


def test_run_and_submit_refuse_what_plan_refuses_before_anything_starts(bench, tmp_path):
    recipe = load_recipe(str(bench / "recipe.yaml"), ["distill.warmup_steps=1000"])
    with pytest.raises(InputError, match=r"distill.warmup_steps: 1000 leaves no step"):
        run(recipe, storage_path=str(tmp_path))
    with pytest.raises(InputError, match=r"distill.warmup_steps: 1000 leaves no step"):
        submit(recipe, address="http://127.0.0.1:1", storage_path=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_failed_benchmark_does_not_affect_the_others_and_is_retried_alone(bench, searched, monkeypatch):
    stages, storage = searched
    values = _recipe(bench, 60_000).model_dump(by_alias=True)
    values["evaluate"]["tasks"].append({"name": "arc_easy"})  # from the hub
    recipe = type(_recipe(bench, 60_000)).model_validate(values)
    asked = []

    def noted(model, tokenizer, tasks, **options):
        asked.append([task.name for task in tasks])
        return evaluate_documents(model, tokenizer, tasks, **options)

    def hub_is_away(*_, **__):
        raise ConnectionError("the hub is away")

    monkeypatch.setattr("minitron.evaluation.evaluate_documents", noted)
    monkeypatch.setattr(datasets, "load_dataset", hub_is_away)
    first = _outputs(run(recipe, storage_path=str(storage)))
    table = first["evaluate"]["table"]
    reason = "ConnectionError: the hub is away"
    assert all(table[model]["failures"] == {"arc_easy": reason} for model in ("teacher", "pruned", "distilled"))
    scores = table["distilled"]["tasks"]
    assert scores == stages["evaluate"]["table"]["distilled"]["tasks"]
    results = max((storage / "runs").glob("*/report.html"), key=lambda path: path.stat().st_mtime)
    page = html.unescape(results.read_text())
    assert ">arc_easy</th><td>failed</td><td>failed</td><td>failed</td>" in page
    assert "arc_easy failed: ConnectionError: the hub is away" in page
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    version = client.get_model_version("tiny-student", first["register"]["version"])
    assert version.tags["minitron.task.arc_easy"] == "failed: ConnectionError: the hub is away"

    questions = [json.loads(line) for line in (bench / "arc.jsonl").read_text().splitlines()]
    hub = {"test": datasets.Dataset.from_list(questions), "train": datasets.Dataset.from_list(questions)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    asked.clear()
    second = _outputs(run(recipe, storage_path=str(storage)))
    assert asked == [["arc_easy"]] * 3
    again = second["evaluate"]["table"]
    assert all(not row["failures"] for row in again.values())
    assert again["distilled"]["tasks"].keys() == {"wikitext", "arc_easy"}
    assert table["distilled"]["tokens_per_second"] is None  # not timed unless the recipe says so
    assert "tokens per second" not in page
    assert second["register"]["version"] == first["register"]["version"]
    version = client.get_model_version("tiny-student", first["register"]["version"])
    assert version.tags["minitron.task.arc_easy"].startswith("acc ")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    said = {run.data.tags["minitron.failed_benchmarks"] for run in runs if run.info.run_name == "evaluate"}
    assert said == {"none"}

    asked.clear()
    assert _outputs(run(recipe, storage_path=str(storage))) == second
    values["evaluate"]["throughput"] = True
    timed = _outputs(run(type(recipe).model_validate(values), storage_path=str(storage)))
    assert all(row["tokens_per_second"] > 0 for row in timed["evaluate"]["table"].values())
    assert "tokens per second" in html.unescape(results.read_text())
    assert asked == []
