"""Each gate refuses a version that fails it alone."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import tiny
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from minitron.evaluation.scores import DocumentResult, Evaluated, Score
from minitron.storage import committed_folder
from minitron_platform.cli.commands import main
from minitron_platform.gates import judge
from minitron_platform.gates.card import card
from minitron_platform.gates.documents import add_tasks, write_rows
from minitron_platform.gates.gate import Subject
from minitron_platform.promotion import GateError, promote
from minitron_platform.recipes.schema import Gates
from minitron_platform.tracking.registry import figure_tags, register
from minitron_platform.tracking.version_figures import Measured, VersionFigures

NAME = "tiny-family"
PARAMETERS = 268_704
ROWS = 40
CARD = "---\nbase_model: teacher\n---\n# Student\n"


def answers(wrong: int) -> Evaluated:
    """A benchmark of 40 documents, of which the first `wrong` have a wrong answer."""
    values = [float(number >= wrong) for number in range(ROWS)]
    score = Score("quiz", "acc", sum(values) / ROWS, 0.07, ROWS, 0, "1", "test", True)
    documents = tuple(DocumentResult(str(n), str(n), str(n), {"acc,none": value}) for n, value in enumerate(values))
    return Evaluated(score, "none", (), documents)


def measured(
    storage: Path,
    model: str,
    *,
    worse: float = 0.0,
    worse_kl: float = 0.0,
    worse_loss: float = 0.0,
    wrong: int = 10,
    failures: Any = None,
) -> Measured:
    """Figures of a model whose loss and KL are higher by `worse` than those of the others, with the rows they are means of."""
    result = answers(wrong)
    noise = [(number * 7 % ROWS) / ROWS for number in range(ROWS)]
    losses, kls = ([1 + each + worse + more for each in noise] for more in (worse_loss, worse_kl))
    path = f"{model}-documents.json"
    write_rows(str(storage / path), losses, kls)
    add_tasks(str(storage / path), {"quiz": result})
    loss, kl = (sum(rows) / ROWS for rows in (losses, kls))
    return Measured(loss=loss, kl=kl, tasks={"quiz": result.score}, failures=failures or {}, documents=path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Committed folders: a good student, the champion before it, and one without one of its tensors."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, seed in (("champion", 1), ("good", 2), ("broken", 3), ("without a card", 4)):
        with committed_folder(str(folder / name)) as temporary:
            words = tiny.tokenizer()
            tiny.model("llama", vocab_size=len(words), seed=seed).save_pretrained(temporary)
            words.save_pretrained(temporary)
            if name != "without a card":
                (temporary / "README.md").write_text(CARD)
            if name == "broken":
                tensors = load_file(temporary / "model.safetensors")
                del tensors["model.norm.weight"]
                save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def load_once() -> Any:
    """The real function, which starts a process for each different folder once."""
    load = judge.load_in_clean_process
    once = cache(lambda folder: load(Path(folder), repeats=1))
    return lambda folder, **settings: once(str(folder))


@pytest.fixture
def registry(tmp_path: Path, checkpoints: Path, empty_database: Path, load_once: Any, monkeypatch: Any) -> Any:
    """A registry with a champion and a good candidate: a function that promotes a version after changing what is recorded
    for it, and returns the gates that failed."""
    monkeypatch.setattr(judge, "load_in_clean_process", load_once)
    shutil.copy(empty_database, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)

    def tags(
        gates: Gates | None = None,
        parameters: int = PARAMETERS,
        kind: str | None = None,
        pruned: float = 2.0,
        pruned_kl: float = 0.0,
        lacks: str | None = None,
        **student: Any,
    ) -> dict[str, str]:
        name = f"model-{len(list(tmp_path.iterdir()))}"
        mine, teacher = measured(tmp_path, name, **student), measured(tmp_path, "teacher", worse=-0.1, wrong=8)
        parent = measured(tmp_path, "parent") if kind else None
        before = measured(tmp_path, "pruned", worse=pruned, worse_kl=pruned_kl)
        figures = VersionFigures(heldout="rows", student=mine, teacher=teacher, pruned=before, parent=parent)
        values = figures.model_dump(mode="json")
        match lacks:
            case "teacher":
                del values["teacher"]
            case "the teacher's tasks":
                values["teacher"]["tasks"] = {}
            case "kl":
                values["student"]["kl"] = None
        recorded = {} if lacks == "figures" else figure_tags(VersionFigures.model_validate(values))
        return {
            **({"minitron.kind": kind, "minitron.cut_from": f"{NAME} version 1"} if kind else {}),
            **recorded,
            "minitron.parameters": str(parameters),
            "minitron.gates": (gates or Gates()).model_dump_json(),
        }

    def add(name: str, **changes: Any) -> str:
        return register(uri, name=NAME, source=str(checkpoints / name), run_id=None, tags=tags(**changes))

    add("champion")
    client.set_registered_model_alias(NAME, "champion", "1")

    def failed(name: str = "good", **changes: Any) -> list[str]:
        version = add(name, **changes)
        try:
            promote(tmp_path, NAME, version=version)
        except GateError as refused:
            assert str(client.get_model_version_by_alias(NAME, "champion").version) == "1"
            return [verdict.gate for verdict in refused.verdicts if verdict.status == "failed"]
        assert str(client.get_model_version_by_alias(NAME, "champion").version) == version
        client.set_registered_model_alias(NAME, "champion", "1")
        return []

    return SimpleNamespace(failed=failed, client=client, root=tmp_path, add=add)


def test_a_good_version_passes_and_who_promoted_it_and_what_was_measured_is_on_the_version(registry: Any) -> None:
    assert registry.failed(worse=-0.02) == []
    recorded = json.loads(registry.client.get_model_version(NAME, "2").tags["minitron.promoted.champion"])
    assert " on " in recorded["by"]
    assert recorded["previous"] == "1"
    assert "reason" not in recorded
    said = {verdict["gate"]: (verdict["status"], verdict["measured"]) for verdict in recorded["gates"]}
    assert said["KL to the teacher against version 1"] == ("passed", "0.020 better (±0.000, paired)")
    assert said["quiz against version 1"][1] == "0.0 (±4.8, paired; 0-shot, first 40 documents of test)"
    assert said["weights"] == ("passed", "6 files compared")
    assert said["licence"][0] == "unknown"


@pytest.mark.parametrize(
    ("gate", "changes"),
    [
        ("loads with transformers", {"name": "broken"}),
        ("parameters", {"parameters": PARAMETERS + 1}),
        ("size", {"gates": Gates(max_parameters=PARAMETERS - 1)}),
        ("memory of the weights", {"gates": Gates(max_memory_bytes=4 * PARAMETERS - 1)}),
        ("first token after 9 tokens, on CPU", {"gates": Gates(max_latency_ms=1e-6, latency_tokens=9)}),
        ("licence", {"gates": Gates(card=True)}),
        ("KL to the teacher", {"gates": Gates(max_kl=1.4)}),
        ("loss against the teacher", {"gates": Gates(max_loss_increase=0.09)}),
        ("quiz against the teacher", {"wrong": 12, "gates": Gates(max_task_loss=0.0)}),
        ("arc", {"failures": {"arc": "out of memory"}}),
        ("quiz against version 1", {"wrong": 30}),
        ("KL to the teacher against version 1", {"worse_kl": 0.02}),
        ("held-out loss against version 1", {"worse_loss": 0.02}),
        ("KL to the teacher against the pruned model", {"pruned_kl": -2.1}),
        ("held-out loss against the pruned model", {"pruned": -0.1, "pruned_kl": 0.2}),
        ("model card", {"name": "without a card", "gates": Gates(card=True)}),
        ("held-out loss against its parent", {"kind": "aligned", "worse": 0.11}),
        ("quiz against its parent", {"kind": "quantised", "wrong": 30}),
    ],
)
def test_a_version_that_fails_one_gate_is_refused(registry: Any, gate: str, changes: dict[str, Any]) -> None:
    assert registry.failed(**changes) == [gate]


@pytest.mark.parametrize(
    ("gates", "changes"),
    [
        (["quality against version 1"], {"lacks": "figures"}),
        (["quality", "quality against version 1"], {"lacks": "figures", "gates": Gates(max_task_loss=0.1)}),
        (["KL to the teacher", "KL to the teacher against version 1"], {"lacks": "kl", "gates": Gates(max_kl=9.0)}),
        (["loss against the teacher"], {"lacks": "teacher", "gates": Gates(max_loss_increase=9.0)}),
        (["quiz against the teacher"], {"lacks": "the teacher's tasks", "gates": Gates(max_task_loss=1.0)}),
        (["held-out loss against version 1"], {"worse_loss": math.nan}),
        (["held-out loss against the pruned model"], {"worse_loss": math.nan}),
        (["quiz against the teacher"], {"wrong": 40, "lacks": "teacher", "gates": Gates(max_task_loss=1.0)}),
    ],
)
def test_what_a_limit_or_the_champion_asks_for_must_have_been_measured(
    registry: Any, gates: list[str], changes: dict[str, Any]
) -> None:
    assert set(gates) <= set(registry.failed(**changes))


def test_a_champion_whose_figures_are_no_numbers_does_not_keep_its_successor_out(registry: Any) -> None:
    tags = registry.client.get_model_version(NAME, "1").tags
    figures = VersionFigures.model_validate_json(tags["minitron.figures"])
    score = replace(figures.student.tasks["quiz"], value=math.nan, stderr=math.nan)
    broken = figures.student.model_copy(
        update={"loss": math.nan, "kl": math.nan, "tasks": {"quiz": score}, "documents": None}
    )
    for tag, value in figure_tags(figures.model_copy(update={"student": broken})).items():
        registry.client.set_model_version_tag(NAME, "1", tag, value)
    assert registry.failed() == []
    assert registry.failed(worse_loss=math.nan) == [
        "held-out loss against the pruned model",
        "held-out loss against version 1",
    ]


def test_a_version_that_is_worse_than_the_champion_is_refused_if_the_difference_is_beyond_its_uncertainty(
    registry: Any,
) -> None:
    worse = ["KL to the teacher against version 1", "held-out loss against version 1"]
    assert registry.failed(worse=0.02) == worse
    assert registry.failed(wrong=13) == []  # 3 of 40 answers
    assert registry.failed(worse=0.009) == []  # the tolerance


def test_a_variant_is_judged_against_its_parent_and_not_against_the_teacher(registry: Any) -> None:
    strict = Gates(max_kl=0.1, max_loss_increase=0.0, max_task_loss=0.0)
    for kind in ("aligned", "quantised"):
        assert registry.failed(kind=kind, worse=0.09, gates=strict) == []
    narrow = Gates(variant_tolerance=0.05)
    kl, loss = (f"{what} against its parent" for what in ("KL to the teacher", "held-out loss"))
    assert registry.failed(kind="quantised", worse=0.09, gates=narrow) == [loss, kl]
    assert registry.failed(kind="aligned", worse=0.09, gates=narrow) == [loss]


def test_a_missing_card_is_refused_only_if_the_recipe_wants_one(registry: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for gates, status in ((Gates(), "unknown"), (Gates(card=True), "failed")):
        subject = Subject(None, tmp_path / "empty", gates, judge.load_in_clean_process, None, None)  # type: ignore[arg-type]
        assert [(verdict.gate, verdict.status) for verdict in card(subject)] == [("model card", status)]
    (tmp_path / "empty" / "README.md").write_text(CARD.replace("teacher", "teacher\nlicense: apache-2.0"))
    assert [verdict.status for verdict in card(subject)] == ["passed", "passed"]


def test_the_command_shows_what_failed_and_forces_only_with_a_reason_that_is_recorded(registry: Any) -> None:
    def command(*arguments: str) -> Any:
        return CliRunner(env={"COLUMNS": "200"}).invoke(
            main, ["promote", NAME, "--to", "champion", "--storage", str(registry.root), *arguments]
        )

    registry.add("good", worse=0.5)
    refused = command()
    assert refused.exit_code == 2
    assert "0.500 worse (±0.000, paired)" in refused.stdout
    assert "version 2 of tiny-family is not promoted: KL to the teacher against version 1" in refused.stderr
    assert "--reason" in command("--force").stderr
    forced = command("--force", "--reason", "the champion is withdrawn")
    assert forced.exit_code == 0, forced.output
    assert "champion is version 2 (was version 1)" in forced.stdout
    assert "champion was already version 2" in command().stdout
    recorded = json.loads(registry.client.get_model_version(NAME, "2").tags["minitron.promoted.champion"])
    assert (recorded["forced"], recorded["reason"]) == (True, "the champion is withdrawn")


def test_a_promotion_and_a_rollback_tell_the_hook_which_way_the_alias_went(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = registry.root / "told.jsonl"
    program = registry.root / "tell.py"
    program.write_text("import sys\nopen(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')\n")
    registry.add("good")
    monkeypatch.setenv("MINITRON_ON_PROMOTE", shlex.join([sys.executable, "-S", str(program), str(told)]))
    for arguments in (["promote", NAME], ["rollback", NAME]):
        done = CliRunner().invoke(main, [*arguments, "--storage", str(registry.root)])
        assert done.exit_code == 0, done.output
    promoted, rolled_back = (json.loads(line) for line in told.read_text().splitlines())
    moves = [[event[key] for key in ("event", "previous", "version")] for event in (promoted, rolled_back)]
    assert moves == [["promoted", "1", "2"], ["rolled_back", "2", "1"]]
    assert rolled_back["source"].endswith("/champion")
    assert rolled_back["by"] == promoted["by"]
    refused = CliRunner().invoke(main, ["rollback", NAME, "--storage", str(registry.root), "--on-promote", "'"])
    assert "on-promote" in refused.stderr
    assert refused.exit_code == 2
