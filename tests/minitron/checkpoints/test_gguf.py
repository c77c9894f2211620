"""GGUF files: their header is read once for all requests of transformers, and without the weights if it is far away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from minitron import storage
from minitron.checkpoints import gguf_remote
from minitron.checkpoints.gguf import read_once
from minitron.models import source_architecture


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


def test_of_an_uploaded_gguf_file_the_architecture_needs_only_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_remote, "FIRST_BYTES", 64)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add in ("block_count", "head_count", "head_count_kv"):
        getattr(writer, f"add_{add}")(2)
    for add in ("embedding_length", "feed_forward_length", "vocab_size", "context_length"):
        getattr(writer, f"add_{add}")(32)
    writer.add_tensor("token_embd.weight", np.zeros((32, 32_768), np.float32))  # 4 MiB
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read: list[int] = []
    original = MemoryFileSystem.cat_file

    def counted(self: Any, name: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        data = original(self, name, start=start, end=end, **options)
        read.append(len(data) if name.endswith(".gguf") else 0)
        return bytes(data)

    folder = storage.upload_files({path.name: path}, "memory://uploads")
    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    assert source_architecture(f"{folder}/{path.name}") == source_architecture(str(path))
    assert 64 < sum(read) < 10_000
    assert not list(tmp_path.glob("cache/**/*.gguf"))
