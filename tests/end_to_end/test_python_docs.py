"""The snippets of docs/python.md, executed in their order."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml
from helpers.command import ROOT

TEXT = (ROOT / "docs" / "python.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.long
def test_the_snippets_of_the_python_docs_run(bench, tmp_path, ray_here, monkeypatch, capsys):
    for name in ("teacher", "text.jsonl", "arc.jsonl", "recipe.yaml"):
        source = bench / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["family"][0]["space"] = {"num_layers": [4], "hidden_size": [36], "intermediate_size": [48, 72]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    platform, method, memory, searching = SNIPPETS
    exec(compile(platform, "docs/python.md", "exec"), names)
    assert "RunResult(tiny-cpu-" in capsys.readouterr().out
    exec(compile(method, "docs/python.md", "exec"), names)
    assert (tmp_path / "student" / "model.safetensors").exists()
    exec(compile(memory, "docs/python.md", "exec"), names)
    assert "1.5 GB: context 1.5" in capsys.readouterr().out
    exec(compile(searching, "docs/python.md", "exec"), names)
    assert names["found"].winner in names["shapes"]
    assert len(names["found"].table) == len(names["shapes"])
