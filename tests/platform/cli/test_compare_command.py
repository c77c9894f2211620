"""`minitron compare` on files of results: which model is which, at every width."""

from __future__ import annotations

import json
import statistics
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
