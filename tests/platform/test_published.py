"""The report's table of benchmarks: the papers' figures beside ours, and what ours were measured on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from minitron.architecture import Architecture
from minitron.evaluation import Score, suite
from minitron.evaluation.benchmarks import METRIC
from minitron_platform.report.family import (
    DISTILLED,
    TEACHER,
    FamilyModel,
    benchmark_chart,
    benchmark_table,
    quality_chart,
)
from minitron_platform.report.published import PUBLISHED, SHOTS
from minitron_platform.stages.evaluate import Figures, score_metrics

METRICS = METRIC | {"gsm8k": "exact_match", "xlsum_en": "rougeL", "mbpp": "pass_at_1", "humaneval": "pass@1"}


def model(state, shots):
    tasks = {
        task: Score(task, METRICS.get(task, "acc"), 0.5, 0.02, 100, count, "1", "test", True, 1_000)
        for task, count in shots.items()
    }
    figures = Figures(
        parameters=10**9, loss=2.0, kl=0.1, top1_agreement=0.9, heldout_tokens=1_000, tasks=tasks, failures={}
    )
    with torch.device("meta"):
        return FamilyModel("mine", state, figures, Architecture.from_config(LlamaConfig()), 128)


def test_all_nine_benchmarks_of_the_papers_stand_beside_ours_with_their_source():
    assert {task.name: task.num_fewshot for task in suite("minitron-base").tasks} == SHOTS
    table = benchmark_table([model(TEACHER, SHOTS), model(DISTILLED, SHOTS)])
    rows = {row[0]: row[1:] for row in table.body}
    assert [column.split("\n")[0] for column in table.header[1:]] == list(SHOTS)
    assert rows["mine, distilled"] == ["50.0 ± 2.0"] * 9
    # arXiv 2407.14679, table 2, and 2408.11796, table 1
    assert " ".join(rows["Minitron 8B, published"]) == "79.0 52.6 63.8 80.7 51.3 42.6 31.2 35.2 31.6"
    assert " ".join(rows["MN-Minitron 8B, published"]) == "80.4 64.4 69.5 83.0 58.5 47.6 32.0 43.8 36.2"
    width = rows["Llama-3.1-Minitron 4B width, published"]
    assert " ".join(width[:8]) == "73.5 55.6 60.5 76.1 41.2 42.9 28.7 32.4"
    assert width[8] == "", "the paper states none"
    assert len(rows) == 2 + len(PUBLISHED)
    assert "published, not run here: arXiv 2408.11796, table 1 (Minitron 4B, " in table.caption
    assert "arXiv 2407.14679, table 2 (Minitron 8B)" in table.caption


def test_a_score_has_its_error_and_what_it_was_measured_on_in_tables_and_when_pointed_at():
    """That no error can be told is shown, too."""
    scored = model(DISTILLED, {"winogrande": 5, "sciq": 0})
    scored.figures.tasks["sciq"] = replace(scored.figures.tasks["sciq"], stderr=None)
    table = benchmark_table([scored])
    assert table.body[0] == ["mine, distilled", "50.0 ± 2.0", "50.0 ± -"]
    assert table.caption.startswith("± is the standard error; - where it cannot be told")
    on = "5-shot, first 100 of 1,000 documents of test"
    assert f"winogrande: acc, {on}" in table.caption
    quality, benchmarks = quality_chart([scored]), benchmark_chart([scored])
    assert benchmarks is not None
    pointed_at = [told(quality.rows[0], view) for name, view in quality.views.items() if name[0] == "winogrande acc"]
    assert len(pointed_at) == 3
    assert all(shown["acc, %"] == "50.0 ± 2.0" and shown["measured on"] == on for shown in pointed_at)
    assert [told(row, benchmarks.views[()])["%"] for row in benchmarks.rows] == ["50.0 ± 2.0", "50.0 ± -"]
    assert told(benchmarks.rows[0], benchmarks.views[()])["measured on"] == f"acc, {on}"


def told(row, view):
    """What a chart shows of the point of a row when it is pointed at, by title."""
    (tooltip,) = [layer["encoding"]["tooltip"] for layer in view["layer"] if "tooltip" in layer.get("encoding", {})]
    return {each.get("title", each["field"]): row[each["field"]] for each in tooltip}


@pytest.mark.parametrize("shots", [{"winogrande": 0}, {"sciq": 5}])
def test_published_scores_of_other_settings_are_not_shown(shots):
    mine = model(DISTILLED, shots)
    table = benchmark_table([mine])
    assert [row[0] for row in table.body] == ["mine, distilled"]
    assert "published" not in table.caption
    assert not [row for row in quality_chart([mine]).rows if row["state"] == "published"]


def test_metrics_of_scores_have_the_number_of_documents():
    """Also those of a registered model, which are beside no table."""
    tasks = model(DISTILLED, {"winogrande": 5}).figures.tasks
    measured = {"winogrande.acc": 0.5, "winogrande.acc_stderr": 0.02, "winogrande.documents": 100}
    assert score_metrics(tasks, "teacher.") == {f"teacher.{name}": value for name, value in measured.items()}


def test_the_table_says_what_each_score_was_measured_on():
    table = benchmark_table([model(DISTILLED, {"winogrande": 5})])
    assert "winogrande: acc, 5-shot, first 100 of 1,000 documents of test" in table.caption
