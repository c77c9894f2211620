"""Upper limits on what a candidate may cost in inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minitron.architecture import Architecture
from minitron.arguments import check_fields

VALUE_BYTES = 2  # of a weight, key or value in inference: 16 bits
LATENCIES: dict[str, tuple[Literal["first", "further"], str]] = {
    "latency_ms": ("first", "to the first token"),
    "token_latency_ms": ("further", "to each further token"),
}
"""The limits that are measured: the kind of `minitron_search.latency`, and its name in messages."""


@dataclass(frozen=True)
class Limits:
    """Upper limits for inference on `batch` sequences of `context` tokens; None for no limit.

    `flops_per_token` counts a forward pass, `kv_cache_bytes` the keys and values of all sequences (every layer counted as
    attending to the whole context), `memory_bytes` weights and KV cache together. `latency_ms` is the time to the first
    token, `token_latency_ms` that between two tokens that are generated; they are not calculated but measured, by
    `minitron_search.latency`. Raises InputError for a wrong type.
    """

    context: int
    batch: int = 1
    flops_per_token: float | None = None
    kv_cache_bytes: float | None = None
    memory_bytes: float | None = None
    latency_ms: float | None = None
    token_latency_ms: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def needs(self, architecture: Architecture) -> dict[str, int]:
        """What `architecture` costs in each quantity that can be calculated, by the name of the limit."""
        cache = architecture.kv_cache_bytes(self.batch * self.context, VALUE_BYTES)
        return {
            "flops_per_token": architecture.flops_per_token(self.context),
            "kv_cache_bytes": cache,
            "memory_bytes": VALUE_BYTES * architecture.num_parameters + cache,
        }

    def exceeded(self, architecture: Architecture) -> str:
        """The limits that `architecture` exceeds, as text; empty if there are none."""
        return self._exceeded_text(self.needs(architecture), "is")

    def unreachable(self, architectures: Sequence[Architecture]) -> str:
        """The limits that all of `architectures` exceed, with the least that any of them needs, as text; empty if there are
        none."""
        needs = [self.needs(architecture) for architecture in architectures]
        return self._exceeded_text({name: min(need[name] for need in needs) for name in needs[0]}, "is at least")

    def _exceeded_text(self, needs: dict[str, int], verb: str) -> str:
        return ", ".join(
            f"{name} {verb} {need:,} (limit {limit:,.0f})"
            for name, need in needs.items()
            if (limit := getattr(self, name)) is not None and need > limit
        )
