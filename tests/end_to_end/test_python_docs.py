"""The snippets of docs/python.md, executed in their order."""

from __future__ import annotations

import re
import shutil

import pytest
from helpers.command import ROOT

TEXT = (ROOT / "docs" / "python.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.long
def test_the_snippets_of_the_python_docs_run(finished, tmp_path, ray_here, monkeypatch, capsys):
    """The first in a storage in which the same search has finished."""
    finished.copy(tmp_path)
    shutil.copytree(finished.folder / "teacher", tmp_path / "teacher")
    shutil.copy(finished.folder / "text.jsonl", tmp_path)
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
