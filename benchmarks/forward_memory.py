"""Peak main memory of a process that only computes forward passes, compared with the estimate of `minitron.memory`.

    python -m benchmarks.forward_memory [NAME ...]

Every case runs in a process of its own, in a thread as Ray's tasks do, with random weights and rows; its peak is that of
resident memory. CPU only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peaks import compare_peaks
from benchmarks.training_memory import GEMMA, SMALL, TINY
from minitron.architecture import Architecture
from minitron.data import DocumentTokens
from minitron.distill.teacher.stored import log_sum_exp
from minitron.distill.teacher.top_k import top_tokens
from minitron.evaluation.beginning import bos_losses
from minitron.evaluation.heldout import heldout_metrics, teacher_targets
from minitron.importance.removal import ROW_METRICS, removal_scores
from minitron.logits import Head
from minitron.memory import MainMemory, forward_memory
from minitron.models import final_hidden, layers_of

ROWS, SEQ_LENGTH = 4, 512
LARGE = {**TINY, "vocab_size": 128_256}
# what is computed, family, shape
CASES = {
    "teacher's outputs, small": ("outputs", "llama", SMALL),
    "teacher's outputs, tiny, vocabulary 128,256": ("outputs", "llama", LARGE),
    "teacher's outputs, gemma3-270m": ("outputs", "gemma3_text", GEMMA),
    "held-out rows, tiny, vocabulary 128,256": ("heldout", "llama", LARGE),
    "held-out rows, gemma3-270m": ("heldout", "gemma3_text", GEMMA),
    "removed layers by loss, tiny, vocabulary 128,256": ("loss", "llama", LARGE),
    "removed layers by logit error, tiny, vocabulary 128,256": ("logit_error", "llama", LARGE),
    "removed layers by logit error, gemma3-270m": ("logit_error", "gemma3_text", GEMMA),
    "top 64 tokens, tiny, vocabulary 128,256": ("top_k", "llama", LARGE),
    "with and without BOS, gemma3-270m": ("bos", "gemma3_text", GEMMA),
}


def compute(what: str, family: str, shape: dict[str, int]) -> MainMemory:
    """Compute twice, and return the estimate."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape, tie_word_embeddings=True)
    models = [
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for _ in range(2 if what == "heldout" else 1)
    ]
    model = models[0]
    architecture = Architecture.from_config(config)
    held = [torch.empty(16) for _ in range(4000)]  # a process that has run for a while has no small free pieces
    tokens = ROWS * SEQ_LENGTH
    if what == "heldout":
        estimate = forward_memory([architecture, architecture], 2, tokens, logits=2)
    elif what in ROW_METRICS:
        estimate = forward_memory([architecture], 2, tokens, logits=2, streams=architecture.num_layers + 1)
    else:
        estimate = forward_memory([architecture], 2, tokens)
    with torch.inference_mode():
        for _ in range(2):
            rows = torch.randint(shape["vocab_size"], (ROWS, SEQ_LENGTH))
            if what == "heldout":
                heldout_metrics(model, rows, **teacher_targets(models[1], rows))
            elif what in ROW_METRICS:
                layers = range(len(layers_of(model)))
                removal_scores(model, rows, what, layers, [1], documents=None, batch_rows=ROWS, advance=lambda _: None)
            elif what == "bos":
                bos_losses(model, rows, DocumentTokens(begin=(), end=(1,), bos=2))
            elif what == "top_k":
                top_tokens(Head.of(model), final_hidden(model, rows).flatten(0, 1), 64)
            else:
                log_sum_exp(Head.of(model), final_hidden(model, rows))
    del held
    return estimate


def one(name: str) -> MainMemory:
    """Compute in a thread; returns the estimate."""
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compute, *CASES[name]).result()


def main() -> None:
    compare_peaks("benchmarks.forward_memory", __doc__, list(CASES), one)


if __name__ == "__main__":
    main()
