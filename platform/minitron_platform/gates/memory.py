"""Gate: the weights take no more memory than is allowed."""

from __future__ import annotations

from minitron_platform.gates.gate import Subject, Verdict, at_most


def memory(subject: Subject) -> list[Verdict]:
    limit, needed = subject.settings.max_memory_bytes, subject.loaded.bytes
    if limit is None:
        return []
    return [at_most("memory of the weights", needed, limit, lambda value: f"{value / 1e6:,.3f} MB")]
