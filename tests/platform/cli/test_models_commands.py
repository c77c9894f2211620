"""`minitron models` and its commands, on a registry with a small family."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.hub_server import Hub, hub_server
from helpers.mlflow_server import free_port
from huggingface_hub import constants
from mlflow import MlflowClient

from minitron.evaluation.scores import Score
from minitron.storage import committed_folder, verify
from minitron_platform.cli.commands import main
from minitron_platform.gates.documents import write_rows
from minitron_platform.tracking.registry import register
from minitron_platform.tracking.version_figures import Measured, VersionFigures

SCORES = {
    task: Score(task, "acc", 0.5, error, 100, 0, "1", "test", True)
    for task, error in (("quiz", 0.05), ("arc", 0.05), ("piqa", None))
}


@pytest.fixture
def family(tmp_path: Path, empty_database: Path) -> Path:
    """A storage with two versions of a large student, a small one that was cut from the first, and a tiny one cut from that."""
    shutil.copy(empty_database, tmp_path)
    for name, version, layers, loss, cut_from in (
        ("large", 1, 20, 2.0, "teacher"),
        ("large", 2, 18, 2.125, "teacher"),
        ("small", 1, 12, 2.5, "large version 1"),
        ("tiny", 1, 8, 3.0, "small version 1"),
    ):
        run = f"{name}-{version}"
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "recipe.yaml").write_text(yaml.safe_dump({"distill": {"steps": 10 * version}}))
        write_rows(str(tmp_path / f"{run}.json"), [loss - 0.5, loss + 0.5], [loss - 1.5, loss - 0.5])
        with committed_folder(str(tmp_path / "students" / run)) as folder:
            (folder / "config.json").write_text(f'{{"layers": {layers}}}')
            (folder / "model.safetensors").write_bytes(bytes([layers]) * 1000)
        figures = VersionFigures(
            heldout="rows",
            student=Measured(loss=loss, kl=loss - 1, documents=f"{run}.json", tokens_per_second=1234.0, tasks=SCORES),
            teacher=Measured(loss=1.5, kl=0.0, tasks={"quiz": replace(SCORES["quiz"], num_documents=50)}),
        )
        tags = {
            "minitron.teacher": "acme/base",
            "minitron.teacher_corrected": "True",
            "minitron.cut_from": cut_from,
            "minitron.architecture": json.dumps({"num_layers": layers, "hidden_size": 64}),
            "minitron.run": run,
            "minitron.parameters": str(layers * 1000),
            "minitron.figures": figures.model_dump_json(),
        }
        source = str(tmp_path / "students" / run)
        register(f"sqlite:///{tmp_path}/mlflow.db", name=name, source=source, run_id=None, tags=tags)
    return tmp_path


def command(family: Path, *arguments: str, **options: Any) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["models", *arguments, "--storage", str(family)], **options)


def test_models_lists_alias_and_speed_of_the_family(family: Path) -> None:
    lines = command(family).stdout.splitlines()
    (newest,) = [line for line in lines if "large" in line and "candidate" in line and "1,234" in line]
    assert " 2 " in newest


@pytest.mark.parametrize("columns", ["30", "60", "80"])
def test_models_shows_names_and_figures_on_a_narrow_terminal_too(family: Path, columns: str) -> None:
    narrow = CliRunner(env={"COLUMNS": columns}).invoke(main, ["models", "--storage", str(family)]).stdout
    assert "…" not in narrow
    table = narrow.split("KL to the")[0].splitlines()
    newest = next(line for line in table if "large" in line)
    assert "candidat" in newest
    assert "1,234" in newest
    assert "tokens/s" in table[1]
    assert columns == "30" or max(map(len, table)) <= int(columns)


def test_models_show_prints_the_lineage_from_the_teacher_on(family: Path) -> None:
    shown = command(family, "show", "small").stdout
    assert [line.strip(" └─") for line in shown.split("lineage\n")[1].splitlines()] == [
        "acme/base (teacher)",
        "acme/base, corrected on the text",
        "large version 1",
        "small version 1  <- this one",
        "tiny version 1",
    ]
    assert "2.500" in shown
    assert "1.500" in shown  # the teacher's loss
    rows = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    on = "(0-shot, first 100 documents of test)"
    assert f"quiz acc, % {on} 50.0 ± 5.0 50.0 ± 5.0 (0-shot, first 50 documents of test)" in rows
    assert f"piqa acc, % {on} 50.0 ± -" in rows
    assert "± is the standard error; - where it cannot be told" in " ".join(shown.split())
    after = command(family, "show", "large/1").stdout.split("this one")[1].splitlines()
    assert after[1:3] == ["      └─ small version 1", "         └─ tiny version 1"]
    assert "large version 2 (candidate)" in command(family, "show", "large@candidate").stdout
    assert "choose one of: 1, 2" in command(family, "show", "large/7").stderr


def test_models_diff_shows_architecture_recipe_and_paired_differences(family: Path) -> None:
    shown = command(family, "diff", "large/1", "large/2").stdout
    lines = shown.splitlines()
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]] for line in lines if "│" in line
    }
    assert rows["architecture.num_layers"] == ["20", "18", ""]
    assert "architecture.hidden_size" not in rows
    assert rows["recipe.distill.steps"] == ["10", "20", ""]
    assert rows["parameters"] == ["20,000", "18,000", ""]
    assert rows["held-out loss, nats per token"] == ["2.000", "2.125", "0.125 worse (±0.000, paired)"]
    assert list(rows)[-3:] == ["quiz acc, %", "arc acc, %", "piqa acc, %"]
    assert rows["arc acc, %"] == ["50.0 ± 5.0", "50.0 ± 5.0", "0.0 (±13.9)"]
    assert rows["piqa acc, %"] == ["50.0 ± -", "50.0 ± -", "0.0 (no interval)"]
    assert "\narc: 0-shot, first 100 documents" in shown  # what it was measured on
    assert "\n± is the standard error; - where it cannot be told" in shown


def test_models_delete_says_what_hangs_on_a_version_and_asks(family: Path) -> None:
    client = MlflowClient(f"sqlite:///{family}/mlflow.db")
    client.set_registered_model_alias("large", "champion", "1")
    client.set_registered_model_alias("large", "tried", "1")
    moves = [{"version": "2", "previous": None}, {"version": "1", "previous": "2"}]
    client.set_registered_model_tag("large", "minitron.history.champion", json.dumps(moves))
    asked = command(family, "delete", "large/1", input="n\n")
    assert "the alias 'champion' points at large version 1" in asked.stdout
    assert "small version 1 was made from large version 1" in asked.stdout
    assert "tiny version 1" not in asked.stdout  # its parent stays
    assert "nothing was deleted" in asked.stdout
    assert command(family, "delete", "large/1").exit_code == 1  # nobody answers
    assert command(family, "delete", "large").exit_code == 2
    assert [str(version.version) for version in client.search_model_versions("name='large'")] == ["2", "1"]
    done = command(family, "delete", "large/1", "--yes")
    assert f"its weights are still in {family}/students/large-1" in done.stdout
    assert "to point 'champion' at version 2 as before: minitron rollback large" in done.stdout
    assert "--alias tried" not in done.stdout  # it has never been moved, so a rollback has nothing to go back to
    assert [str(version.version) for version in client.search_model_versions("name='large'")] == ["2"]
    assert "large version 1 (deleted)" in command(family, "show", "small/1").stdout


def test_a_pull_that_was_interrupted_copies_only_what_is_missing(family: Path, tmp_path_factory: Any) -> None:
    source, target = family / "students" / "small-1", tmp_path_factory.mktemp("copies") / "copy"
    (source / "model.safetensors").rename(family / "aside")
    assert command(family, "pull", "small@candidate", str(target)).exit_code == 2
    assert not target.exists()
    (family / "aside").rename(source / "model.safetensors")
    (source / "config.json").unlink()  # which was copied before
    done = command(family, "pull", "small@candidate", str(target))
    assert done.exit_code == 0, done.output
    verify(str(target))
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setenv("HF_TOKEN", Hub.TOKEN)
        yield running


@pytest.mark.parametrize(
    "arguments", [["models", "pull", "small@candidate", "/proc/x"], ["report", "a", "--out", "/proc/x"]]
)
def test_the_remedy_for_a_file_outside_the_storage_is_not_another_storage(family: Path, arguments: list[str]) -> None:
    refused = CliRunner(env={"COLUMNS": "200"}).invoke(main, [*arguments, "--storage", str(family)])
    assert refused.exit_code == 2
    assert "/proc/x: " in refused.stderr
    assert "cannot be written (No such file or directory)" in refused.stderr
    assert refused.stderr.splitlines()[-1] == "  fix: choose another folder"


def test_models_pull_takes_one_version_by_its_number(family: Path, tmp_path_factory: Any) -> None:
    target = tmp_path_factory.mktemp("copies") / "copy"
    both = command(family, "pull", "large/1", str(target), "--version", "2")
    assert "large/1 --version 2: more than one alias or version" in both.stderr
    assert "large version 1, verified" in command(family, "pull", "large/1", str(target)).stdout
    assert (target / "model.safetensors").read_bytes() == bytes([20]) * 1000


def test_models_push_uploads_the_verified_weights_and_their_card_to_a_private_repository(
    family: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused = command(family, "push", "small/1", "acme/small")
    assert refused.exit_code == 2
    assert f"acme/small: cannot be uploaded to {hub.address}" in refused.stderr
    monkeypatch.setenv("HF_TOKEN", Hub.TOKEN)
    (family / "students" / "large-2" / "model.safetensors").write_bytes(b"x" * 1000)
    assert "SHA-256 is" in command(family, "push", "large/2", "acme/large").stderr
    assert hub.files == {}
    student = family / "students" / "small-1"
    (student / "notes.txt").write_text("not registered")
    done = command(family, "push", "small/1", "acme/small")
    assert done.exit_code == 0, done.output
    assert "has no model card" in done.stderr
    assert hub.created[-1]["visibility"] == "private"
    assert hub.files["model.safetensors"] == bytes([12]) * 1000
    assert set(hub.files) == {"config.json", "manifest.json", "model.safetensors"}
    for header, warned in (("base_model: a", True), ("license: apache-2.0", False)):
        (student / "README.md").write_text(f"---\n{header}\n---\n# Small\n")
        done = command(family, "push", "small/1", "acme/small")
        assert ("names no licence" in done.stderr) == warned
    assert b"apache-2.0" in hub.files["README.md"]
    assert len(hub.sent) == 1  # the weights, once
    assert f"{hub.address}/acme/small/commit/1" in done.stdout


def test_models_push_does_not_publish_in_a_repository_that_everybody_can_read_unless_told_to(
    family: Path, hub: Hub
) -> None:
    hub.public.add("acme/open")
    refused = command(family, "push", "small/1", "acme/open")
    assert refused.exit_code == 2
    assert "acme/open is public" in refused.stderr
    assert "--public" in refused.stderr
    assert (hub.files, hub.sent) == ({}, [])
    assert command(family, "push", "small/1", "acme/open", "--public").exit_code == 0
    assert "model.safetensors" in hub.files


def test_models_push_refuses_a_repository_whose_other_files_would_be_read_with_the_weights(
    family: Path, hub: Hub
) -> None:
    kept = {"notes.md": b"", "LICENSE": b"", ".gitattributes": b"", "onnx/model.safetensors": b""}
    for other in ("model-00001-of-00002.safetensors", "adapter_config.json", "chat_template.jinja"):
        hub.files = {other: b"of another version", **kept}
        refused = command(family, "push", "small/1", "acme/small")
        assert refused.exit_code == 2
        assert f"acme/small has {other}, which" in refused.stderr
        assert (set(hub.files), hub.sent) == ({other, *kept}, [])
    hub.files = dict(kept)
    assert command(family, "push", "small/1", "acme/small").exit_code == 0
    assert kept.keys() < hub.files.keys()
    hub.created.clear()
    assert "give it as OWNER/small" in command(family, "push", "small/1", "small").stderr
    assert hub.created == []


def test_models_push_that_was_interrupted_sends_only_what_is_missing(family: Path, hub: Hub) -> None:
    with committed_folder(str(family / "students" / "parts")) as folder:
        for part in ("a", "b"):
            (folder / f"{part}.safetensors").write_text(part * 1000)
    register(
        f"sqlite:///{family}/mlflow.db", name="parts", source=str(family / "students" / "parts"), run_id=None, tags={}
    )
    hub.refused = hashlib.sha256(b"b" * 1000).hexdigest()
    failed = command(family, "push", "parts/1", "acme/parts")
    assert failed.exit_code == 2
    assert "acme/parts: cannot be uploaded" in failed.stderr
    assert "call it again to send what is missing" in failed.stderr
    assert hub.files == {}
    missing, hub.refused = hub.refused, ""
    hub.sent.clear()
    assert command(family, "push", "parts/1", "acme/parts").exit_code == 0
    assert hub.sent == [missing]
    assert set(hub.files) == {"a.safetensors", "b.safetensors", "manifest.json"}


def test_a_hub_that_does_not_answer_is_an_error_of_one_line(family: Path, hub: Hub, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    failed = command(family, "push", "small/1", "acme/small")
    assert failed.exit_code == 2
    assert "acme/small: cannot be uploaded" in failed.stderr


def test_an_unknown_alias_is_answered_with_what_every_command_takes(family: Path) -> None:
    unknown = command(family, "show", "large@absent")
    assert unknown.exit_code == 2
    assert "its aliases are: candidate (version 2); or name a version by its number" in unknown.stderr


def test_the_list_of_reports_of_an_empty_storage_says_so(tmp_path: Path) -> None:
    listed = CliRunner().invoke(main, ["report", "--storage", str(tmp_path)])
    assert listed.exit_code == 0
    assert "no finished runs in" in listed.stdout
