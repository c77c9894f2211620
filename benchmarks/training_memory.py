"""Peak main memory of a training process compared with the estimate of `minitron.memory`, for several shapes and settings.

    python -m benchmarks.training_memory [NAME ...]

Every case runs in a process of its own with random weights, rows and teacher outputs; its peak is that of resident memory.
CPU only.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peaks import compare_peaks
from minitron.architecture import Architecture
from minitron.data import Rows
from minitron.distill import DistillConfig, distill
from minitron.distill.teacher.live import TeacherBatch
from minitron.logits import Head
from minitron.memory import MainMemory, training_memory

GEMMA = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262_144,
}
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32_000,
}
TINY = {**SMALL, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
# family, shape, dtype, rows per micro-batch, tokens per row, other settings
CASES = {
    "tiny": ("llama", TINY, "bfloat16", 2, 256, {}),
    "tiny, vocabulary 128,256": ("llama", {**TINY, "vocab_size": 128_256}, "bfloat16", 2, 256, {}),
    "small": ("llama", SMALL, "bfloat16", 2, 256, {}),
    "small, float32": ("llama", SMALL, "float32", 2, 256, {}),
    "small, 4 x 1,024 tokens": ("llama", SMALL, "bfloat16", 4, 1024, {}),
    "small, 4 x 1,024 tokens, selective": (
        "llama",
        SMALL,
        "bfloat16",
        4,
        1024,
        {"activation_checkpointing": "selective"},
    ),
    "small, 4 x 1,024 tokens, full": ("llama", SMALL, "bfloat16", 4, 1024, {"activation_checkpointing": "full"}),
    "small, checkpoints": ("llama", SMALL, "bfloat16", 2, 256, {"checkpoint_every": 1}),
    "gemma3-270m": ("gemma3_text", GEMMA, "bfloat16", 1, 512, {}),
    "gemma3-270m, checkpoints": ("gemma3_text", GEMMA, "bfloat16", 1, 512, {"checkpoint_every": 1}),
}


class RandomTeacher:
    """A teacher whose final hidden states are random in every batch, with a head of their width."""

    def __init__(self, head: Tensor) -> None:
        self.head = Head(head)

    def batch(self, indices: list[int], input_ids: Tensor) -> TeacherBatch:
        hidden = torch.randn(input_ids.numel(), self.head.weight.shape[1]).to(self.head.weight.dtype)
        return {"teacher_hidden": hidden, "teacher_head": self.head}

    def prefetch(self, indices: list[int]) -> None:
        pass


class RandomRows(Rows):
    """Rows of random tokens."""

    def __init__(self, vocabulary: int, seq_length: int) -> None:
        self.vocabulary, self.seq_length = vocabulary, seq_length

    def __len__(self) -> int:
        return 64

    def take(self, indices: object) -> Tensor:
        return torch.randint(self.vocabulary, (len(list(indices)), self.seq_length))  # type: ignore[call-overload]


def one(name: str) -> MainMemory:
    """Train a few steps; returns the estimate."""
    family, shape, dtype, rows, seq_length, more = CASES[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape, tie_word_embeddings=True)
    student = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    settings = DistillConfig(
        steps=3, batch_rows=2 * rows, micro_batch_rows=rows, warmup_steps=1, peak_flops=1e9, **more
    )
    teacher = RandomTeacher(torch.randn_like(student.get_output_embeddings().weight))
    with tempfile.TemporaryDirectory() as folder:
        distill(student, teacher, RandomRows(shape["vocab_size"], seq_length), settings, checkpoints=folder, key="k")
    architecture = Architecture.from_config(config)
    # a teacher of which only the head was loaded
    only_head = replace(architecture, num_layers=1)
    return training_memory(architecture, settings, seq_length, getattr(torch, dtype).itemsize, teacher=only_head)


def main() -> None:
    compare_peaks("benchmarks.training_memory", __doc__, list(CASES), one)


if __name__ == "__main__":
    main()
