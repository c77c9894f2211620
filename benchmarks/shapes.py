"""Shapes of teachers and students whose steps are measured with random weights, which take as long as trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minitron.architecture import Architecture
from minitron.distill import DistillConfig
from minitron.distill.fitting import CHOSEN, SHARE, Fit, fitting
from minitron.distill.gpu_memory import TeacherKept

LLAMA_TOKENS = 128_256
_8B = Architecture(32, 4096, 14_336, 32, 8, 128, LLAMA_TOKENS, False)
_70B = Architecture(80, 8192, 28_672, 64, 8, 128, LLAMA_TOKENS, False)
_3B = Architecture(28, 3072, 8192, 24, 8, 128, LLAMA_TOKENS, True)
_135M = Architecture(30, 576, 1536, 9, 3, 64, 49_152, True)
_TINY = Architecture(2, 64, 128, 4, 2, 16, 512, True)

RANDOM: dict[str, tuple[Architecture, Architecture]] = {
    "llama-135m": (
        _135M,
        replace(_135M, num_layers=24, intermediate_size=960),
    ),  # into 89M; the teacher is as SmolLM2-135M
    "llama-3b": (_3B, replace(_3B, hidden_size=2304, intermediate_size=6144)),
    "llama-8b": (_8B, replace(_8B, hidden_size=3072, intermediate_size=9216)),  # of arXiv 2408.11796
    "llama-70b": (_70B, replace(_70B, hidden_size=6144, intermediate_size=18_432, num_heads=48)),
    "tiny": (_TINY, replace(_TINY, intermediate_size=96)),  # tries the command out on a CPU
}
"""Teacher and student by name."""
CUT = ("llama-70b",)
"""Those of which as many layers are measured as fit on the GPU."""


def pair(name: str, layers: int = 0) -> tuple[Architecture, Architecture]:
    """Teacher and student of `RANDOM`, with this number of layers if it is not 0."""
    teacher, student = RANDOM[name]
    if layers:
        return replace(teacher, num_layers=layers), replace(student, num_layers=layers)
    return teacher, student


def most_layers(name: str, config: DistillConfig, seq_length: int, gpu_bytes: int) -> int:
    """The largest number of layers with which a training beside the whole teacher fits on one GPU; at least 1."""
    most = RANDOM[name][0].num_layers
    fitting_ones = (n for n in range(most, 0, -1) if fit(*pair(name, n), config, seq_length, gpu_bytes, live=True).fits)
    return next(fitting_ones, 1)


def fit(
    teacher: Architecture,
    student: Architecture,
    config: DistillConfig,
    seq_length: int,
    gpu_bytes: int,
    *,
    live: bool,
    chosen: Sequence[str] = CHOSEN,
) -> Fit:
    """The fastest settings with which the training fits on one GPU, beside the teacher if `live`, else its head.
    chosen: the fields of `config` that are free."""
    kept: TeacherKept = "whole" if live else "head"
    return fitting(
        student,
        config,
        seq_length,
        int(SHARE * gpu_bytes),
        chosen=chosen,
        teacher=teacher,
        teacher_kept=(kept,),
        gpu_bytes=gpu_bytes,
    )
