"""Compile the kernel of the fused loss for an H100, without a GPU, for every divergence and with every option."""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minitron.distill.losses import fused
from minitron.distill.losses.kernels import logit_loss

H100 = GPUTarget("cuda", 90, 32)
TYPES = {
    "label_weight": "*fp32",
    "labels": "*i64",
    "student": "*fp32",
    "gradient": "*bf16",
    "divergences": "*fp32",
    "cross_entropies": "*fp32",
    "rows": "i32",
    "size": "i32",
    "best": "i32",
    "temperature": "fp32",
    "token_weight": "fp32",
    "student_scale": "fp32",
    "student_softcap": "fp32",
    "teacher_scale": "fp32",
    "teacher_softcap": "fp32",
}
TEACHER = {"teacher": "*fp32", "known": "*fp32"}
BEST = {"best_log_probs": "*fp32", "best_tokens": "*i32"}


def compiled(divergence, **teacher):
    """Compile one variant; returns the size of the machine code in bytes."""
    types = TYPES | teacher
    constants = {"DIVERGENCE": divergence, "TEMPERED": True, "BLOCK": fused.BLOCK, "BEST_BLOCK": 64}
    constants |= dict.fromkeys((TEACHER | BEST).keys() - types)
    source = ASTSource(
        logit_loss,
        {name: types.get(name, "constexpr") for name in logit_loss.arg_names},
        constants,
    )
    return len(triton.compile(source, target=H100, options={"num_warps": fused.WARPS}).asm["cubin"])


def main():
    kinds = dict.fromkeys(("forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine"), TEACHER)
    kinds |= {"top_k": BEST, "none": {}}
    print(json.dumps({name: compiled(name, **teacher) for name, teacher in kinds.items()}))


if __name__ == "__main__":
    main()
