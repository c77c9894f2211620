"""Counts the graphs that torch.compile makes, without C++, whose compilation takes the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager


def counted_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that gets every graph that is made from now on."""
    made: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return aot_eager(graph, inputs)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counting, **options))
    torch._dynamo.reset()
    return made
