"""Measures in this process the FLOP/s of forward passes and of training steps of a model of 92M parameters.

    python -m minitron_platform.doctor.measure_speed bfloat16

prints both as JSON: of one CPU core, by its own time, so that other programs hardly count; or of one GPU.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minitron import Architecture
from minitron.device import DTYPES, device
from minitron.distill import DistillConfig, LiveTeacher, StepReport, distill

SEQ_LENGTH = 256
BATCH_ROWS = 4
STEPS = 3  # and one before, that is not counted
SHAPE = {"hidden_size": 576, "intermediate_size": 1024, "num_hidden_layers": 24, "vocab_size": 49152}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


class _Rows:
    seq_length = SEQ_LENGTH

    def __init__(self) -> None:
        self.rows = torch.randint(SHAPE["vocab_size"], (BATCH_ROWS * (STEPS + 1), SEQ_LENGTH))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> Tensor:
        return self.rows[list(indices)]


def measure(dtype: torch.dtype) -> dict[str, float]:
    """The FLOP/s of forward passes and of training steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = (LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)).to(device(), dtype) for _ in range(2))
    rows = _Rows()
    per_pass = Architecture.from_config(student.config).flops_per_token(SEQ_LENGTH) * BATCH_ROWS * SEQ_LENGTH
    forward_seconds = _forward_seconds(teacher, rows.take(range(BATCH_ROWS)))
    config = DistillConfig(steps=STEPS + 1, batch_rows=BATCH_ROWS, micro_batch_rows=BATCH_ROWS, peak_lr=1e-5)
    times: list[float] = []

    def report(step: StepReport) -> None:
        times.append(_now())

    distill(student, LiveTeacher(teacher), rows, config, report=report)  # type: ignore[arg-type]
    step_seconds = (times[-1] - times[0]) / (len(times) - 1)
    return {"forward": per_pass / forward_seconds, "training": 3 * per_pass / (step_seconds - forward_seconds)}


def _forward_seconds(model: torch.nn.Module, tokens: Tensor) -> float:
    tokens = tokens.to(device())
    with torch.no_grad():
        model(tokens)
        started = _now()
        for _ in range(STEPS):
            model(tokens)
        return (_now() - started) / STEPS


def _now() -> float:
    if device().type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    print(json.dumps(measure(DTYPES[sys.argv[1]])))
