"""`minitron models add`: variants of a student that other tools have aligned or quantised."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from helpers.command import minitron_here
from helpers.finished_run import results
from helpers.fp8_checkpoint import fp8_config, in_fp8
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_platform.gates import judge
from minitron_platform.gates.clean_process import Loaded

BLOCK = 12  # divides every matrix of the student


def variant(
    copied: Path, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], config: Any = None
) -> Path:
    """A folder with the student's checkpoint, changed as another tool might."""
    folder = copied / name
    shutil.copytree(results(copied)["distill"]["student"], folder, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | (config or {})))
    return folder


def noise(size: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Changes every weight by random numbers of a standard deviation."""
    draw = torch.Generator().manual_seed(0)
    return lambda tensors: {
        name: each + size * torch.randn(each.shape, generator=draw) for name, each in tensors.items()
    }


def command(copied: Path, *arguments: str) -> Any:
    return minitron_here(*arguments, "--storage", "runs", cwd=copied)


@contextmanager
def loads() -> Iterator[None]:
    """The gate of a clean process passes without starting one, which takes seconds."""
    with mock.patch.object(judge, "load_in_clean_process", return_value=Loaded(None)):
        yield


def test_an_aligned_variant_is_measured_registered_once_and_promoted_if_it_is_not_worse_than_its_parent(
    copied: Path,
) -> None:
    client = MlflowClient(f"sqlite:///{copied}/runs/mlflow.db")
    client.set_registered_model_alias("tiny-student", "champion", "1")
    variant(copied, "chat", noise(1e-3))
    variant(copied, "damaged", noise(0.1))
    options = ("--parent", "tiny-student@champion", "--kind", "aligned")
    added = command(copied, "models", "add", "chat", "--as", "tiny-student", *options)
    assert "tiny-student version 2, aligned from tiny-student version 1, is candidate" in added.stdout, added.stderr
    assert "KL" in added.stdout
    again = command(copied, "models", "add", "chat", "--as", "tiny-student", *options)
    assert "tiny-student version 2, aligned" in again.stdout
    assert "KL" not in again.stdout  # nothing is measured twice
    version = client.get_model_version("tiny-student", "2")
    run = client.get_run(version.run_id)
    assert run.data.tags["mlflow.parentRunId"] == client.get_model_version("tiny-student", "1").run_id
    assert (run.info.run_name, run.info.status) == ("tiny-student, aligned", "FINISHED")
    assert {"loss", "kl", "parent.loss", "arc_easy.acc", "parent.arc_easy.acc"} <= run.data.metrics.keys()
    (model,) = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{version.run_id}'")
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "tiny-student", "version": "2"}]
    lines = command(copied, "models", "show", "tiny-student@candidate").stdout.splitlines()
    assert lines[-2:] == ["└─ tiny-student version 1", "   └─ tiny-student version 2, aligned  <- this one"]

    promoted = command(copied, "promote", "tiny-student")
    assert "champion is version 2 (was version 1)" in promoted.stdout, promoted.stderr
    gates = {line.split("│")[1].strip(): line for line in promoted.stdout.splitlines() if line.startswith("│")}
    assert "paired" in gates["held-out loss against its parent"]
    assert "arc_easy against its parent" in gates
    assert not any("teacher" in gate or "version 1" in gate for gate in gates)

    other = command(copied, "models", "add", "chat", "--as", "tiny-student", "--parent", "tiny-student/2", *options[2:])
    assert "version 2 has the same weights, with another origin" in other.stderr

    damaged = ("damaged", "--as", "tiny-damaged", "--parent", "tiny-student/1", "--kind", "aligned")
    assert command(copied, "models", "add", *damaged).returncode == 0
    with loads():
        refused = command(copied, "promote", "tiny-damaged")
    assert refused.returncode == 2
    assert "tiny-damaged is not promoted: held-out loss against its parent\n" in refused.stderr
    assert "tiny-damaged 1 (candidate), aligned from tiny-student version 1: " in command(copied, "models").stdout


def test_a_variant_is_measured_again_when_the_documents_of_a_benchmark_change(copied: Path) -> None:
    (path,) = (copied / "runs" / "runs").glob("*/recipe.yaml")
    recipe = yaml.safe_load(path.read_text())
    (task,) = recipe["evaluate"]["tasks"]
    documents = Path(shutil.copy(task["data"], copied / "own.jsonl"))
    task["data"] = str(documents)
    path.write_text(yaml.safe_dump(recipe))
    variant(copied, "measured", noise(2e-3))
    add = ("models", "add", "measured", "--as", "tiny-measured", "--parent", "tiny-student/1", "--kind", "aligned")
    assert "KL" in command(copied, *add).stdout
    assert "KL" not in command(copied, *add).stdout
    documents.write_text("".join(reversed(documents.read_text().splitlines(keepends=True))))
    assert "KL" in command(copied, *add).stdout


def test_a_quantised_variant_is_measured_dequantised_and_refused_with_the_remedy_if_that_is_impossible(
    copied: Path,
) -> None:
    variant(copied, "fp8", lambda tensors: in_fp8(tensors, BLOCK), fp8_config(BLOCK))
    variant(copied, "awq", dict, {"quantization_config": {"quant_method": "awq", "bits": 4}})
    options = ("--parent", "tiny-student/1", "--kind", "quantised")
    added = command(copied, "models", "add", "fp8", "--as", "tiny-fp8", *options)
    assert "tiny-fp8 version 1, quantised from tiny-student version 1" in added.stdout, added.stderr
    assert "are quantised" in command(copied, "models", "add", "fp8", "--as", "x", *options[:-1], "aligned").stderr

    refused = command(copied, "models", "add", "awq", "--as", "tiny-awq", *options)
    assert refused.returncode == 2
    assert "quant_method 'awq'" in refused.stderr
    assert "--unmeasured" in refused.stderr
    unmeasured = command(copied, "models", "add", "fp8", "--as", "tiny-unmeasured", *options, "--unmeasured")
    assert unmeasured.returncode == 0, unmeasured.stderr
    with loads():
        refused = command(copied, "promote", "tiny-unmeasured")
    assert "tiny-unmeasured is not promoted: quality against its parent\n" in refused.stderr
    assert "not measured" in refused.stdout
    cards = [path.read_text() for path in (copied / "runs" / "variants").glob("*/model/README.md")]
    assert any("# tiny-fp8\n" in card and "KL to the teacher" in card for card in cards)
    assert any("# tiny-unmeasured\n" in card and "Not measured" in card for card in cards)


def test_a_checkpoint_that_cannot_be_measured_or_loaded_is_refused_before_it_is_copied(copied: Path) -> None:
    def padded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = tensors["model.embed_tokens.weight"]
        return tensors | {"model.embed_tokens.weight": torch.cat([rows, torch.zeros(8, rows.shape[1])])}

    rows = len(load_file(variant(copied, "whole", dict) / "model.safetensors")["model.embed_tokens.weight"])
    variant(copied, "padded", padded, {"vocab_size": rows + 8})
    variant(copied, "part", lambda tensors: {k: v for k, v in tensors.items() if "layers.0.mlp.down_proj" not in k})
    stored = sorted((copied / "runs").glob("variants/*"))
    options = ("--as", "tiny-refused", "--parent", "tiny-student/1", "--kind", "aligned")
    refused = command(copied, "models", "add", "padded", *options)
    assert (
        f"its vocabulary has {rows + 8} tokens, that of the teacher of tiny-student version 1 {rows}" in refused.stderr
    )
    assert "--unmeasured" in refused.stderr
    refused = command(copied, "models", "add", "part", *options, "--unmeasured")
    assert "the tensors are not those of the model in config.json" in refused.stderr
    assert sorted((copied / "runs").glob("variants/*")) == stored
    assert "tiny-refused" not in command(copied, "models").stdout


def test_a_card_that_is_a_link_out_of_the_folder_does_not_become_a_part_of_the_variants_card(copied: Path) -> None:
    folder = variant(copied, "linked", dict)
    (copied / "private.txt").write_text("a secret")
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "README.md").symlink_to(copied / "private.txt")
    add = ("models", "add", "linked", "--as", "tiny-linked", "--parent", "tiny-student/1", "--kind", "aligned")
    refused = command(copied, *add, "--unmeasured")
    assert refused.returncode == 2
    assert "README.md: a link to" in refused.stderr
    assert not any("a secret" in path.read_text() for path in (copied / "runs").rglob("README.md"))


def test_variants_are_in_the_report_beside_their_parents(copied: Path) -> None:
    variant(copied, "aligned", noise(3e-3))
    variant(copied, "small", lambda tensors: in_fp8(tensors, BLOCK), fp8_config(BLOCK))
    for folder, name, kind, parent, *rest in (
        ("aligned", "tiny-chat", "aligned", "tiny-student/1"),
        ("small", "tiny-chat-fp8", "quantised", "tiny-chat/1", "--unmeasured"),
    ):
        added = command(copied, "models", "add", folder, "--as", name, "--kind", kind, "--parent", parent, *rest)
        assert added.returncode == 0, added.stderr
    assert command(copied, "report", "tiny-student", "--out", "variants.html").returncode == 0
    page = (copied / "variants.html").read_text()
    table = page.partition("Aligned and quantised variants")[2].partition("</table>")[0]
    rows = {cells[0]: cells for cells in (cells_of(row) for row in table.split("<tr>")) if len(cells) > 1}
    student, chat, quantised = (rows[f"{name} version 1"] for name in ("tiny-student", "tiny-chat", "tiny-chat-fp8"))
    assert float(chat[2]) > 0
    assert float(student[2]) > 0
    assert chat[-1] == "aligned from tiny-student version 1"
    assert quantised[2] == "not measured"
    assert float(quantised[1]) < float(chat[1])  # MB
    tree = page.partition('class="tree"')[2].partition("</ul>\n\n<h2")[0]
    assert (
        tree.index("tiny-student version 1") < tree.index("tiny-chat version 1") < tree.index("tiny-chat-fp8 version")
    )


def cells_of(row: str) -> list[str]:
    return [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row)]
