"""Amounts in messages."""

from __future__ import annotations


def counted(amount: float, unit: str) -> str:
    """For example "2 workers"."""
    return f"{amount:g} {unit}{'s' if amount > 1 else ''}"
