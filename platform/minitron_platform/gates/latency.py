"""Gate: the first token after a prompt comes in time, on the machine that promotes."""

from __future__ import annotations

from minitron_platform.gates.gate import Subject, Verdict, at_most


def latency(subject: Subject) -> list[Verdict]:
    limit, taken = subject.settings.max_latency_ms, subject.loaded.milliseconds
    if limit is None:
        return []
    name = f"first token after {subject.settings.latency_tokens:,} tokens, on {subject.loaded.device}"
    return [at_most(name, taken, limit, lambda value: f"{value:,.2f} ms")]
