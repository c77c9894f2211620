"""Gate: plain transformers loads the model and its tokenizer, and computes finite logits."""

from __future__ import annotations

from minitron_platform.gates.gate import Subject, Verdict


def loads(subject: Subject) -> list[Verdict]:
    problem = subject.loaded.problem
    return [Verdict("loads with transformers", "failed" if problem else "passed", problem or "yes")]
