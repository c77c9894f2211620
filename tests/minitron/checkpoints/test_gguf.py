"""GGUF files: their header is read once for all requests of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from minitron.checkpoints.gguf import read_once


def test_the_header_of_a_gguf_file_is_read_once_while_transformers_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened, original = str(tmp_path / "tiny.gguf"), [], gguf.GGUFReader
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def counted(name: str) -> Any:
        opened.append(name)
        return original(name)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    with read_once():
        first, second = (load_gguf_checkpoint(path)["config"] for _ in range(2))
    assert opened == [path]
    assert first == second
    assert first["num_hidden_layers"] == 3
    assert load_gguf_checkpoint(path)["config"] == first
    assert opened == [path, path]  # a later load reads it again, because the file may have changed
