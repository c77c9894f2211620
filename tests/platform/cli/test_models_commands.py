"""`minitron models` and its commands, on a registry with a small family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.hub_server import Hub, hub_server
from huggingface_hub import constants
from mlflow import MlflowClient

from minitron.storage import committed_folder, verify
from minitron_platform.cli.commands import main
from minitron_platform.gates.documents import write_rows
from minitron_platform.tracking.registry import register
from minitron_platform.tracking.version_figures import Measured, VersionFigures


@pytest.fixture
def family(tmp_path: Path, empty_database: Path) -> Path:
    """A storage with two versions of a large student and a small one that was cut from the first."""
    shutil.copy(empty_database, tmp_path)
    for name, version, layers, loss, cut_from in (
        ("large", 1, 20, 2.0, "teacher"),
        ("large", 2, 18, 2.125, "teacher"),
        ("small", 1, 12, 2.5, "large version 1"),
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
            student=Measured(loss=loss, kl=loss - 1, documents=f"{run}.json", tokens_per_second=1234.0),
            teacher=Measured(loss=1.5, kl=0.0),
        )
        tags = {
            "minitron.teacher": "acme/base",
            "minitron.teacher_corrected": "True",
            "minitron.cut_from": cut_from,
            "minitron.architecture": json.dumps({"num_layers": layers, "hidden_size": 64}),
            "minitron.run": run,
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


def test_models_show_prints_the_lineage_from_the_teacher_on(family: Path) -> None:
    shown = command(family, "show", "small").stdout
    assert [line.strip(" └─") for line in shown.split("lineage\n")[1].splitlines()] == [
        "acme/base (teacher)",
        "acme/base, corrected on the text",
        "large version 1",
        "small version 1  <- this one",
    ]
    assert "2.500" in shown
    assert "1.500" in shown  # the teacher's loss
    assert "small version 1" in command(family, "show", "large/1").stdout.split("this one")[1]
    assert "large version 2 (candidate)" in command(family, "show", "large@candidate").stdout
    assert "choose one of: 1, 2" in command(family, "show", "large/7").stderr


def test_models_diff_shows_architecture_recipe_and_paired_differences(family: Path) -> None:
    lines = command(family, "diff", "large/1", "large/2").stdout.splitlines()
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]] for line in lines if "│" in line
    }
    assert rows["architecture.num_layers"] == ["20", "18", ""]
    assert "architecture.hidden_size" not in rows
    assert rows["recipe.distill.steps"] == ["10", "20", ""]
    assert rows["held-out loss, nats per token"] == ["2.000", "2.125", "0.125 worse (±0.000, paired)"]


def test_models_delete_says_what_hangs_on_a_version_and_asks(family: Path) -> None:
    client = MlflowClient(f"sqlite:///{family}/mlflow.db")
    client.set_registered_model_alias("large", "champion", "1")
    asked = command(family, "delete", "large/1", input="n\n")
    assert "the alias 'champion' points at large version 1" in asked.stdout
    assert "small version 1 was made from large version 1" in asked.stdout
    assert "nothing was deleted" in asked.stdout
    assert command(family, "delete", "large/1").exit_code == 1  # nobody answers
    assert command(family, "delete", "large").exit_code == 2
    assert [str(version.version) for version in client.search_model_versions("name='large'")] == ["2", "1"]
    done = command(family, "delete", "large/1", "--yes")
    assert f"its weights are still in {family}/students/large-1" in done.stdout
    assert "minitron rollback large" in done.stdout
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


def test_models_push_uploads_the_verified_weights_to_a_hub(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", "wrong")
        refused = command(family, "push", "small/1", "acme/small")
        assert refused.exit_code == 2
        assert f"acme/small: cannot be uploaded to {hub.address}" in refused.stderr
        monkeypatch.setenv("HF_TOKEN", Hub.TOKEN)
        (family / "students" / "large-2" / "model.safetensors").write_bytes(b"x" * 1000)
        assert "SHA-256 is" in command(family, "push", "large/2", "acme/large").stderr
        assert hub.files == {}
        done = command(family, "push", "small/1", "acme/small")
        assert done.exit_code == 0, done.output
        assert hub.created[-1]["visibility"] == "private"
        assert hub.files["model.safetensors"] == bytes([12]) * 1000
        assert set(hub.files) == {"config.json", "manifest.json", "model.safetensors"}
