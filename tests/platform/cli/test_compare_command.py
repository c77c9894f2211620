"""`minitron compare` on files of results: which model is which, at every width."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from minitron.evaluation import DocumentResult, Evaluated, Score, Task
from minitron.evaluation import comparison as comparisons
from minitron.evaluation.result_file import ModelResults, results_json
from minitron_platform.cli.commands import main

COUNT = 40


def accuracy(wrong: int) -> Evaluated:
    values = [float(number >= wrong) for number in range(COUNT)]
    documents = tuple(
        DocumentResult(str(n), f"hash {n}", str(n), {"acc,none": value}) for n, value in enumerate(values)
    )
    score = Score("arc_easy", "acc", statistics.fmean(values), 0.07, COUNT, 0, "1", "test", True, 100)
    return Evaluated(score, "none", (), documents)


def correlation(shift: float, draws: int = 3) -> Evaluated:
    """A score that is no mean over documents."""
    documents = tuple(DocumentResult(str(n), f"hash {n}", str(n), {}) for n in range(COUNT))
    score = Score("mnli", "mcc", 0.5 + shift, 0.1, COUNT, 0, "1", "test", True, 100)
    return Evaluated(score, "none", (), documents, (), tuple(0.5 + shift * n for n in range(draws)))


def written(path: Path, models: dict[str, dict[str, Evaluated]]) -> str:
    results = [ModelResults(name, "0" * 16, 1, "float32", "cpu", tasks) for name, tasks in models.items()]
    path.write_text(json.dumps(results_json(results, [Task("arc_easy")])))
    return str(path)


def compared(*files: str, columns: str | None = None) -> list[str]:
    """The lines that the command prints, by default as into a file."""
    done = CliRunner(env={"COLUMNS": columns}).invoke(main, ["compare", *files], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return str(done.stdout).splitlines()


def cells(lines: list[str], column: int) -> list[str]:
    """The texts of a column of the table of differences, each in one piece."""
    texts: list[str] = []
    for line in lines[next(n for n, line in enumerate(lines) if line.startswith("differences to")) :]:
        if line.startswith("│"):
            parts = [part.strip() for part in line.strip("│").split("│")]
            if parts[0].startswith("arc_easy"):
                texts.append(parts[column])
            else:
                texts[-1] += parts[column]
    return texts


@pytest.mark.parametrize("columns", ["80", None])
def test_models_with_long_names_are_told_apart(tmp_path: Path, columns: str | None) -> None:
    folder = "/checkpoints/smollm2-135m-distilled-on-the-whole-corpus"
    names = [f"{folder}/run-{letter}/student" for letter in "abc"]
    both = written(tmp_path / "r.json", {name: {"arc_easy": accuracy(n)} for n, name in enumerate(names)})
    lines = compared(both, columns=columns)
    assert cells(lines, 1) == ["run-b/student", "run-c/student"]
    text = "".join(line.strip() for line in lines)
    assert "…" not in text
    for name in names:  # what the short names mean
        assert f"run-{name[len(folder) + 5]}/student: {name}".replace(" ", "") in text.replace(" ", "")


@pytest.mark.parametrize("columns", ["80", None])
def test_models_whose_last_folders_are_long_are_numbered(tmp_path: Path, columns: str | None) -> None:
    names = [f"/runs/student-of-{40 * 'x'}-{step}/model" for step in (1000, 2000)]
    lines = compared(
        written(tmp_path / "r.json", {name: {"arc_easy": accuracy(n)} for n, name in enumerate(names)}), columns=columns
    )
    assert cells(lines, 1) == ["2"]
    assert "differences to 1" in " ".join(lines)
    assert f"2:{names[1]}" in "".join(lines).replace(" ", "")


def test_one_model_of_two_files_is_named_by_its_file(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{name}.json", {"/x/student": {"arc_easy": accuracy(2)}}) for name in ("old", "new")]
    lines = compared(*files, columns="80")
    assert "differences to old.json" in " ".join(lines)
    assert cells(lines, 1) == ["new.json"]


def test_a_long_task_is_folded_and_not_cut(tmp_path: Path) -> None:
    task = "leaderboard_math_counting_and_probability_hard"
    models = {name: {f"{task}_{n}": accuracy(wrong) for n in (1, 2)} for wrong, name in enumerate(("one", "two"))}
    lines = compared(written(tmp_path / "r.json", models), columns="80")
    assert "…" not in "".join(lines)


def test_the_error_of_replicates_is_computed_once_for_each_task(tmp_path: Path, monkeypatch: Any) -> None:
    counted = []
    own = comparisons.error_of_replicates

    def error(first: Evaluated, second: Evaluated) -> Any:
        counted.append(second.score.value)
        return own(first, second)

    monkeypatch.setattr(comparisons, "error_of_replicates", error)
    models = {
        name: {"mnli": correlation(shift), "old": correlation(shift, draws=0), "arc_easy": accuracy(2)}
        for name, shift in (("one", 0.0), ("two", 0.1), ("three", 0.2))
    }
    text = " ".join(compared(written(tmp_path / "r.json", models)))
    assert "old of two is not compared: mcc is no mean over documents" in text
    assert sorted(counted) == sorted([0.6, 0.7] * 2)


def refused(*files: str) -> str:
    """The error that the command prints, on one line."""
    done = CliRunner().invoke(main, ["compare", *files], catch_exceptions=False)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


FIRST = ("models", 0)
RESULT = (*FIRST, "tasks", "arc_easy")
DOCUMENT = (*RESULT, "documents", 3)
WRONG: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "text for a number": (
        (*DOCUMENT, "values", "acc,none"),
        "x",
        "models.0.tasks.arc_easy.documents.3.values.acc,none: 'x' is not of type 'number'",
    ),
    "true for a number": ((*DOCUMENT, "values", "acc,none"), True, "values.acc,none: True is not of type 'number'"),
    "a number that is too large": (
        (*DOCUMENT, "values", "acc,none"),
        10**400,
        "is not JSON (1000000000… is too large",
    ),
    "no document": (DOCUMENT, None, "models.0.tasks.arc_easy.documents.3: None is not of type 'object'"),
    "a number for a name": ((*FIRST, "model"), 5, "models.0.model: 5 is not of type 'string'"),
    "no text and not null": ((*FIRST, "chat_template"), 5, "models.0.chat_template: 5 is not of type 'string', 'null'"),
    "a list for an object": ((*FIRST, "tasks"), [], "models.0.tasks: [] is not of type 'object'"),
    "no model": (FIRST, 5, "models.0: 5 is not of type 'object'"),
    "an engine that is none": ((*FIRST, "engine"), "tgi", "models.0.engine: 'tgi' is not one of ['transformers', "),
    "fewer examples than none": (
        (*RESULT, "score", "num_fewshot"),
        -1,
        "num_fewshot: -1 is less than the minimum of 0",
    ),
    "half a document": ((*RESULT, "score", "num_documents"), 0.5, "num_documents: 0.5 is not of type 'integer'"),
    "an unknown key": (
        (*DOCUMENT, "colour"),
        "red",
        "documents.3: Additional properties are not allowed",
    ),
    "settings of a task": (("settings", "arc_easy"), 5, "settings.arc_easy: 5 is not of type 'object'"),
    "no documents": ((*RESULT, "documents"), [], "arc_easy.documents: has no documents, but the score is of 40"),
    "no models": (("models",), [], "has no models"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_file_is_refused_by_name_key_and_value(tmp_path: Path, case: str) -> None:
    keys, value, problem = WRONG[case]
    whole = written(tmp_path / "whole.json", {"one": {"arc_easy": accuracy(2)}})
    content = json.loads(Path(whole).read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(content))
    message = refused(whole, str(damaged))
    assert "damaged.json: " in message
    assert problem in message
    assert "give a file that `minitron evaluate --out FILE.json` wrote" in message


def test_a_key_that_is_missing_and_a_document_that_is_there_twice_are_named(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.json", {"one": {"arc_easy": accuracy(2)}})
    content = json.loads(Path(whole).read_text())
    documents = content["models"][0]["tasks"]["arc_easy"]["documents"]
    documents.append(documents[7])
    content["models"][0]["tasks"]["arc_easy"]["score"]["num_documents"] = COUNT + 1
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(content))
    assert "models.0.tasks.arc_easy.documents: document '7' is there twice" in refused(whole, str(damaged))
    del documents[4]["hash"]
    damaged.write_text(json.dumps(content))
    assert "models.0.tasks.arc_easy.documents.4: 'hash' is a required property" in refused(whole, str(damaged))


def test_a_folder_and_a_name_below_a_file_are_no_files_of_results(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.json", {"one": {"arc_easy": accuracy(2)}})
    message = refused(str(tmp_path), whole)
    assert f"{tmp_path}: is a folder, not a file of results" in message
    assert "give a file that `minitron evaluate --out FILE.json` wrote" in message
    assert f"{whole}/x: no such file" in refused(whole, f"{whole}/x")


@pytest.mark.parametrize("values", [[math.inf, -math.inf], [math.inf], [math.nan]])
def test_values_that_are_not_finite_are_not_compared(tmp_path: Path, values: list[float]) -> None:
    """A model in float16 may give a text a log-likelihood of minus infinity."""
    usual = accuracy(2)
    documents = [
        replace(each, values={"acc,none": value}) for each, value in zip(usual.documents, values, strict=False)
    ]
    wrong = replace(usual, documents=(*documents, *usual.documents[len(documents) :]))
    wrong = replace(wrong, score=replace(wrong.score, value=sum(values)))
    models = {"one": {"arc_easy": usual, "other": usual}, "two": {"arc_easy": wrong, "other": usual}}
    text = " ".join(compared(written(tmp_path / "r.json", models)))
    assert "arc_easy of two is not compared: acc is no mean over documents with finite values" in text


def test_other_numbers_of_replicates_are_not_compared(tmp_path: Path) -> None:
    for draws in ((3, 4), (1, 1)):
        one, two = ({"mnli": correlation(0.1 * n, draws[n]), "arc_easy": accuracy(2)} for n in range(2))
        text = " ".join(compared(written(tmp_path / "r.json", {"one": one, "two": two})))
        assert "mnli of two is not compared" in text
